"""A training from scratch from settings to folder: loss, resumption, vocabulary, selective layers, cards, mistakes."""

import functools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import make_config, make_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_checkpoints import save_llama, save_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast
from two_processes import launch

from ssm_zoo.conversion.export import verify_export
from ssm_zoo.conversion.formats.state_spaces import byte_tokenizer
from ssm_zoo.modeling import ZooMamba2ForCausalLM
from ssm_zoo.modeling.families import PRESETS
from ssm_zoo.modeling.outputs import add_aux_loss
from ssm_zoo.training.from_scratch import train_from_scratch
from ssm_zoo.training.from_scratch_settings import RECIPES, FromScratchSettings, parse_from_scratch
from ssm_zoo.training.new_model import END_OF_TEXT, changed_keys, entries_of, learn_vocabulary, resolve_configuration

TEXT = Path(__file__).resolve().parents[2] / "distill" / "data" / "wikitext2"
MAMBA2 = {
    "model_type": "zoo_mamba2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "state_size": 8,
}
HYBRID = {
    "model_type": "zoo_hybrid",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "mixer_types": ["mamba2", "full_attention"],
    "num_attention_heads": 2,
    "mamba_head_dim": 8,
    "state_size": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little real text of one paragraph a document, and a tokenizer of letters."""
    made = tmp_path_factory.mktemp("train")
    for split, paragraphs in (("train", 12), ("heldout", 4)):
        parts = (TEXT / f"{split}.txt").read_text(encoding="utf-8").lower().split("\n\n")
        documents = [" ".join(re.sub(r"[^a-z .,]", "", part).split())[:120] for part in parts]
        kept = [part for part in documents if len(part) > 60][:paragraphs]
        (made / f"{split}.txt").write_text("\n\n".join(kept), encoding="utf-8")
    save_tokenizer(made / "letters")
    (made / "model.yaml").write_text(yaml.safe_dump(MAMBA2))
    return made


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "config": MAMBA2,
        "tokenizer": "bytes",
        "train": [str(folder / "train.txt")],
        "heldout": [str(folder / "heldout.txt")],
        "separator": "\n\n",
        "row_tokens": 128,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "steps": 10,
        "learning_rate": 2e-2,
        "evaluate_every": 3,
        "checkpoint_every": 4,
        **changes,
    }


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run of a model in a file, with a vocabulary that it learnt."""
    changed = values(folder, config=str(folder / "model.yaml"), tokenizer=None, train_tokenizer=300)
    train_from_scratch(parse_from_scratch(changed), folder / "run", command="ssm-zoo train model.yaml run")
    return folder / "run"


@pytest.fixture
def selective(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes Mamba-2 a model with two selective layers; what each of its forwards said of them."""
    forwards: list[dict[str, Any]] = []
    plain = ZooMamba2ForCausalLM.forward

    class Output(CausalLMOutputWithPast):
        aux_loss: Tensor | None = None
        selection_rate: tuple[Tensor, ...] | None = None

    @functools.wraps(plain)  # the Trainer reads its signature
    def forward(self: Any, *arguments: Any, **options: Any) -> Output:
        outputs = plain(self, *arguments, **options)
        # It depends on a weight, so that its gradient counts.
        auxiliary = 1.0 + self.backbone.norm_f.weight.square().mean()
        number = len(forwards) % 2
        rates = torch.tensor(0.25 + 0.5 * number), torch.tensor(0.5)
        forwards.append({"loss": outputs.loss.item(), "aux": auxiliary.item(), "training": self.training})
        found = Output(loss=outputs.loss, logits=outputs.logits)
        found.aux_loss, found.selection_rate = auxiliary, rates
        if self.training:
            items = options.get("num_items_in_batch")
            found.loss = add_aux_loss(outputs.loss, found, self.config, options["labels"][:, 1:], items)
        return found

    monkeypatch.setattr(ZooMamba2ForCausalLM, "forward", forward)
    monkeypatch.setattr(ZooMamba2ForCausalLM.config_class, "router_aux_loss_coef", 0.5, raising=False)
    return forwards


def read_report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


# Training


def test_the_loss_falls_on_real_text(run: Path) -> None:
    report = read_report(run)
    before, *on_the_way, after = report["evaluations"]
    assert abs(before["loss"] - math.log(304)) < 0.1  # as a model that knows nothing
    assert after["loss"] < before["loss"] - 0.3
    assert [(e["name"], e["step"]) for e in on_the_way] == [("step 3", 3), ("step 6", 6), ("step 9", 9)]
    assert before["loss"] > on_the_way[0]["loss"] > after["loss"]
    assert (before["step"], after["step"]) == (0, report["steps"]) == (0, 10)
    points = report["history"]
    assert all({"step", "tokens", "loss", "grad_norm", "learning_rate", "seconds"} == point.keys() for point in points)
    assert [point["step"] for point in points] == list(range(1, 11))
    tokens = [point["tokens"] for point in points]
    assert tokens == sorted(tokens) and tokens[-1] == report["tokens"]
    # Ten steps of four rows are this many passes over the text.
    passes = 40 / report["data"]["train"]["rows"]
    assert report["tokens"] == pytest.approx(passes * report["data"]["train"]["targets"], rel=0.15)
    assert report["parameters"]["trained"] == report["parameters"]["all"]
    assert report["tokenizer"] == {"source": None, "entries": 300}


def test_the_folder_is_a_model_that_loads_without_the_package(run: Path) -> None:
    assert verify_export(run / "model")["bit_equal"]
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.decode(tokenizer("so it goes").input_ids) == "so it goes"
    config = AutoModelForCausalLM.from_pretrained(run / "model").config
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id) == (304, tokenizer.eos_token_id, None)
    assert config.use_cache


@pytest.mark.parametrize("config", [MAMBA2, HYBRID], ids=["mamba2", "hybrid"])
def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 7, and in the middle of the checkpoint of step 8."""
    settings = parse_from_scratch(values(folder, config=config))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_from_scratch(settings, whole)
    forwards, training_step = [], Trainer.training_step

    def counting(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if len(forwards) == 2 * 6:
            raise KeyboardInterrupt
        forwards.append(None)
        return training_step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", counting)
        with pytest.raises(KeyboardInterrupt):
            train_from_scratch(settings, killed)
    assert not (killed / "report.json").exists()
    torn = shutil.copytree(killed / "checkpoints" / "checkpoint-4", killed / "checkpoints" / "checkpoint-8")
    (torn / "trainer_state.json").unlink()
    train_from_scratch(settings, killed)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    reports = [read_report(path) for path in (killed, whole)]
    curves = [[{**point, "seconds": None} for point in report["history"]] for report in reports]
    assert curves[0] == curves[1]
    assert reports[0]["evaluations"] == reports[1]["evaluations"]


def test_held_out_losses_on_the_way_change_nothing(folder: Path, tmp_path: Path) -> None:
    for every in (1, None):
        train_from_scratch(parse_from_scratch(values(folder, steps=3, evaluate_every=every)), tmp_path / str(every))
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("1", "None"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [len(read_report(tmp_path / name)["evaluations"]) for name in ("1", "None")] == [4, 2]


def test_a_run_of_another_configuration_is_refused(folder: Path, run: Path) -> None:
    changed = values(folder, config=str(folder / "model.yaml"), tokenizer=None, train_tokenizer=300)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"config\.state_size: 8 there, 16 here"):
        train_from_scratch(parse_from_scratch({**changed, "overrides": ["state_size=16"]}), run)
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        train_from_scratch(parse_from_scratch({**changed, "seed": 1}), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False, "recipe": "taipan", "warmup": 2, "gradient_checkpointing": True},
        {"dtype": "bfloat16", "tokenizer": "letters", "config": HYBRID},
    ],
    ids=["padded-taipan-checkpointing", "bfloat16-letters-hybrid"],
)
def test_other_ways_learn_too(
    folder: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    report = train_from_scratch(parse_from_scratch(values(folder, **changes)), tmp_path / "run")
    assert report["evaluations"][-1]["loss"] < report["evaluations"][0]["loss"] - 0.1
    assert report["compute_dtype"] == changes.get("dtype", "float32")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_learning_rate_rises_and_falls_along_a_cosine(folder: Path, tmp_path: Path) -> None:
    changed = values(folder, steps=9, warmup=3, learning_rate=1e-2, final_learning_rate=1e-3, evaluate_every=None)
    report = train_from_scratch(parse_from_scratch(changed), tmp_path / "run")
    rates = [point["learning_rate"] for point in report["history"]]
    rising = [0, 1e-2 / 3, 2e-2 / 3]
    falling = [1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert rates == pytest.approx([*rising, *falling])


def test_the_recipes_are_the_papers() -> None:
    given = {"config": "mamba-130m", "tokenizer": "bytes", "train": ["a.txt"], "heldout": ["b.txt"]}
    mamba = parse_from_scratch(given).optimisation(1000)
    assert (mamba["learning_rate"], mamba["lr_scheduler_kwargs"], mamba["warmup_steps"]) == (
        3e-3,
        {"min_lr_rate": 1e-5 / 3e-3},
        50,
    )
    assert (mamba["adam_beta1"], mamba["adam_beta2"], mamba["weight_decay"], mamba["max_grad_norm"]) == (
        *(0.9, 0.95),
        *(0.1, 1.0),
    )
    taipan = parse_from_scratch({**given, "recipe": "taipan", "weight_decay": 0.5}).optimisation(4000)
    assert (taipan["learning_rate"], taipan["warmup_steps"], taipan["weight_decay"]) == (5e-4, 2000, 0.5)
    assert all(recipe.keys() == RECIPES["mamba"].keys() for recipe in RECIPES.values())
    assert all(parse_from_scratch({**given, "recipe": recipe}).recipe == recipe for recipe in RECIPES)


@pytest.mark.slow
def test_processes_share_a_step(folder: Path, tmp_path: Path) -> None:
    """Two processes of two rows each do what one process of four rows does."""
    changed = values(folder, gradient_accumulation=1, evaluate_every=None)
    alone = train_from_scratch(parse_from_scratch({**changed, "batch_size": 4}), tmp_path / "alone")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(MAMBA2))
    command = ["-m", "ssm_zoo.cli.main", "train", str(tmp_path / "model.yaml"), str(tmp_path / "two")]
    command += ["--train", changed["train"][0], "--heldout", changed["heldout"][0], "--tokenizer", "bytes"]
    command += ["--separator", r"\n\n", "--row-tokens", "128", "--batch-size", "2", "--steps", "10"]
    command += ["--learning-rate", "2e-2", "--checkpoint-every", "4"]
    printed = launch(*command)
    report = read_report(tmp_path / "two")
    assert report["processes"] == 2
    assert [p["tokens"] for p in report["history"]] == [p["tokens"] for p in alone["history"]]
    assert [p["loss"] for p in report["history"]] == pytest.approx([p["loss"] for p in alone["history"]], rel=1e-4)
    assert report["evaluations"][-1]["loss"] == pytest.approx(alone["evaluations"][-1]["loss"], rel=1e-4)
    assert printed.count("held-out loss:") == 1


# Selective layers


def test_the_auxiliary_loss_is_told_from_the_language_models(
    folder: Path, tmp_path: Path, selective: list[dict[str, Any]]
) -> None:
    changed = values(folder, steps=4, evaluate_every=None)
    report = train_from_scratch(parse_from_scratch(changed), tmp_path / "run")
    training = [forward for forward in selective if forward["training"]]
    assert len(training) == 2 * 4
    for step, point in enumerate(report["history"]):
        first, second = training[2 * step : 2 * step + 2]
        # Each forward's loss is its share of the step's mean; the auxiliary loss is a mean over forwards.
        assert point["loss"] == pytest.approx(first["loss"] + second["loss"], rel=1e-5)
        assert point["aux_loss"] == pytest.approx((first["aux"] + second["aux"]) / 2)
        assert point["selection_rate"] == pytest.approx([0.5, 0.5])
    evaluations = report["evaluations"]
    evaluated = sum(forward["loss"] for forward in selective if not forward["training"])  # sums over the targets
    assert sum(found["loss"] * found["tokens"] for found in evaluations) == pytest.approx(evaluated, rel=1e-5)
    for evaluation in (evaluations[0], evaluations[-1]):
        assert evaluation["aux_loss"] > 1
        assert 0.25 <= evaluation["selection_rate"][0] <= 0.75
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "the selective layers select, in order: " in card
    # The figure has a panel for them, and is as high as wide.
    size = (tmp_path / "run" / "plots" / "loss.png").read_bytes()[16:24]
    assert size[:4] == size[4:]


def test_the_auxiliary_loss_counts_once_in_a_step(
    folder: Path, tmp_path: Path, selective: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward of four rows and two of two rows have the same gradient, that of the auxiliary loss with it."""
    norms = {}
    for rows, forwards in ((4, 1), (2, 2)):
        changed = values(folder, steps=1, batch_size=rows, gradient_accumulation=forwards, evaluate_every=None)
        report = train_from_scratch(parse_from_scratch(changed), tmp_path / f"{rows}")
        norms[rows] = report["history"][0]["grad_norm"]
    assert norms[2] == pytest.approx(norms[4], rel=1e-4)
    monkeypatch.setattr(ZooMamba2ForCausalLM.config_class, "router_aux_loss_coef", 0.0)
    report = train_from_scratch(parse_from_scratch(changed), tmp_path / "without")
    assert abs(report["history"][0]["grad_norm"] - norms[2]) > 1e-3


# Vocabulary and configuration


def test_a_vocabulary_is_learnt_the_same_every_time() -> None:
    texts = [path.read_text(encoding="utf-8")[:20_000] for path in sorted(TEXT.glob("*.txt"))]
    first, second = (learn_vocabulary(texts, 500, progress=False) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first("the same merges").input_ids == second("the same merges").input_ids
    assert (entries_of(first), first.eos_token) == (500, END_OF_TEXT)
    unseen = "\u00e9\u4e16\U0001f40d\t\n  x"
    assert first.decode(first(unseen).input_ids) == unseen


def test_the_vocabulary_of_the_configuration(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    learnt = learn_vocabulary(["abab abab"], 257, progress=False)
    assert resolve_configuration(MAMBA2, [], tokenizer).vocab_size == 256
    assert resolve_configuration(MAMBA2, [], learnt).vocab_size == 264
    assert resolve_configuration(MAMBA2, ["vocab_size=257"], learnt).vocab_size == 257
    make_model("mamba2", vocab_size=300).save_pretrained(tmp_path / "model")
    assert resolve_configuration(str(tmp_path / "model"), [], learnt).vocab_size == 300
    assert resolve_configuration(str(tmp_path / "model"), ["vocab_size=null"], learnt).vocab_size == 264
    config = resolve_configuration("mamba-130m", ["hidden_size=16", "num_hidden_layers=1"], learnt)
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id) == (264, 0, None, None)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("mt-encdec")])
def test_every_preset_is_a_configuration(name: str) -> None:
    kind, sizes = PRESETS[name]
    config = resolve_configuration(name, [], byte_tokenizer())
    assert type(config) is kind
    for key, value in sizes.items():
        found = getattr(config, key)
        if isinstance(value, dict):  # settings of a mixer, which are completed
            found = {setting: found[setting] for setting in value}
        assert found == value or key == "vocab_size"


def test_an_encoder_decoder_is_no_language_model_to_train() -> None:
    with pytest.raises(ValueError, match=r"`model_type` must be one of .*, got 'zoo_encdec'"):
        resolve_configuration("mt-encdec-mamba", [], byte_tokenizer())
    with pytest.raises(ValueError, match="must be a preset") as caught:
        resolve_configuration("mt-encdec", [], byte_tokenizer())
    assert "mt-mamba-mha" in str(caught.value) and "mt-encdec-mamba" not in str(caught.value)


@pytest.mark.parametrize("name", ["mamba", "mamba2-groups", "half-blocks", "all-four"])
def test_the_sizes_of_a_model_are_taken_and_written_down_whole(name: str, tmp_path: Path) -> None:
    make_model(name, vocab_size=256).save_pretrained(tmp_path / "model")
    taken = resolve_configuration(str(tmp_path / "model"), [], byte_tokenizer())
    written = changed_keys(taken)
    assert written == changed_keys(make_config(name, vocab_size=256))
    again = resolve_configuration(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(written)))), [], byte_tokenizer())
    assert again.to_dict() == taken.to_dict()


# Cards


def test_the_card_says_what_was_done(run: Path) -> None:
    report = read_report(run)
    card = ModelCard.load(run / "model" / "README.md")
    before, after = (f"{report['evaluations'][index]['loss']:,.4f}" for index in (0, -1))
    parts = [before, after, "zoo_mamba2", "trained from scratch", "`train.txt`", "12 documents", "recipe `mamba`"]
    parts += [f"predicted {report['tokens']:,} tokens", "learnt from the training text", "row_tokens: 128", "0.02"]
    parts += [report["versions"]["torch"], report["hardware"]["cpu"], "head_dim: 8", "ssm-zoo train model.yaml run"]
    parts += ["licence of the training text is not known to ssm-zoo"]
    for part in parts:
        assert part in card.text, part
    assert "license" not in card.data.to_dict()
    assert (run / "model" / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert str(run.parent) not in card.content
    assert str(run.parent) not in (run / "report.json").read_text()


# What is refused: a change of the settings, and what the message says.
BOUNDED = {"model_type": "masked_mixer", "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 8}
MISTAKES: list[Any] = [
    pytest.param({"config": "mamba-13m"}, "`config` must be a preset .*, got 'mamba-13m'. .* 'mamba-130m'", id="name"),
    pytest.param({"config": "nope.yaml"}, "config: there is no file 'nope.yaml'", id="no-file"),
    pytest.param(
        {"config": "list.yaml"}, "config: 'list.yaml' must have a mapping of keys to values, got list", id="list"
    ),
    pytest.param({"config": "torn.json"}, "torn.json is not valid YAML", id="torn"),
    pytest.param({"config": "llama"}, "`model_type` must be one of masked_mixer, taipan, .*, got 'llama'", id="llama"),
    pytest.param(
        {"config": {"hidden_size": 16}},
        "config: `model_type` must be one of masked_mixer, taipan, .*, got None",
        id="no-type",
    ),
    pytest.param(
        {"config": {"model_type": "x"}},
        "config: `model_type` must be one of masked_mixer, taipan, .*, got 'x'",
        id="type",
    ),
    pytest.param({"overrides": ["hiden_size=8"]}, "mamba2 has no key 'hiden_size'. Did you mean hidden_size", id="key"),
    pytest.param({"overrides": ["hidden_size"]}, "override must be .* dotted.key=value, got 'hidden_size'", id="set"),
    pytest.param({"overrides": ["head_dim=7"]}, r"config: num_heads \* head_dim", id="sizes"),
    pytest.param({"overrides": ["head_dim=x"]}, "config: Field 'head_dim' expected int", id="kind"),
    pytest.param(
        {"overrides": ["bidirectional=true"]}, "`bidirectional` must be False for a causal language model", id="both"
    ),
    pytest.param({"overrides": ["prefix_bidirectional=true"]}, "`prefix_bidirectional` must be False", id="prefix"),
    pytest.param({"config": BOUNDED, "streaming": True, "row_tokens": 9}, "at most 8 tokens, .*, got 9", id="stream"),
    pytest.param({"config": BOUNDED}, r"must have at most 8 tokens, .*, got \d+. Lower `row_tokens`", id="positions"),
    pytest.param(
        {"overrides": ["vocab_size=9"]}, "config: `vocab_size` must be at least 256, .*, got 9", id="vocabulary"
    ),
    pytest.param(
        {"overrides": ["eos_token_id=3"]}, "config: `eos_token_id` must be left out or .*, got 3", id="special"
    ),
    pytest.param(
        {"tokenizer": None},
        "^`tokenizer` or `train_tokenizer` must be given, and not both, got None and None$",
        id="no-tokenizer",
    ),
    pytest.param(
        {"train_tokenizer": 300}, "^`tokenizer` or .* and not both, got 'bytes' and 300$", id="two-tokenizers"
    ),
    pytest.param(
        {"tokenizer": None, "train_tokenizer": 256}, "^`train_tokenizer` must be at least 257, got 256$", id="few"
    ),
    pytest.param({"recipe": "adam"}, "^`recipe` must be 'mamba' or 'taipan', got 'adam'$", id="recipe"),
    pytest.param(
        {"recipe": "taipan"}, "^`warmup` must be shorter than the run, got 2000 steps in a run of 10", id="long-warmup"
    ),
    pytest.param({"warmup": 0.9}, "^`warmup` must be a whole number of steps, or a share .*, got 0.9$", id="share"),
    pytest.param({"warmup": "all"}, "^`warmup` must be a whole number of steps, .*, got 'all'$", id="warmup"),
    pytest.param({"betas": [0.9]}, "^`betas` must be a list of at least 2 items, got \\[0.9\\]$", id="betas"),
    pytest.param(
        {"learning_rate": 1e-6},
        "^`final_learning_rate` must be at most the peak, 1e-06, got 1e-05$",
        id="rising",
    ),
    pytest.param({"epochs": 1.0}, "^`steps` must be left out where `epochs` is given, got 10$", id="steps-and-epochs"),
    pytest.param({"evaluate_every": 0}, "^`evaluate_every` must be at least 1, got 0$", id="never"),
    pytest.param({"rows": 3}, "^`rows` is unknown", id="unknown"),
    pytest.param({"train": ["empty.txt"]}, "train: 'empty.txt' has no text", id="empty"),
    pytest.param({"heldout": ["nope.txt"]}, "heldout: there is no file 'nope.txt'", id="no-text"),
]


@pytest.fixture(scope="module")
def mistakes(folder: Path) -> Path:
    """A folder with files that are wrong, each in one way."""
    made = folder / "mistakes"
    made.mkdir()
    (made / "list.yaml").write_text("[1, 2]")
    (made / "torn.json").write_text('{"model_type": ')
    (made / "empty.txt").write_text(" \n\n ")
    save_llama(made / "llama")
    return made


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(
    folder: Path, mistakes: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mistakes)
    with pytest.raises(ValueError, match=message):
        train_from_scratch(parse_from_scratch(values(folder, **changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no run\.json of a run"):
        train_from_scratch(parse_from_scratch(values(folder)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+. Lower learning_rate"):
        train_from_scratch(parse_from_scratch(values(folder, learning_rate=1e30, weight_decay=0.0)), tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()


def test_settings_are_described() -> None:
    assert all((field.description or "").endswith(".") for field in FromScratchSettings.model_fields.values())
