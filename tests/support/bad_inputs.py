"""Bad inputs of every command: each file that a command reads and each of its options, spoiled in every way.

`save_inputs` makes a folder with all that the commands read; a `Case` is a command line in a copy of it, what is done
to the copy before, and what the message has to name.
"""

import json
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from embedding_pairs import write_pairs
from families import make_model
from report_example import example_report
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_llama, save_tokenizer, save_zoo_checkpoint
from transformers import MambaConfig, MambaForCausalLM

Spoil = Callable[[Path], object]

RECIPE = """\
teacher: llama
student: {layers: odd, half_life: [1, 8]}
data: {train: text.txt, heldout: text.txt, sequence_length: 16}
stages:
- {name: align, objective: hidden_state_alignment, tokens: 64, batch_size: 2, learning_rate: 1.0e-3}
evaluation: {tokens: 64, prompts: [abc], max_new_tokens: 4, final: false}
"""
MODEL = "model_type: zoo_mamba2\nhidden_size: 16\nnum_hidden_layers: 1\nhead_dim: 8\nstate_size: 8\n"

# Command lines that succeed as they stand.
DISTILL = "distill recipe.yaml out"
SELECT = "select llama --data text.txt --output out --tokens 16 --sequence-length 16 --distance 8 --method uniform"
TRAIN = "train model.yaml out --tokenizer tok --train text.txt --heldout text.txt --row-tokens 32 --steps 1"
LM = "finetune lm mamba2 out --train text.txt --heldout text.txt --row-tokens 32 --steps 1 --rank 2"
LM_JSONL = LM.replace("text.txt", "lines.jsonl")
EMBED = "finetune embed mamba2 out --train pairs.jsonl --heldout pairs.jsonl --batch-size 3 --steps 1 --rank 2"
RETRIEVAL = "evaluate retrieval mamba2 beir --pooling mean --pools 4 --output r.json"
INVERSION = "evaluate inversion mamba2 text.txt --tokens 4 --texts 2 --steps 2 --output r.json"
EXPORT = "export zoo out --no-verify"
CONVERT = "convert mamba out --no-verify"
GENERATE = "generate zoo abc --max-new-tokens 2"
SHOW = "show zoo @text.txt --max-tokens 5 --output out"
CARD = "card run"
REPORT = "report run --output out"
PUSH = "push zoo tester/model"
DEMO = "demo --output out --hub-stand-in stand_in.py"
WHOLE = (DISTILL, SELECT, TRAIN, LM, LM_JSONL, EMBED, RETRIEVAL, INVERSION, EXPORT, CONVERT, GENERATE, CARD, REPORT)
WHOLE += (SHOW,)


@dataclass(frozen=True)
class Case:
    """A command line that has to be refused.

    Attributes:
        name: of the test.
        line: what is typed after `ssm-zoo`, in a copy of the inputs.
        says: what the message matches.
        spoil: what is done to the copy before.
    """

    name: str
    line: str
    says: str
    spoil: Spoil = lambda _: None


def save_inputs(folder: Path) -> None:
    """Make what the commands read."""
    save_zoo_checkpoint(folder / "zoo")
    save_llama(folder / "llama")
    make_model("mamba2").save_pretrained(folder / "mamba2")
    save_tokenizer(folder / "mamba2")
    save_tokenizer(folder / "tok")
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, state_size=4)).save_pretrained(
        folder / "mamba"
    )
    letters = random.Random(0)
    text = " ".join("".join(letters.choices("abcdefgh", k=5)) for _ in range(200))
    (folder / "text.txt").write_text(text)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text[i : i + 90]}) + "\n" for i in (0, 90, 180)))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "model.yaml").write_text(MODEL)
    write_pairs(folder / "pairs.jsonl", 9)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (folder / "beir" / "qrels").mkdir(parents=True)
    for name, column in (("queries", "anchor"), ("corpus", "positive")):
        texts = [json.dumps({"_id": f"{name}{index}", "text": row[column]}) for index, row in enumerate(rows)]
        (folder / "beir" / f"{name}.jsonl").write_text("\n".join(texts))
    judged = [f"queries{index}\tcorpus{index}\t1" for index in range(len(rows))]
    (folder / "beir" / "qrels" / "test.tsv").write_text("\n".join(["query\tcorpus\tscore", *judged]))
    (folder / "stand_in.py").write_text("raise SystemExit(3)")  # stops before it serves
    (folder / "run").mkdir()
    shutil.copytree(folder / "zoo", folder / "run" / "student")
    (folder / "run" / "run.json").write_text("{}")
    (folder / "run" / "report.json").write_text(json.dumps(example_report()))


# Ways to spoil a file


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing-there"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def utf16(path: Path) -> None:
    path.write_bytes(path.read_text().encode("utf-16"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deep(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def deep_object(path: Path) -> None:
    path.write_text('{"a":' * 5_000 + "1" + "}" * 5_000)


def a_list(path: Path) -> None:
    path.write_text("[]")


def a_string(path: Path) -> None:
    path.write_text('"text"')


def a_null(path: Path) -> None:
    path.write_text("null")


def a_number(path: Path) -> None:
    path.write_text("7")


def not_a_number(path: Path) -> None:
    text = path.read_text().rstrip()
    path.write_text(text[:-1] + ', "x": NaN}')


def duplicate(path: Path) -> None:
    """The first key twice."""
    values = json.loads(path.read_text())
    key = next(iter(values))
    path.write_text(f"{{{json.dumps(key)}: 1, {path.read_text().lstrip()[1:]}")


def surrogate(path: Path) -> None:
    text = path.read_text().rstrip()
    path.write_text(text[:-1] + ', "x": "\\ud800"}')


PLACE = (missing, empty, folder, dangling, binary, utf16, truncated)
JSON = (*PLACE, deep, deep_object, a_list, a_string, a_null, a_number, not_a_number, duplicate, surrogate)
WEIGHTS = (missing, empty, folder, dangling, binary, truncated)
YAML = (missing, empty, folder, dangling, binary, utf16, a_list, a_string, a_number, deep)
TEXT = (missing, empty, folder, dangling, pipe, binary, utf16)


def spoiled(name: str, how: Spoil) -> Spoil:
    return lambda root: how(root / name)


def with_key(name: str, dotted: str, value: Any) -> Spoil:
    """Set a key of a JSON file, inside objects and lists by a dotted path."""

    def change(root: Path) -> None:
        values = json.loads((root / name).read_text())
        place, *keys = values, *dotted.split(".")
        for key in keys[:-1]:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[keys[-1]] = value
        (root / name).write_text(json.dumps(values))

    return change


def without_key(name: str, key: str) -> Spoil:
    def change(root: Path) -> None:
        values = json.loads((root / name).read_text())
        del values[key]
        (root / name).write_text(json.dumps(values))

    return change


def with_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(root: Path) -> None:
        tensors = load_file(root / name)
        change(tensors)
        save_file(tensors, root / name, metadata={"format": "pt"})

    return spoil


def with_line(name: str, line: str) -> Spoil:
    return lambda root: (root / name).write_text(f"{(root / name).read_text().rstrip()}\n{line}\n")


def written(name: str, text: str) -> Spoil:
    return lambda root: (root / name).write_text(text)


def index_of(values: Any) -> Spoil:
    """An index of shards beside, in place of the weights of `mamba`."""

    def change(root: Path) -> None:
        (root / "mamba" / "model.safetensors").rename(root / "mamba" / "model-00001-of-00001.safetensors")
        (root / "mamba" / "model.safetensors.index.json").write_text(json.dumps(values))

    return change


# The cases

_FILES: list[tuple[str, str, tuple[Spoil, ...], str]] = [
    (DISTILL, "recipe.yaml", YAML, "recipe"),
    (DISTILL, "text.txt", TEXT, r"text\.txt|train"),
    (DISTILL, "llama/config.json", JSON, r"config\.json|llama"),
    (DISTILL, "llama/model.safetensors", WEIGHTS, "llama"),
    (DISTILL, "llama/tokenizer.json", (missing, empty, binary, truncated, a_list), "llama|tokenizer"),
    (TRAIN, "model.yaml", YAML, r"config|model\.yaml"),
    (TRAIN, "text.txt", TEXT, r"text\.txt|train"),
    (TRAIN, "tok/tokenizer.json", (missing, empty, folder, binary, truncated, a_list), "tok"),
    (LM, "text.txt", TEXT, r"text\.txt|train"),
    (LM_JSONL, "lines.jsonl", (*TEXT, deep, a_list, a_null, a_number), r"lines\.jsonl"),
    (LM, "mamba2/config.json", JSON, r"config\.json|mamba2"),
    (LM, "mamba2/model.safetensors", WEIGHTS, "mamba2"),
    (EMBED, "pairs.jsonl", (*TEXT, deep, a_list, a_null), r"pairs\.jsonl"),
    (RETRIEVAL, "beir/queries.jsonl", (*TEXT, deep, a_list), r"queries\.jsonl"),
    (RETRIEVAL, "beir/corpus.jsonl", (missing, empty, folder, utf16, a_null), r"corpus\.jsonl"),
    (RETRIEVAL, "beir/qrels/test.tsv", TEXT, r"test\.tsv|split"),
    (RETRIEVAL, "mamba2/config.json", (missing, empty, a_list, duplicate), r"config\.json|mamba2"),
    (INVERSION, "text.txt", TEXT, r"text"),
    (INVERSION, "mamba2/model.safetensors", WEIGHTS, "mamba2"),
    (EXPORT, "zoo/config.json", JSON, r"config\.json|zoo"),
    (EXPORT, "zoo/model.safetensors", WEIGHTS, "zoo|safetensors"),
    (CONVERT, "mamba/config.json", JSON, r"config\.json"),
    (CONVERT, "mamba/model.safetensors", WEIGHTS, r"mamba|model\.safetensors"),
    (GENERATE, "zoo/config.json", JSON, r"config\.json|zoo"),
    (GENERATE, "zoo/model.safetensors", WEIGHTS, "zoo"),
    (GENERATE, "zoo/tokenizer.json", (missing, empty, binary, truncated, a_list), "tokenizer|zoo"),
    (CARD, "run/report.json", JSON, r"report\.json|report|run"),
    (REPORT, "run/report.json", JSON, r"report\.json|run"),
    (CARD, "run/student/config.json", (missing, folder), r"config\.json"),
    (PUSH, "zoo/config.json", JSON, r"config\.json|FOLDER|zoo"),
]

_CONFIG_KEYS: list[tuple[str, str, str, Any]] = [
    *((EXPORT, "zoo/config.json", key, value) for key, value in [
        ("model_type", 7), ("model_type", "nope"), ("architectures", "text"), ("architectures", [1]),
        ("hidden_size", "16"), ("hidden_size", -1), ("hidden_size", None), ("hidden_size", 10**9),
        ("num_hidden_layers", 10**9), ("mixer_types", "text"), ("mixer_types", [1]), ("vocab_size", 0),
        ("vocab_size", 10**12), ("dtype", "float77"), ("dtype", 3), ("rms_norm_eps", "small"),
    ]),
    *((CONVERT, "mamba/config.json", key, value) for key, value in [
        ("model_type", ["mamba"]), ("hidden_size", "8"), ("hidden_size", 9), ("num_hidden_layers", 10**9),
        ("state_size", -4), ("vocab_size", 10**12), ("architectures", {}), ("dtype", "float77"),
        ("tie_word_embeddings", "yes"), ("time_step_rank", "wide"),
    ]),
    *((GENERATE, "zoo/config.json", key, value) for key, value in [
        ("model_type", None), ("hidden_size", [16]), ("num_hidden_layers", 10**9), ("auto_map", "text"),
        ("dtype", "float77"),
    ]),
    *((LM, "mamba2/config.json", key, value) for key, value in [
        ("hidden_size", "16"), ("num_hidden_layers", 10**9), ("head_dim", 0), ("hidden_size", 10**9),
    ]),
    *((DISTILL, "llama/config.json", key, value) for key, value in [
        ("num_attention_heads", 0), ("num_hidden_layers", 10**9), ("hidden_size", "16"), ("model_type", "gpt2"),
    ]),
    *((PUSH, "zoo/config.json", key, value) for key, value in [("auto_map", []), ("auto_map", {"AutoModel": 3})]),
    *((CARD, "run/report.json", key, value) for key, value in [
        ("format", 9), ("evaluations", {}), ("evaluations", []), ("student", 3), ("teacher.parameters", "many"),
        ("stages.0.history", 4), ("hardware", []), ("data.train_sources", "text"), ("versions", None),
        ("recipe", "text"), ("peak_memory_bytes", -1), ("command", 5),
    ]),
]  # fmt: skip

# Command line, the option that is added, words for it, and what the message names.
_OPTIONS: list[tuple[str, str, tuple[str, ...], str]] = [
    (DISTILL, "--set", ("nope=1", "seed=-1", "seed=x", "x", "stages.0.tokens=0", "stages.9.tokens=1",
                        "stages.0.learning_rate=nan", "stages.0.batch_size=0", "student.layers=[99]",
                        "data.sequence_length=0", "data.sequence_length=1000000000", "teacher=./nope",
                        "teacher=mamba2", "student.mixer=nope", "evaluation.max_new_tokens=-1"),
     "override|seed|nope|stages|student|layer|data|teacher|evaluation|set|tokens"),
    (TRAIN, "--set", ("nope=1", "hidden_size=-1", "hidden_size=x", "x", "num_hidden_layers=1000000000",
                      "hidden_size=100000000", "vocab_size=1", "head_dim=7"),
     "override|config|set|hidden_size|head_dim|num_hidden_layers"),
    (TRAIN, "--row-tokens", ("0", "-1", "1", "x"), "row_tokens|--row-tokens"),
    (TRAIN, "--batch-size", ("0", "-5", "1.5"), "batch_size|--batch-size"),
    (TRAIN, "--learning-rate", ("0", "-1", "nan", "inf", "x"), "learning_rate|--learning-rate"),
    (TRAIN, "--warmup", ("-1", "x", "nan", "5000"), "warmup"),
    (TRAIN, "--betas", ("1", "0.9,2", "a,b", "0.9,nan"), "betas"),
    (TRAIN, "--steps", ("0", "-1"), "steps"),
    (TRAIN, "--epochs", ("0", "nan", "inf", "1"), "epochs|steps"),
    (TRAIN, "--seed", ("-1", "99999999999"), "seed"),
    (TRAIN, "--dtype", ("float77",), "dtype"),
    (TRAIN, "--tokenizer", ("./nope", "text.txt"), "tokenizer|nope|text.txt"),
    (TRAIN, "--train-tokenizer", ("0", "300"), "tokenizer"),
    (TRAIN, "--train", ("nope.txt", "text.pdf", "datasets:", ""), "train"),
    (TRAIN, "--push-to-hub", ("a/b/c", "tester/model"), "push-to-hub|Repo id|token"),
    (LM, "--rank", ("0", "-2", "x"), "rank"),
    (LM, "--alpha", ("0", "nan", "-1", "inf"), "alpha"),
    (LM, "--dropout", ("1", "-0.1", "nan"), "dropout"),
    (LM, "--target-modules", ("", "nope", "in_proj,,"), "target_modules"),
    (LM, "--max-grad-norm", ("0", "nan"), "max_grad_norm"),
    (LM, "--weight-decay", ("-1", "inf"), "weight_decay"),
    (LM, "--warmup", ("0.9", "-1", "nan"), "warmup"),
    (LM, "--revision", ("v1",), "revision"),
    (LM, "--separator", ("",), "separator"),
    (LM, "--gradient-accumulation", ("0",), "gradient_accumulation"),
    (LM, "--checkpoint-every", ("0",), "checkpoint_every"),
    (EMBED, "--temperature", ("0", "-1", "nan", "inf"), "temperature"),
    (EMBED, "--anchor", ("nope", ""), "anchor"),
    (EMBED, "--negatives", ("nope", "anchor,"), "negatives|column"),
    (EMBED, "--mini-batch-size", ("0", "x"), "mini"),
    (EMBED, "--max-tokens", ("0",), "max_tokens"),
    (EMBED, "--pool-size", ("0", "1"), "pool_size"),
    (EMBED, "--batch-size", ("1", "0", "1000"), "batch_size|train"),
    (RETRIEVAL, "--pools", ("0", "x", "", "-1", "1000"), "pools"),
    (RETRIEVAL, "--split", ("nope", "../../text"), "split"),
    (RETRIEVAL, "--batch-size", ("0", "-1"), "batch_size"),
    (RETRIEVAL, "--max-tokens", ("0", "-1"), "max_tokens"),
    (RETRIEVAL, "--seed", ("-1", "99999999999999999999999"), "seed"),
    (RETRIEVAL, "--output", ("text.txt", "beir", "text.txt/r.json", "recipe.yaml"), "--output"),
    (INVERSION, "--tokens", ("0", "-1", "99999999"), "tokens"),
    (INVERSION, "--texts", ("0",), "texts"),
    (INVERSION, "--steps", ("0", "-1"), "steps"),
    (INVERSION, "--learning-rate", ("x", "nan", "0", "-1", "inf"), "learning_rate"),
    (INVERSION, "--initial-std", ("x", "nan", "-1"), "initial_std"),
    (INVERSION, "--target", ("x", "99", "-99"), "target"),
    (INVERSION, "--top-k", ("0", "9999"), "top_k"),
    (INVERSION, "--restarts", ("0",), "restarts"),
    (INVERSION, "--seed", ("-1",), "seed"),
    (INVERSION, "--output", ("text.txt", "beir"), "--output"),
    (EXPORT, "--revision", ("v1",), "revision"),
    (CONVERT, "--to", ("nope", "cartesia", ""), "to"),
    (CONVERT, "--dtype", ("float77", "int8", ""), "dtype"),
    (CONVERT, "--set", ("pad_mode=x", "x"), "set"),
    (GENERATE, "--max-new-tokens", ("0", "-1", "x"), "max-new-tokens"),
    (GENERATE, "--temperature", ("-1", "nan", "inf"), "temperature"),
    (GENERATE, "--top-p", ("2", "nan", "0.5"), "top-p"),
    (GENERATE, "--seed", ("-1", "1", "99999999999999999999999"), "seed"),
    (GENERATE, "--dtype", ("float77",), "dtype"),
    (SHOW, "--layers", ("99", "x", "", "2-1"), "layers"),
    (SHOW, "--output", ("text.txt", "beir"), "--output"),
    (SELECT, "--layers", ("0", "99", "x"), "layers"),
    (SELECT, "--method", ("nope", "restore,restore", ""), "method"),
    (SELECT, "--heads", ("-1", "99"), "heads"),
    (SELECT, "--head-method", ("nope", "restore"), "head[-_]method"),
    (SELECT, "--window", ("0",), "window"),
    (SELECT, "--recall", ("-1", "nan"), "recall"),
    (SELECT, "--data", ("nowhere.txt", ""), r"data|nowhere\.txt"),
    (CARD, "--repo-id", ("a/b/c", "a b", ""), "repo_id|repo-id"),
    (PUSH, "--revision", ("a b", "refs/../x"), "revision|token"),
]  # fmt: skip

_OTHERS = [
    Case("distill-no-teacher", "distill nowhere.yaml out", r"recipe.*nowhere\.yaml"),
    Case("select-into-a-full-folder", SELECT.replace(" out ", " beir "), "beir"),
    Case("select-no-teacher", SELECT.replace("llama", "./nowhere"), "nowhere"),
    Case("export-a-file", "export text.txt out", "text.txt"),
    Case("export-onto-a-file", "export zoo text.txt", "text.txt"),
    Case("export-onto-a-link", "export zoo link", "link", lambda root: (root / "link").symlink_to("nowhere")),
    Case("export-under-a-file", "export zoo text.txt/out", "text.txt"),
    Case("convert-onto-its-source", "convert mamba mamba --overwrite", "mamba"),
    Case(
        "convert-over-other-files",
        "convert mamba tok --overwrite",
        r"tok is not replaced: .*notes\.txt",
        lambda root: [(root / "tok" / "config.json").write_text("{}"), (root / "tok" / "notes.txt").write_text("mine")],
    ),
    Case("convert-onto-a-full-folder", "convert mamba beir", "beir"),
    Case("generate-no-prompt", "generate zoo", "PROMPT"),
    Case("generate-an-empty-prompt", "generate zoo ''", "PROMPT"),
    Case("generate-a-prompt-too-long", f"generate zoo {'ab' * 50_000}", "PROMPT"),
    Case("generate-a-surrogate", "generate zoo \udcff", "PROMPT|prompt"),
    Case("a-query-prompt-with-a-surrogate", f"{RETRIEVAL} --query-prompt \udcff", "query_prompt"),
    Case("embed-a-prompt-with-a-surrogate", f"{EMBED} --document-prompt \udcff", "document_prompt"),
    Case("a-separator-with-a-surrogate", f"{LM} --separator \udcff", "separator"),
    Case("generate-a-seed-too-large", f"{GENERATE} --temperature 1 --seed {2**32}", "seed"),
    Case("generate-a-null-byte", "generate zoo\0 abc", "zoo"),
    Case("train-into-a-full-folder", TRAIN.replace(" out ", " beir "), "beir"),
    Case("train-into-a-file", TRAIN.replace(" out ", " text.txt "), "text.txt"),
    Case("lm-into-its-source", LM.replace(" out ", " mamba2 "), "mamba2"),
    Case("lm-of-another-family", LM.replace("lm mamba2", "lm llama"), "model"),
    Case("embed-into-a-file", EMBED.replace(" out ", " text.txt "), "text.txt"),
    Case("private-without-a-push", f"{LM} --private", "--private"),
    Case("card-of-no-run", "card beir", "beir"),
    Case("report-of-no-run", "report run beir", "beir"),
    Case("report-of-one-run-twice", "report run run", "run is named twice"),
    Case("report-into-a-full-folder", "report run --output beir", "beir"),
    Case("push-nothing", "push nowhere tester/model", "nowhere"),
    Case("push-to-no-name", "push zoo a/b/c", "Repo id|REPO"),
    Case("push-without-a-token", PUSH, "token"),
    Case("demo-a-stand-in-that-stops", DEMO, r"--hub-stand-in: stand_in\.py stopped with status 3"),
    Case("demo-no-stand-in", DEMO, r"--hub-stand-in: there is no file stand_in\.py", spoiled("stand_in.py", missing)),
    Case("demo-a-folder-as-stand-in", DEMO, "--hub-stand-in: there is no file", spoiled("stand_in.py", folder)),
    Case("demo-neither-token-nor-stand-in", "demo --output out", "no token"),
    Case("demo-into-a-file", DEMO.replace(" out ", " text.txt "), r"text\.txt must be .*, got a file"),
    Case("demo-under-a-file", DEMO.replace(" out ", " text.txt/out "), r"text\.txt/out cannot be made"),
    Case("demo-into-a-full-folder", DEMO.replace(" out ", " beir "), "beir must be .*, got one that is not empty"),
    Case("demo-onto-a-link", DEMO, "out must be .* link to nothing", lambda root: (root / "out").symlink_to("nowhere")),
    Case("demo-no-teacher", f"{DEMO} --teacher ./nope", r"teacher: .*\./nope"),
    Case("demo-no-teacher-in-a-folder", f"{DEMO} --teacher beir", r"teacher: .*beir has no config\.json"),
    Case("demo-a-teacher-and-a-cache", f"{DEMO} --teacher llama --cache kept", "--cache"),
    Case("demo-a-file-as-cache", f"{DEMO} --cache text.txt", r"--cache must be a folder, .*text\.txt"),
    Case("demo-a-repository-with-its-owner", f"{DEMO} --repo tester/model", "--repo"),
    Case("demo-a-repository-of-two-words", f"{DEMO} --repo 'a b'", "--repo"),
    Case("demo-a-repository-without-a-name", f"{DEMO} --repo ''", "--repo"),
    Case("demo-an-unknown-option", f"{DEMO} --nope", "--nope.*; see demo --help"),
    Case("demo-an-argument", f"{DEMO} nope", "nope"),
    Case("demo-an-option-without-its-value", "demo --output", "--output"),
    Case("no-command", "nope", "nope"),
    Case("list-nothing", "list nope-*", "PATTERN"),
    Case("list-an-option", "list --nope", "list: .*--nope"),
    Case("reproduce-nothing", "reproduce nope", "NAME must be the name of a card, got 'nope'"),
    Case("reproduce-a-path", "reproduce ../README", "NAME"),
    Case("reproduce-a-template", "reproduce template", "NAME"),
    Case("reproduce-no-name", "reproduce", "NAME"),
    Case("convert-an-index-of-text", CONVERT, r"index\.json", index_of("text")),
    Case("convert-an-index-without-a-map", CONVERT, r"index\.json", index_of({"metadata": {}})),
    Case("convert-an-index-of-a-list", CONVERT, r"index\.json", index_of({"weight_map": []})),
    Case("convert-an-index-of-numbers", CONVERT, r"index\.json", index_of({"weight_map": {"a": 1}})),
    Case("convert-an-index-elsewhere", CONVERT, r"index\.json", index_of({"weight_map": {"a": "../text.txt"}})),
    Case("a-weight-of-another-shape", EXPORT, "lm_head.weight", with_tensors(
        "zoo/model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(3, 16)}))),
    Case("a-weight-too-many", CONVERT, "extra", with_tensors(
        "mamba/model.safetensors", lambda t: t.update({"extra": torch.ones(2)}))),
    Case("generate-from-nan", GENERATE, "lm_head.weight", with_tensors(
        "zoo/model.safetensors", lambda t: t["lm_head.weight"].fill_(float("nan")))),
    Case("lines-without-text", LM_JSONL, r"lines\.jsonl.*line 4", with_line("lines.jsonl", '{"body": "a"}')),
    Case("lines-of-a-number", LM_JSONL, r"lines\.jsonl.*line 4", with_line("lines.jsonl", '{"text": 3}')),
    Case("lines-with-a-surrogate", LM_JSONL, r"lines\.jsonl.*line 4", with_line("lines.jsonl", '{"text": "\\ud800"}')),
    Case("lines-with-a-key-twice", LM_JSONL, r"lines\.jsonl.*line 4",
         with_line("lines.jsonl", '{"text": "a", "text": "b"}')),
    Case("pairs-without-a-positive", EMBED, r"pairs\.jsonl.*line 10", with_line("pairs.jsonl", '{"anchor": "a"}')),
    Case("pairs-of-a-list", EMBED, r"pairs\.jsonl.*line 10",
         with_line("pairs.jsonl", '{"anchor": "a", "positive": ["b"]}')),
    Case("judged-nothing-known", RETRIEVAL, r"test\.tsv", with_line("beir/qrels/test.tsv", "nope\tcorpus1\t1")),
    Case("judged-with-words", RETRIEVAL, r"test\.tsv", with_line("beir/qrels/test.tsv", "queries1\tcorpus1\tgood")),
    Case("judged-with-nan", RETRIEVAL, r"test\.tsv", with_line("beir/qrels/test.tsv", "queries1\tcorpus1\tnan")),
    Case("judged-in-one-column", RETRIEVAL, r"test\.tsv", with_line("beir/qrels/test.tsv", "queries1")),
    Case("two-queries-of-one-name", RETRIEVAL, r"queries\.jsonl",
         with_line("beir/queries.jsonl", '{"_id": "queries0", "text": "x"}')),
    Case("a-query-of-a-number", RETRIEVAL, r"queries\.jsonl",
         with_line("beir/queries.jsonl", '{"_id": "z", "text": 1}')),
]  # fmt: skip


def cases() -> Iterator[Case]:
    """All of them, each of a name of its own."""
    for line, file, ways, says in _FILES:
        command = "-".join(line.split()[: 2 if line.split()[0] in ("finetune", "evaluate") else 1])
        for how in ways:
            yield Case(f"{command}-{file}-{getattr(how, '__name__', '')}", line, says, spoiled(file, how))
    for line, file, key, value in _CONFIG_KEYS:
        name = f"{line.split()[0]}-{file}-{key}={json.dumps(value)}"
        yield Case(name, line, rf"{re.escape(key.split('.')[-1])}|{Path(file).name}", with_key(file, key, value))
    for line, option, values, says in _OPTIONS:
        for value in values:
            yield Case(
                f"{' '.join(line.split()[:2])} {option} {value!r}", f"{line} {option} {shlex.quote(value)}", says
            )
    yield from _OTHERS
