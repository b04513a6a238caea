"""Every command refuses a source whose weights are not its model's, are not finite, or need code that nobody trusts."""

import json
import logging
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_llama, save_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, LlamaForCausalLM
from typer.testing import CliRunner, Result

from ssm_zoo.cli.main import app
from ssm_zoo.conversion.load_model import load_model, load_tokenizer
from ssm_zoo.distill.fetch import load_gguf
from ssm_zoo.harness.json_files import json_text

RECIPE = """
teacher: source
student: {layers: odd, half_life: [1, 8]}
data: {train: text.txt, heldout: text.txt, sequence_length: 16}
stages:
- {name: align, objective: hidden_state_alignment, tokens: 64, batch_size: 2, learning_rate: 1.0e-3}
evaluation: {tokens: 64, prompts: [abc], max_new_tokens: 4, final: false}
"""
TEXTS = ["--train", "text.txt", "--heldout", "text.txt", "--row-tokens", "32", "--steps", "1"]
PAIRS = ["--train", "pairs.jsonl", "--heldout", "pairs.jsonl", "--batch-size", "3", "--steps", "1", "--rank", "2"]
COMMANDS: dict[str, list[str]] = {
    "distill": ["distill", "recipe.yaml", "out"],
    "finetune-lm": ["finetune", "lm", "source", "out", *TEXTS, "--rank", "2"],
    "finetune-embed": ["finetune", "embed", "source", "out", *PAIRS],
    "generate": ["generate", "source", "abc", "--max-new-tokens", "2"],
    "retrieval": ["evaluate", "retrieval", "source", "beir", "--pooling", "mean", "--pools", "2", "--output", "out"],
    "inversion": ["evaluate", "inversion", "source", "text.txt", "--steps", "1", "--tokens", "4", "--output", "out"],
    "export": ["export", "source", "out", "--no-verify"],
}
TRAIN = ["train", "model.yaml", "out", *TEXTS, "--tokenizer", "source"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo model, a Llama, a recipe, texts, pairs and a retrieval task."""
    folder = tmp_path_factory.mktemp("inputs")
    make_model("all-four").save_pretrained(folder / "zoo")
    save_tokenizer(folder / "zoo")
    save_llama(folder / "llama")
    letters = random.Random(0)
    (folder / "text.txt").write_text(" ".join("".join(letters.choices("abcdefgh", k=5)) for _ in range(100)))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "model.yaml").write_text(
        "model_type: zoo_mamba2\nhidden_size: 16\nnum_hidden_layers: 1\nhead_dim: 8\nstate_size: 8\n"
    )
    rows = [{"anchor": f"a{letter}", "positive": f"b {letter}"} for letter in "abcdef"]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "beir" / "qrels").mkdir(parents=True)
    for name, column in (("queries", "anchor"), ("corpus", "positive")):
        texts = [json.dumps({"_id": f"{name}{index}", "text": row[column]}) for index, row in enumerate(rows)]
        (folder / "beir" / f"{name}.jsonl").write_text("\n".join(texts))
    judged = [f"queries{index}\tcorpus{index}\t1" for index in range(len(rows))]
    (folder / "beir" / "qrels" / "test.tsv").write_text("\n".join(["query\tcorpus\tscore", *judged]))
    return folder


@pytest.fixture
def work(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(inputs, tmp_path / "work"))
    monkeypatch.chdir(folder)
    return folder


def test_loading_a_whole_model_says_nothing(inputs: Path) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        load_model(inputs / "zoo", AutoModelForCausalLM, field="model", dtype="auto")
        # A head that the checkpoint lacks would be listed in transformers' table; here the message is ours alone.
        with pytest.raises(ValueError, match="model: "):
            load_model(inputs / "zoo", AutoModelForTokenClassification, field="model", dtype="auto")
    finally:
        logger.removeHandler(handler)
    assert records == []


def use(work: Path, command: str) -> Path:
    """The folder `source` of a command: a teacher is a Llama, all others are models of the zoo."""
    return Path(shutil.copytree(work / ("llama" if command == "distill" else "zoo"), work / "source"))


def invoke(line: list[str]) -> Result:
    return CliRunner().invoke(app, line, input="y\n" * 20)


def refused(line: list[str], *parts: str) -> None:
    """In one line that names the source, with nothing measured, written or asked."""
    result = invoke(line)
    assert result.exit_code == 2, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ssm-zoo: ")
    for part in ("source", *parts):
        assert part in last, last
    assert not Path("out").exists()
    assert "[y/N]" not in result.stdout + result.stderr


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change_file(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    return change_file


def norm(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if "norm" in name and name.endswith("weight"))


def to_pickle(source: Path) -> None:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()


def to_shards_with_one_weight_twice(source: Path) -> None:
    """The index names the first shard for it; transformers would load the other value."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    twice = norm(tensors)
    names = {key: f"model-0000{1 + (key != twice)}-of-00002.safetensors" for key in tensors}
    for name in sorted(set(names.values())):
        shard = {key: tensors[key] for key in tensors if names[key] == name} | {
            twice: tensors[twice] + ("00002-" in name)
        }
        save_file(shard, source / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def fewer_layers(source: Path) -> None:
    """The configuration of a model with the first block alone."""
    values = json.loads((source / "config.json").read_text())
    values["num_hidden_layers"] = 1
    for key in ("mixer_types", "mlp_types", "layer_types"):
        if values.get(key):
            values[key] = values[key][:1]
    (source / "config.json").write_text(json.dumps(values))


CHANGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing": (change_tensors(lambda tensors: tensors.pop(norm(tensors))), ("1 missing weights: ", "norm")),
    "empty": (lambda source: save_file({}, source / "model.safetensors", metadata={"format": "pt"}), ("missing w",)),
    "fewer-layers": (fewer_layers, ("unexpected weights", "layers.1.")),
    "another-shape": (
        change_tensors(lambda tensors: tensors.update({norm(tensors): torch.ones(3)})),
        ("1 mismatched weights", "norm"),
    ),
    "nan": (
        change_tensors(lambda tensors: tensors[norm(tensors)][:2].fill_(float("nan"))),
        ("2 of the weights are not finite, first: ", "norm"),
    ),
    "infinity": (
        change_tensors(lambda tensors: tensors[norm(tensors)][:1].fill_(float("inf"))),
        ("1 of the weights are not finite, first: ", "norm"),
    ),
    "cut-off": (lambda source: (source / "model.safetensors").write_bytes(b""), ("safetensors",)),
    "pickle": (to_pickle, ("safetensors",)),
    "two-shards": (to_shards_with_one_weight_twice, ("is in two shards, ", "norm")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_not_the_models_are_refused(work: Path, command: str, change: str) -> None:
    if command in ("finetune-embed", "retrieval"):
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    spoil, parts = CHANGES[change]
    spoil(use(work, command))
    refused(COMMANDS[command], *parts)


@pytest.mark.parametrize("command", [*COMMANDS, "train"])
def test_code_of_a_tokenizer_is_run_only_when_trusted(work: Path, command: str) -> None:
    if command in ("finetune-embed", "retrieval"):
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    source = use(work, command)
    (source / "hostile.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Hostile:\n    pass\n")
    values = json.loads((source / "tokenizer_config.json").read_text())
    values |= {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["hostile.Hostile", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(values))
    # A model type of which transformers knows a tokenizer would be loaded without the code.
    known = command == "distill"
    result = invoke(TRAIN if command == "train" else COMMANDS[command])
    assert not (work / "ran").exists()
    assert "[y/N]" not in result.stdout + result.stderr
    if command != "export" and not known:
        assert result.exit_code == 2
        assert "brings code of its own" in result.stderr and "--trust-remote-code" in result.stderr


TAKING_A_MODEL = {
    **COMMANDS,
    "convert": ["convert", "source", "out"],
    "train": ["train", "source", "out", *TEXTS, "--tokenizer", "llama"],
}


@pytest.mark.parametrize("command", TAKING_A_MODEL)
def test_code_of_a_model_is_never_run_unasked(work: Path, command: str) -> None:
    """Of the configuration and of the model, where transformers knows neither."""
    if command in ("finetune-embed", "retrieval"):
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    source = use(work, command)
    (source / "hostile.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Hostile:\n    pass\n")
    values = json.loads((source / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    values |= {"model_type": "hostile", "auto_map": dict.fromkeys(names, "hostile.Hostile")}
    (source / "config.json").write_text(json.dumps(values))
    result = invoke(TAKING_A_MODEL[command])
    assert result.exit_code == 2, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    # Some load no model of another type, trusted or not, and say that.
    assert re.search("brings code of its own.*--trust-remote-code|model_type.*'hostile'", result.stderr), result.stderr
    assert "[y/N]" not in result.stdout + result.stderr
    assert not (work / "ran").exists() and not (work / "out").exists()


def test_an_embedder_without_a_head_and_one_with_a_head_left_out_are_whole(work: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    use(work, "retrieval")
    assert invoke(COMMANDS["retrieval"]).exit_code == 0
    shutil.rmtree(work / "source")
    make_model("all-four").backbone.save_pretrained(work / "source")
    save_tokenizer(work / "source")
    assert invoke(COMMANDS["retrieval"]).exit_code == 0


def test_a_saved_embedder_is_checked_like_a_plain_model(work: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from ssm_zoo.evaluation.embedder import make_embedder

    make_embedder(str(work / "zoo"), pooling="mean", device="cpu").save_pretrained(str(work / "source"))
    line = ["evaluate", "retrieval", "source", "beir", "--pools", "2"]
    assert invoke(line).exit_code == 0
    change_tensors(lambda tensors: tensors.pop(norm(tensors)))(work / "source")
    refused(line, "1 missing weights")


def test_weights_that_are_tied_are_not_missing(work: Path) -> None:
    make_model("mamba2").save_pretrained(work / "tied")
    assert "lm_head.weight" not in load_file(work / "tied" / "model.safetensors")
    model: Any = load_model(work / "tied", AutoModelForCausalLM)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_an_adapter_is_put_on_its_base_strictly(work: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(work / "llama")
    adapted: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(work / "source")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        loaded: Any = load_model(work / "source", AutoModelForCausalLM)
        assert torch.equal(loaded(ids).logits, adapted.eval()(ids).logits)
    file = work / "source" / "adapter_model.safetensors"
    whole = load_file(file)
    first = sorted(whole)[0]
    save_file({key: tensor for key, tensor in whole.items() if key != first}, file)
    with pytest.raises(ValueError, match=rf"source has 1 missing weights: {first}"):
        load_model(work / "source", AutoModelForCausalLM)
    save_file({**whole, first: whole[first].fill_(float("nan"))}, file)
    with pytest.raises(ValueError, match=rf"of the weights are not finite, first: {first}"):
        load_model(work / "source", AutoModelForCausalLM)
    save_file(whole, file)
    change_tensors(lambda tensors: tensors.pop("model.norm.weight"))(work / "llama")
    with pytest.raises(ValueError, match=r"its base model: .*llama has 1 missing weights: model\.norm\.weight"):
        load_model(work / "source", AutoModelForCausalLM)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1, 2]), "activated LoRA"),
    ],
)
def test_an_adapter_that_is_not_in_the_layers_is_not_dropped(work: Path, config: PeftConfig, kind: str) -> None:
    base = LlamaForCausalLM.from_pretrained(work / "llama")
    get_peft_model(base, config).save_pretrained(work / "source")
    with pytest.raises(ValueError, match=rf"source: adapter_config\.json must be that of .* LoRA, got {kind}\."):
        load_model(work / "source", AutoModelForCausalLM)


def test_logits_that_are_not_finite_are_not_generated_from(work: Path) -> None:
    source = use(work, "generate")
    change_tensors(lambda tensors: tensors["lm_head.weight"].fill_(3e38))(source)
    refused([*COMMANDS["generate"]], "logits that are not finite")


def test_a_gguf_teacher_lacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    write_gguf(tmp_path / "tiny.gguf")
    load_gguf(tmp_path / "tiny.gguf")
    found = LlamaForCausalLM.from_pretrained.__func__

    def lacking(cls: Any, *arguments: Any, **options: Any) -> Any:
        model, info = found(cls, *arguments, **options)
        return model, {**info, "missing_keys": {"model.norm.weight"}}

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(lacking))
    with pytest.raises(ValueError, match=r"teacher: tiny\.gguf: .* has 1 missing weights: model\.norm\.weight"):
        load_gguf(tmp_path / "tiny.gguf")


def test_a_question_is_never_asked_whoever_forgets_to_decide(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from ssm_zoo.conversion.load_model import quiet_loading

    (work / "zoo" / "hostile.py").write_text("raise SystemExit('ran')")
    values = json.loads((work / "zoo" / "tokenizer_config.json").read_text())
    values |= {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["hostile.Hostile", None]}}
    (work / "zoo" / "tokenizer_config.json").write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="brings code of its own"):
        load_tokenizer(work / "zoo")
    with pytest.raises(ValueError), quiet_loading("zoo", "model"):
        AutoTokenizer.from_pretrained(str(work / "zoo"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_json_is_written_with_a_number_that_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"report\.json"):
        json_text({"loss": [value]}, "report.json")
