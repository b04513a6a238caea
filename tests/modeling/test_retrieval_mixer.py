"""The retrieval mixer: its equations, missing candidates, learning, saving, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import perturb
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, Trainer, TrainingArguments

from ssm_zoo.conversion.export import export, verify_export
from ssm_zoo.modeling import RetrievalMixer, RetrievalMixerConfig

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "max_position_embeddings": 6, "intermediate_size": 12}


def make(**changes: Any) -> RetrievalMixer:
    torch.manual_seed(0)
    model = RetrievalMixer(RetrievalMixerConfig(**(SIZES | changes)))
    perturb(model)
    return model.eval()


def draw(batch: int, candidates: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, generator=generator), torch.randn(batch, candidates, 8, generator=generator)


def by_the_equations(model: RetrievalMixer, query: Tensor, candidates: Tensor, present: list[bool]) -> Tensor:
    """Scores of one query's candidates, row by row."""
    x = torch.cat([query[None], candidates])
    seen = [0] + [i + 1 for i, there in enumerate(present) if there]
    for block in model.layers:
        inputs = block.token_norm(x)
        rows = [sum(block.mixer.weight[i, j] * inputs[j] for j in seen) + block.mixer.bias[i] for i in range(len(x))]
        x = x + torch.stack(rows)
        x = x + block.mlp.down_proj(F.gelu(block.mlp.up_proj(block.channel_norm(x))))
    return x[1:] @ model.retrieval_head.weight[0] + model.retrieval_head.bias


@pytest.mark.parametrize("candidates", [1, 3, 5])
def test_scores_are_the_equations(candidates: int) -> None:
    model = make().double()
    query, embeddings = (part.double() for part in draw(2, candidates))
    mask = torch.ones(2, candidates)
    mask[1, ::2] = 0
    for given in (None, mask):
        output = model(query, embeddings, candidate_mask=given)
        for row in range(2):
            present = [True] * candidates if given is None else (given[row] == 1).tolist()
            expected = by_the_equations(model, query[row], embeddings[row], present)
            there = torch.tensor(present)
            torch.testing.assert_close(output.logits[row, there], expected[there])
            assert (output.logits[row, ~there] == torch.finfo(torch.float64).min).all()


def test_a_missing_candidate_may_be_anything() -> None:
    model, (query, embeddings) = make(), draw(1, 4)
    mask = torch.tensor([[1, 0, 1, 1]])
    expected = model(query, embeddings, candidate_mask=mask).logits
    embeddings[0, 1] = 99.0
    assert torch.equal(model(query, embeddings, candidate_mask=mask).logits, expected)


def test_loss_is_the_cross_entropy_of_the_right_candidates_and_reaches_every_parameter() -> None:
    model, (query, embeddings), labels = make().train(), draw(3, 5), torch.tensor([4, 0, 2])
    output = model(query, embeddings, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    as_tuple = model(query, embeddings, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.any() for name, gradient in gradients.items() if name != "retrieval_head.bias")
    assert gradients.keys() == dict(model.named_parameters()).keys()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(query, embeddings, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_trainer_teaches_it_to_find_the_query_again(tmp_path: Path) -> None:
    """The right candidate is the query with noise, at a random place."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(600):
        query, candidates = torch.randn(8, generator=generator), torch.randn(5, 8, generator=generator)
        label = int(torch.randint(5, (), generator=generator))
        candidates[label] = query + 0.1 * torch.randn(8, generator=generator)
        rows.append({"query_embeds": query, "candidate_embeds": candidates, "labels": label})
    torch.manual_seed(0)
    model = RetrievalMixer(RetrievalMixerConfig(**(SIZES | {"num_hidden_layers": 4, "intermediate_size": 64})))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=12,
        per_device_train_batch_size=32,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=rows[:500]).train()
    query, candidates = (torch.stack([row[key] for row in rows[500:]]) for key in ("query_embeds", "candidate_embeds"))
    labels = torch.tensor([row["labels"] for row in rows[500:]])
    with torch.no_grad():
        found = model.eval()(query, candidates).logits.argmax(-1)
    assert (found == labels).float().mean() > 0.6  # one in five by chance


def test_it_starts_as_convolutions_do() -> None:
    torch.manual_seed(0)
    model = RetrievalMixer(RetrievalMixerConfig(hidden_size=64, num_hidden_layers=1, max_position_embeddings=128))
    mixer = model.layers[0].mixer
    for drawn, bound in (
        (mixer.weight, 128**-0.5),
        (mixer.bias, 128**-0.5),
        (model.layers[0].mlp.up_proj.weight, 1 / 8),
    ):
        assert 0.9 * bound < drawn.abs().max() <= bound


# Saving


def test_saved_loaded_and_exported(tmp_path: Path) -> None:
    model, (query, embeddings) = make(), draw(2, 5)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(loaded) is RetrievalMixer
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path / "saved")}
    assert torch.equal(loaded(query, embeddings).logits, model(query, embeddings).logits)
    report = verify_export(export(tmp_path / "saved", tmp_path / "exported", verify=False))
    assert (report["auto_class"], report["shape"], report["bit_equal"]) == ("AutoModel", [1, 5], True)
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert {"modeling_retrieval_mixer.py", "configuration_retrieval_mixer.py", "LICENSE", "README.md"} <= names
    assert not names & {"position_mixers.py", "masked_mix.py", "ssd.py"}


# What it refuses

QUERY, CANDIDATES = draw(2, 5)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "query": ({"query_embeds": torch.zeros(2, 9)}, r"query_embeds must be \(B, D\) = \(any, 8\), got \(2, 9\)"),
    "rows": ({"query_embeds": torch.zeros(3, 8)}, r"candidate_embeds must be .*\(3, 1 to 5, 8\), got \(2, 5, 8\)"),
    "too many": ({"candidate_embeds": torch.zeros(2, 6, 8)}, r"\(2, 1 to 5, 8\), got \(2, 6, 8\)"),
    "none": ({"candidate_embeds": torch.zeros(2, 0, 8)}, r"\(2, 1 to 5, 8\), got \(2, 0, 8\)"),
    "flat": ({"candidate_embeds": torch.zeros(2, 8)}, r"\(2, 1 to 5, 8\), got \(2, 8\)"),
    "mask": ({"candidate_mask": torch.ones(2, 4)}, r"candidate_mask must be .*\(2, 5\), got \(2, 4\)"),
    "labels": ({"labels": torch.zeros(2, 5)}, r"labels must be \(B\) = \(2\) integers, got \(2, 5\) of torch.float32"),
    "label": ({"labels": torch.tensor([0, 5])}, r"labels must be from 0 to 4, got \[0, 5\]"),
    "ignored label": ({"labels": torch.tensor([0, -100])}, r"labels must be from 0 to 4, got \[0, -100\]"),
    "missing label": (
        {"labels": torch.tensor([0, 1]), "candidate_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]])},
        r"labels must be candidates that candidate_mask includes, got \[0, 1\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise(case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()(**({"query_embeds": QUERY, "candidate_embeds": CANDIDATES} | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"max_position_embeddings": 1}, "max_position_embeddings must be at least 2, got 1"),
        ({"intermediate_size": -1}, "intermediate_size must be at least 1, got -1"),
        ({"hidden_act": "swash"}, "hidden_act must be an activation of transformers, got 'swash'"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
    ],
)
def test_a_malformed_configuration_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        RetrievalMixerConfig(**(SIZES | change))


def drawn(batch: int, candidates: int) -> dict[str, Tensor]:
    """Arguments in float64, with a candidate missing and with labels."""
    query, embeddings = (part.double() for part in draw(batch, candidates))
    mask = torch.ones(batch, candidates, dtype=torch.long)
    mask[0, 1] = 0
    return {
        "query_embeds": query,
        "candidate_embeds": embeddings,
        "candidate_mask": mask,
        "labels": torch.zeros(batch, dtype=torch.long),
    }


@pytest.mark.parametrize("masked", [True, False])
def test_one_compiled_graph_serves_any_number_of_candidates_and_has_the_gradients_of_eager(masked: bool) -> None:
    torch._dynamo.reset()
    model = make().double().train()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, candidates in ((2, 3), (4, 5), (3, 4)):  # 5: as many as there are places for
        arguments = drawn(batch, candidates)
        if not masked:
            del arguments["candidate_mask"]
        results = []
        for call in (compiled, model):
            model.zero_grad()
            output = call(**arguments)
            output.loss.backward()
            results.append([output.logits.detach(), output.loss.detach(), *(p.grad for p in model.parameters())])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1 and model._can_compile_fullgraph


def test_an_exported_program_serves_any_number_of_candidates() -> None:
    model = make().double()
    batch, candidates = torch.export.Dim("batch", min=2), torch.export.Dim("candidates", min=2, max=5)
    arguments = drawn(3, 4)
    del arguments["labels"]
    shapes = {
        "query_embeds": {0: batch},
        "candidate_embeds": {0: batch, 1: candidates},
        "candidate_mask": {0: batch, 1: candidates},
    }
    program = torch.export.export(model, (), kwargs=arguments, dynamic_shapes=shapes).module()
    for sizes in ((2, 5), (4, 3)):
        arguments = drawn(*sizes)
        del arguments["labels"]
        with torch.no_grad():
            torch.testing.assert_close(program(**arguments).logits, model(**arguments).logits, rtol=1e-5, atol=1e-5)
