"""Heads of every family: one sequence, one answer, however it comes; losses; loading from other checkpoints."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import ENCODERS, FAMILIES, draw_ids, make_config, make_head, make_model
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from ssm_zoo.modeling.cache import CACHE_FIELD

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("without_gate_noise"),
]

TOLERANCE = 1e-5
LABELS = 3
PAD = 7  # no stranger to the model: what it does with padding would show
ROWS = [draw_ids(1, length, seed=length) for length in (13, 9, 1, 6)]


@pytest.fixture(params=FAMILIES | ENCODERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def classifier(name: str, **changes: Any) -> Any:
    return make_head(AutoModelForSequenceClassification, name, **({"num_labels": LABELS} | changes))


def tagger(name: str, **changes: Any) -> Any:
    return make_head(AutoModelForTokenClassification, name, num_labels=LABELS, **changes)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def padded(side: str, length: int = 16) -> tuple[Tensor, Tensor]:
    """ROWS as (B, length) ids and mask; "middle" puts padding between the tokens and at both ends."""
    ids, mask = torch.full((len(ROWS), length), PAD), torch.zeros(len(ROWS), length, dtype=torch.long)
    for i, row in enumerate(ROWS):
        count = row.shape[1]
        columns = {
            "right": torch.arange(count),
            "left": torch.arange(length - count, length),
            "middle": 1 + torch.randperm(length - 2, generator=torch.Generator().manual_seed(i))[:count].sort().values,
        }[side]
        ids[i, columns], mask[i, columns] = row[0], 1
    return ids, mask


def packed() -> dict[str, dict[str, Tensor]]:
    """The ways to say which tokens of one row belong together."""
    lengths = torch.tensor([row.shape[1] for row in ROWS])
    ends = F.pad(lengths.cumsum(0), (1, 0))
    return {
        "seq_idx": {"seq_idx": torch.arange(len(ROWS)).repeat_interleave(lengths)[None]},
        "cu_seqlens": {"cu_seqlens": ends},
        "cu_seq_lens_q": {"cu_seq_lens_q": ends},
        "position_ids": {"position_ids": torch.cat([torch.arange(int(n)) for n in lengths])[None]},
    }


def by_itself(model: Any) -> list[Tensor]:
    """What the model says of each row alone: (labels) logits of a row, or (l, ...) values of its tokens."""
    with torch.no_grad():
        return [values_of(model(row))[0] for row in ROWS]


def values_of(output: Any) -> Tensor:
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


# One sequence, one answer


@pytest.mark.parametrize("how", ["ids", "inputs_embeds", "checkpointing"])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_rows_of_a_padded_batch_are_scored_as_alone(name: str, side: str, how: str) -> None:
    model = classifier(name)
    expected = torch.stack(by_itself(model))
    ids, mask = padded(side)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if how == "inputs_embeds" else {"input_ids": ids}
    if how == "checkpointing":
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    close(model(**inputs, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("how", ["ids", "inputs_embeds", "checkpointing"])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("head", [AutoModel, AutoModelForTokenClassification], ids=["embeddings", "tokens"])
def test_tokens_of_a_padded_batch_are_as_alone(name: str, head: Any, side: str, how: str) -> None:
    model = make_head(head, name, num_labels=LABELS)
    expected = by_itself(model)
    ids, mask = padded(side)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if how == "inputs_embeds" else {"input_ids": ids}
    if how == "checkpointing":
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    values = values_of(model(**inputs, attention_mask=mask))
    for row, real, alone in zip(values, mask == 1, expected, strict=True):
        close(row[real], alone)


@pytest.mark.parametrize("how", packed())
@pytest.mark.parametrize("head", [AutoModel, AutoModelForTokenClassification], ids=["embeddings", "tokens"])
def test_tokens_of_packed_documents_are_as_alone(name: str, head: Any, how: str) -> None:
    model = make_head(head, name, num_labels=LABELS)
    with torch.no_grad():
        values = values_of(model(torch.cat(ROWS, dim=1), **packed()[how]))
    close(values[0], torch.cat(by_itself(model)))


@pytest.mark.parametrize("how", packed())
def test_packed_documents_are_scored_as_alone(name: str, how: str) -> None:
    model = classifier(name)
    with torch.no_grad():
        close(model(torch.cat(ROWS, dim=1), **packed()[how]).logits, torch.stack(by_itself(model)))
        ids = ROWS[0]  # positions alone are no packing
        close(model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits, model(ids).logits)


def test_gradients_of_packed_documents_are_those_of_padded_rows(name: str) -> None:
    """Two rows with padding before, between and after the documents, which are longer and shorter than each other."""
    model = classifier(name)
    labels = torch.tensor([2, 0, 1, 2])
    ids, mask = padded("right")
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = torch.full((2, 25), PAD)
    seq_idx = torch.full((2, 25), -1)
    for row, first, number, index in ((0, 1, 5, 0), (0, 15, 9, 1), (1, 0, 0, 2), (1, 1, 4, 3)):
        count = ROWS[index].shape[1]
        rows[row, first : first + count], seq_idx[row, first : first + count] = ROWS[index][0], number
    packed_loss = model(rows, seq_idx=seq_idx, labels=labels).loss
    packed_loss.backward()
    close(packed_loss, loss)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_beginning_is_read_once(name: str, side: str) -> None:
    """Rows that go on from a cache are scored as whole ones."""
    model, beginning = classifier(name), draw_ids(1, 5, seed=50)
    ids, mask = padded(side)
    with torch.no_grad():
        expected = torch.cat([model(torch.cat([beginning, row], dim=1)).logits for row in ROWS])
        assert getattr(model(beginning), CACHE_FIELD) is None
        cache = getattr(model(beginning, use_cache=True), CACHE_FIELD)
        cache.batch_repeat_interleave(len(ROWS))
        whole_mask = F.pad(mask, (5, 0), value=1)
        output = model(ids, attention_mask=whole_mask, past_key_values=cache, use_cache=True)
    close(output.logits, expected)
    assert getattr(output, CACHE_FIELD) is cache


# Which token is the last one


def test_the_score_is_linear_in_the_last_hidden_state(name: str) -> None:
    model, ids = classifier(name), ROWS[0]
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_attentions=True)
        last = model.backbone(ids).last_hidden_state[:, -1]
    assert model.score.bias is None and model.score.weight.shape == (LABELS, last.shape[1])
    close(output.logits, last @ model.score.weight.T)
    close(output.hidden_states[-1][:, -1], last)
    assert len(output.attentions) == model.config.num_hidden_layers


def test_the_mask_decides_where_padding_is_a_real_token_too() -> None:
    """An end-of-text token that is the padding as well is read, where the mask says so."""
    model = classifier("mamba2", pad_token_id=PAD)
    row = torch.cat([ROWS[0], torch.tensor([[PAD]])], dim=1)
    with torch.no_grad():
        expected = model(row, attention_mask=torch.ones_like(row)).logits
        close(expected, make_head(AutoModelForSequenceClassification, "mamba2", num_labels=LABELS)(row).logits)
        ids = torch.cat([row, torch.full((1, 2), PAD)], dim=1)
        close(model(ids, attention_mask=F.pad(torch.ones_like(row), (0, 2))).logits, expected)
        close(model(ids.flip(1), attention_mask=F.pad(torch.ones_like(row), (2, 0))).logits, model(row.flip(1)).logits)


@pytest.mark.parametrize("pad", [None, PAD])
def test_without_a_mask_the_padding_id_decides_if_there_is_one(pad: int | None) -> None:
    model = classifier("mamba2", pad_token_id=pad)
    ids = torch.cat([ROWS[0], torch.full((1, 3), PAD)], dim=1)
    ids[0, 4] = PAD  # not the last one
    end = -1 if pad is None else ROWS[0].shape[1] - 1
    with torch.no_grad():
        state = model.backbone(ids).last_hidden_state[:, end]
        close(model(ids).logits, model.score(state))
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        close(embedded, model.score(model.backbone(ids).last_hidden_state[:, -1]))
        assert model(torch.full((1, 3), PAD)).logits.isfinite().all()


def test_a_row_of_padding_alone_disturbs_nothing(name: str) -> None:
    model = classifier(name)
    ids, mask = padded("left")
    mask[1] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    close(logits[[0, 2, 3]], torch.stack(by_itself(model))[[0, 2, 3]])


# Losses

TARGETS = {
    "one-number": (1, torch.tensor([0.5, -1.0, 2.0, 0.0]), None, "regression"),
    "numbers": (3, torch.arange(12.0).view(4, 3), "regression", "regression"),
    "one-class": (3, torch.tensor([2, 0, 1, 1]), None, "single_label_classification"),
    "classes": (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]]), None, "multi_label_classification"),
}


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_of_rows(case: str, dtype: torch.dtype) -> None:
    count, labels, problem, kind = TARGETS[case]
    model = classifier("mamba2", num_labels=count, problem_type=problem).to(dtype)
    ids, mask = padded("left")
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=labels)
        logits = output.logits.float()
        expected = {
            "regression": lambda: F.mse_loss(logits.squeeze(-1), labels),
            "single_label_classification": lambda: F.cross_entropy(logits, labels),
            "multi_label_classification": lambda: F.binary_cross_entropy_with_logits(logits, labels),
        }[kind]()
        as_tuple = model(ids, attention_mask=mask, labels=labels, return_dict=False)
    assert model.config.problem_type == kind
    assert output.logits.shape == (4, count) and output.logits.dtype == dtype and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


@pytest.mark.parametrize("count", [1, 3])
def test_labels_are_as_many_as_rows_or_packed_documents(count: int) -> None:
    """A regression would broadcast one label over all documents."""
    model = classifier("mamba2", num_labels=count, problem_type="regression")
    packed = {"input_ids": draw_ids(1, 9), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]], dtype=torch.int32)}
    for arguments, documents in (({"input_ids": draw_ids(3, 5)}, 3), (packed, 3)):
        for wrong in (1, documents + 1):
            with pytest.raises(ValueError, match=rf"`labels` must have one entry for each of the 3 .*\({wrong},"):
                model(**arguments, labels=torch.zeros(wrong, count))
        assert model(**arguments, labels=torch.zeros(documents, count)).loss.isfinite()


def test_loss_of_tokens(name: str) -> None:
    model = tagger(name)
    ids, mask = padded("right")
    labels = (ids % LABELS).masked_fill(mask == 0, -100)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=labels)
        close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
        total = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        close(model(ids, attention_mask=mask, labels=labels, num_items_in_batch=50).loss, total / 50)
        as_tuple = model(ids, attention_mask=mask, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    assert model.score.bias is not None


@pytest.mark.parametrize("head", ["rows", "tokens"])
def test_gradients_reach_every_parameter(name: str, head: str) -> None:
    model = (classifier if head == "rows" else tagger)(name).train()
    ids = draw_ids(3, 13)
    labels = torch.tensor([2, 0, 1]) if head == "rows" else ids % LABELS
    output = model(ids, labels=labels)
    assert getattr(output, CACHE_FIELD, None) is None
    output.loss.backward()
    last = f"backbone.layers.{model.config.num_hidden_layers - 1}.mixer.reverse."
    for key, parameter in model.named_parameters():
        # The last scan ahead starts at the row's last token, whose score it gives: no decay, no rotation of its own.
        unused = head == "rows" and key == f"{last}A_log"
        # The streams of a mixer meet behind the last block, and the second one has seen nothing before a row's end.
        if head == "rows" and name.startswith("mixer") and ".reverse" in key:
            unused = not key.endswith((".reverse.bias", ".out_proj.weight", ".out_proj.bias"))
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() != unused, key


@pytest.mark.parametrize("head", ["rows", "tokens"])
def test_accumulated_gradients_are_those_of_the_whole_batch(head: str, tmp_path: Path) -> None:
    """By transformers' Trainer, which divides a loss by the number of batches only if the model does not."""
    norms = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = (classifier if head == "rows" else tagger)("mamba2")
        rows = [{"input_ids": row[0]} for row in ROWS]
        for i, row in enumerate(rows):
            row["labels"] = torch.tensor(i % LABELS) if head == "rows" else row["input_ids"] % LABELS
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and norms[0] > 0.01


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True, padding_value=PAD)
    mask = pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    labels = [row["labels"] for row in rows]
    stacked = torch.stack(labels) if labels[0].dim() == 0 else pad(labels, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": stacked}


@pytest.mark.parametrize("name", ["mamba2", "all-four", "mamba-encoder", "mamba2-encoder"])
def test_lora_with_a_trained_score(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    model = get_peft_model(classifier(name), config).train()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("score.modules_to_save" in key for key in trained) and not any("score.lora" in key for key in trained)
    ids, mask = padded("left")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(name), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# Loading

HEADS = {
    AutoModelForSequenceClassification: {"score.weight"},
    AutoModelForTokenClassification: {"score.weight", "score.bias"},
}


@pytest.mark.parametrize("head", HEADS, ids=["rows", "tokens"])
@pytest.mark.parametrize("source", ["causal", "backbone"])
def test_a_checkpoint_without_the_head_keeps_its_weights(name: str, source: str, head: Any, tmp_path: Path) -> None:
    backbone = make_head(AutoModel, name) if name in ENCODERS else make_model(name).backbone
    if source == "backbone":
        backbone.save_pretrained(tmp_path)
    elif name in ENCODERS:
        make_head(AutoModelForMaskedLM, name, tie_word_embeddings=True).save_pretrained(tmp_path)
        backbone = AutoModelForMaskedLM.from_pretrained(tmp_path).backbone
    else:
        make_model(name).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, found = head.from_pretrained(tmp_path, num_labels=LABELS, output_loading_info=True)
    assert set(found["missing_keys"]) == HEADS[head] and not found["mismatched_keys"]
    assert set(found["unexpected_keys"]) <= {"lm_head.weight", "lm_head.bias"}
    state = model.backbone.state_dict()
    for key, value in backbone.state_dict().items():
        assert torch.equal(state[key], value), key
    assert model.score.weight.shape == (LABELS, model.config.hidden_size)
    spread = model.config.initializer_range
    if model.config.model_type == "masked_mixer":  # linear layers have their own there
        spread = (2 / model.config.hidden_size) ** 0.5
    assert 0 < model.score.weight.std() < 3 * spread


def test_a_saved_head_loads_bit_equal_and_so_does_its_backbone(name: str, tmp_path: Path) -> None:
    model = classifier(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.num_labels == LABELS
    ids = draw_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        states = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
        assert torch.equal(states, model.backbone(ids).last_hidden_state)


EXPORTED = {
    "rows-hybrid": (AutoModelForSequenceClassification, "all-four"),
    "rows": (AutoModelForSequenceClassification, "mamba2"),
    "tokens": (AutoModelForTokenClassification, "mamba2-groups"),
    "masked": (AutoModelForMaskedLM, "mamba2-encoder"),
    "masked-mamba1": (AutoModelForMaskedLM, "mamba-options-encoder"),
    "rows-encoder": (AutoModelForSequenceClassification, "mamba2-groups-encoder"),
}
USER = """
import json, sys
sys.modules["ssm_zoo"] = None  # importing it raises
import torch, transformers
from safetensors.torch import save_file

torch.set_num_threads(1)
jobs, tensors, names = json.loads(sys.argv[1]), {}, {}
for name, (auto, folder) in jobs.items():
    for attempt in ("loaded", "saved"):
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            tensors[f"{name}/{attempt}"] = model(torch.arange(1, 21).view(2, 10)).logits
        folder = folder + "-again"
        model.save_pretrained(folder)
    names[name] = [type(model).__name__, type(model).__module__]
save_file(tensors, sys.argv[2])
print(json.dumps(names))
"""


def test_exported_heads_load_and_save_where_the_package_is_not(tmp_path: Path) -> None:
    models = {key: make_head(head, name, num_labels=LABELS) for key, (head, name) in EXPORTED.items()}
    for key, model in models.items():
        model.save_pretrained(tmp_path / key)
        card = (tmp_path / key / "README.md").read_text()
        assert f"{EXPORTED[key][0].__name__}.from_pretrained(" in card
    jobs = {key: (head.__name__, str(tmp_path / key)) for key, (head, _) in EXPORTED.items()}
    done = subprocess.run(
        [sys.executable, "-P", "-c", USER, json.dumps(jobs), str(tmp_path / "logits")],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    names, tensors = json.loads(done.stdout.splitlines()[-1]), load_file(tmp_path / "logits")
    ids = torch.arange(1, 21).view(2, 10)
    for key, model in models.items():
        assert names[key][0] == type(model).__name__ and names[key][1].startswith("transformers_modules.")
        with torch.no_grad():
            expected = model(ids).logits
        assert torch.equal(tensors[f"{key}/loaded"], expected), key
        assert torch.equal(tensors[f"{key}/saved"], expected), key


def test_the_card_of_a_subclass_names_the_auto_class_of_its_base(tmp_path: Path) -> None:
    model = tagger("mamba2")
    model.__class__ = type("Mine", (type(model),), {"__module__": type(model).__module__})
    model.save_pretrained(tmp_path)
    assert "AutoModelForTokenClassification.from_pretrained(" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_makes_the_heads_it_names(name: str) -> None:
    for auto_class, expected in type(make_model(name)).auto_classes.items():
        if auto_class != "AutoModelForMaskedLM":  # for encoders only
            assert type(getattr(transformers, auto_class).from_config(make_config(name))).__name__ == expected
