"""The `ssm-zoo` command: its help, and that a mistake ends in one line and writes nothing."""

import json
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_tokenizer, save_zoo_checkpoint
from typer.testing import CliRunner, Result

from ssm_zoo.cli.distill import distill_command
from ssm_zoo.cli.main import app
from ssm_zoo.conversion import export as export_module
from ssm_zoo.distill import run as run_module

TOKEN = "hf_" + "x" * 20
REPO = "tester/model"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "zoo"
    save_zoo_checkpoint(folder)
    return folder


@pytest.fixture
def ssm_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(result: Result) -> str:
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    return result.stdout


COMMANDS = {"distill", "select", "train", "finetune", "evaluate", "export", "card", "convert", "generate", "push"}
COMMANDS |= {"list", "report", "reproduce", "show"}


def fails(result: Result, message: str) -> None:
    """With status 2, one line on stderr, nothing on stdout, nothing written."""
    assert result.exit_code == 2, f"{result.stdout}\n{result.exception!r}"
    assert result.stdout == ""
    assert re.fullmatch(r"ssm-zoo: [^\n]+\n", result.stderr), result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert list(Path.cwd().iterdir()) == []


# Help


@pytest.mark.parametrize("command", [None, *sorted(COMMANDS - {"finetune", "evaluate"})])
def test_help_explains_every_argument(ssm_zoo: Callable[..., Result], command: str | None) -> None:
    group: Any = typer.main.get_command(app)
    assert set(group.commands) == COMMANDS
    described = group if command is None else group.commands[command]
    text = " ".join(succeeds(ssm_zoo(*([command] if command else []), "--help")).split())
    if command is not None:
        assert len(described.params) >= 2
    for parameter in described.params:
        assert parameter.help
        assert " ".join(parameter.help.split()) in text
        names = parameter.opts if parameter.opts[0].startswith("-") else [parameter.metavar]
        for name in names:
            assert name in text


def test_version_is_the_installed_one(ssm_zoo: Callable[..., Result]) -> None:
    assert re.fullmatch(r"ssm-zoo \d+\.\d+\.\d+\n", succeeds(ssm_zoo("--version")))


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from ssm_zoo.cli.main import app;"
        "codes = [CliRunner().invoke(app, [*c, '--help']).exit_code for c in ([], ['distill'], ['generate'])];"
        "assert codes == [0, 0, 0]; assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Mistakes


def without(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        del values[key]
        (folder / "config.json").write_text(json.dumps(values))

    return change


def with_value(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, key: value}))

    return change


def tensors_changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change_file(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change_file


def nothing(folder: Path) -> None:
    """Leaves the model as it is."""


# Command line, where {model} is the zoo's folder after the change; the change; what the message says.
MISTAKES = [
    pytest.param("distill nope out", nothing, "recipe must be a YAML file or one of .*, got 'nope'", id="recipe"),
    pytest.param("distill zoo out --set sede=1", nothing, "`sede` is unknown.*did you mean 'seed'", id="set"),
    pytest.param("distill zoo {model}", nothing, "teacher", id="no-teacher"),
    pytest.param("export ./nope out", nothing, "there is no folder './nope'", id="export-nothing"),
    pytest.param("export nope out", nothing, "source must be an existing folder .*, got 'nope'", id="export-name"),
    pytest.param("export {model} {model}", nothing, "folder must be .*, got .* is not empty", id="export-onto-it"),
    pytest.param(
        "export {model} out --revision v1",
        nothing,
        "must be left out for a folder .*, got 'v1'",
        id="revision",
    ),
    pytest.param(
        "export {model} out",
        with_value("model_type", "llama"),
        "`model_type` must be one of .*zoo_hybrid, zoo_mamba, zoo_mamba2, .*got 'llama'",
        id="export-another-family",
    ),
    pytest.param(
        "export {model} out",
        with_value("architectures", ["ZooOther"]),
        "`architectures` must be one of .*ZooHybridForCausalLM.*, got 'ZooOther'",
        id="export-another-class",
    ),
    pytest.param(
        "export {model} out",
        with_value("mamba2", {"n_groups": 0}),
        "mamba2: n_groups must be at least 1, got 0",
        id="export-wrong-config",
    ),
    pytest.param(
        "export {model} out",
        lambda folder: (folder / "config.json").unlink(),
        "holds no config.json",
        id="export-no-config",
    ),
    pytest.param(
        "export {model} out",
        tensors_changed(lambda tensors: tensors.pop("lm_head.weight")),
        "has 1 missing weights: lm_head.weight",
        id="export-weight-missing",
    ),
    pytest.param(
        "export {model} out",
        tensors_changed(lambda tensors: tensors.update({"extra": torch.ones(1)})),
        "has 1 unexpected weights, .*: extra",
        id="export-weight-too-many",
    ),
    pytest.param(
        "export {model} out",
        tensors_changed(lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 16)})),
        "has 1 mismatched weights, .*: lm_head.weight",
        id="export-weight-of-another-shape",
    ),
    pytest.param(
        "export {model} out",
        tensors_changed(lambda tensors: tensors["lm_head.weight"].fill_(float("nan"))),
        "not finite",
        id="export-nan",
    ),
    pytest.param(
        "export {model} out",
        lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"),
        "deserializing|[Hh]eader",
        id="export-damaged-weights",
    ),
    pytest.param(
        "export {model} out",
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds an adapter. Merge it",
        id="export-adapter",
    ),
    pytest.param("generate ./nope abc", nothing, "there is no folder './nope'", id="generate-nothing"),
    pytest.param(
        "generate {model} abc --seed 1", nothing, "--seed has no effect with --temperature 0, .*, got 1", id="seed"
    ),
    pytest.param(
        "generate {model} abc --top-p 0.5",
        nothing,
        "--top-p has no effect with --temperature 0, .*, got 0.5",
        id="top-p",
    ),
    pytest.param(
        "generate {model} abc --top-p 0 --temperature 1",
        nothing,
        "--top-p must be above 0 and at most 1, got 0",
        id="top-p-0",
    ),
    pytest.param(
        "generate {model} abc --temperature inf",
        nothing,
        "--temperature must be a finite number of 0 or more, got inf",
        id="temperature",
    ),
    pytest.param("generate {model} \u00e4", nothing, "PROMPT: the tokenizer of .* no token for", id="no-token-for-it"),
    pytest.param(
        "generate {model} abc --chat",
        lambda folder: (folder / "chat_template.jinja").unlink(),
        "--chat: the tokenizer of .* has no chat template",
        id="no-chat-template",
    ),
    pytest.param(
        "generate {model} abc",
        with_value("model_type", "of-somebody-else"),
        "MODEL: .* brings code of its own .*'of-somebody-else'.* pass --trust-remote-code",
        id="code-of-somebody-else",
    ),
    pytest.param("push ./nope a/b", nothing, "FOLDER must be an existing folder, got nope", id="push-nothing"),
    pytest.param(
        "push {model} a/b",
        lambda folder: (folder / "config.json").unlink(),
        "FOLDER: .* holds no config.json",
        id="push-no-config",
    ),
    pytest.param("push {model} a/b", without("auto_map"), "FOLDER: .* has no auto_map", id="push-no-auto-map"),
    pytest.param(
        "push {model} a/b",
        lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"),
        "FOLDER: .* holds no weights",
        id="push-no-safetensors",
    ),
    pytest.param(
        "push {model} a/b",
        lambda folder: (folder / "modeling_hybrid.py").unlink(),
        "FOLDER: .* names modeling_hybrid.ZooHybridModel, but there is no modeling_hybrid.py",
        id="push-no-code",
    ),
    pytest.param("push {model} a/b/c", nothing, "Repo id must", id="push-wrong-id"),
    pytest.param(
        "push {model} a/b --create-pr --revision x",
        nothing,
        "--revision must be left out with --create-pr, got 'x'",
        id="push-pr-branch",
    ),
    pytest.param("push {model} a/b", nothing, "no Hugging Face token; .*`hf auth login`.*HF_TOKEN", id="no-token"),
    pytest.param("card {model}", nothing, "has no student/config.json", id="card-no-run"),
]


@pytest.mark.parametrize(("line", "change", "message"), MISTAKES)
def test_mistake_ends_in_one_line_and_writes_nothing(
    ssm_zoo: Callable[..., Result],
    zoo: Path,
    tmp_path: Path,
    line: str,
    change: Callable[[Path], None],
    message: str,
) -> None:
    model = shutil.copytree(zoo, tmp_path / "model")
    change(model)
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    fails(ssm_zoo(*(part.format(model=model) for part in line.split())), message)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_empty_prompt_is_refused(ssm_zoo: Callable[..., Result], zoo: Path) -> None:
    fails(ssm_zoo("generate", zoo, ""), "PROMPT must not be empty")


def test_unfinished_run_has_no_student(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for command in (["card"], ["push", REPO], ["export", "out"], ["generate", "abc"]):
        fails(ssm_zoo(command[0], tmp_path / "run", *command[1:]), "Give the folder of a finished (distillation|run)")


def test_a_run_with_only_an_adapter_has_no_model(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    save_tokenizer(adapter)
    (tmp_path / "run" / "run.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base (a local folder)"}))
    fails(ssm_zoo("generate", tmp_path / "run", "abc"), "has an adapter but no model. Give .*adapter, or .* --merge")
    fails(ssm_zoo("generate", adapter, "abc"), "must be the folder or Hub id of the base model, got 'base .*--merge")


@pytest.fixture
def run_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the distillation itself end with an exception."""

    def end_with(error: BaseException) -> None:
        def raise_error(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(run_module, "distill", raise_error)

    return end_with


DISTILL = ["distill", "zoo", "out", "--set", "teacher=t", "--set", "data.train=a", "--set", "data.heldout=b"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        pytest.param(ValueError("recipe x:\n  a: b\n\n  c: d."), "recipe x: a: b; c: d.", id="lines"),
        pytest.param(FileNotFoundError(2, "No such file", "a.txt"), "a.txt: No such file", id="file"),
        pytest.param(ValueError(), "ValueError", id="no-message"),
        pytest.param(OSError(f"401 for {TOKEN} and the-token-of-this-user"), "401 for *** and ***", id="token"),
    ],
)
def test_error_is_told_in_one_line(
    ssm_zoo: Callable[..., Result],
    run_that: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    line: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "the-token-of-this-user")
    run_that(error)
    result = ssm_zoo(*DISTILL)
    assert (result.exit_code, result.stderr) == (2, f"ssm-zoo: {line}\n")
    monkeypatch.setenv("RANK", "3")
    assert ssm_zoo(*DISTILL).stderr == f"ssm-zoo: process 3: {line}\n"


def test_traceback_is_shown_on_request_without_the_token(
    ssm_zoo: Callable[..., Result], run_that: Callable[[BaseException], None]
) -> None:
    run_that(ValueError(f"refused {TOKEN}"))
    result = ssm_zoo("--traceback", *DISTILL)
    assert result.exit_code == 2
    assert "Traceback (most recent call last):" in result.stderr
    assert result.stderr.endswith("ValueError: refused ***\n")


def test_a_bug_ends_in_one_line_that_says_so_and_its_traceback_is_in_a_private_file(
    ssm_zoo: Callable[..., Result],
    run_that: Callable[[BaseException], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_that(RuntimeError(f"a bug\nwith {TOKEN}"))
    result = ssm_zoo(*DISTILL)
    said = "ssm-zoo: distill: unexpected error, a bug of ssm-zoo: RuntimeError: a bug; with *** (its traceback is in "
    found = re.fullmatch(rf"{re.escape(said)}(\S+)\)\n", result.stderr)
    assert result.exit_code == 1 and found, result.stderr
    log = Path(found[1])
    assert log.parent == tmp_path and stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    assert text.startswith("Traceback (most recent call last):") and "raise error" in text and TOKEN not in text
    shown = ssm_zoo("--traceback", *DISTILL)
    assert shown.exit_code == 1 and shown.stderr.startswith("Traceback (most recent call last):")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        pytest.param(MemoryError(), "out of memory: MemoryError; use a smaller model, batch or length", id="memory"),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
            "out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.; use a smaller "
            "model, batch or length",
            id="allocator",
        ),
        pytest.param(
            RuntimeError(
                "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10123. Check the logs"
            ),
            "another process of this run has ended or cannot be reached; its message says why "
            "([gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10123. Check the logs)",
            id="left-alone",
        ),
        pytest.param(OSError(28, "No space left on device"), "[Errno 28] No space left on device", id="disk-full"),
        pytest.param(
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "I/O error: No space left on device (os error 28)",
            id="disk-full-for-weights",
        ),
        pytest.param(ValueError("a \ud800 \x1b[1m b"), r"a \ud800 \x1b[1m b", id="unprintable"),
        pytest.param(OSError("401: Bearer abc/def"), "401: Bearer ***", id="token-sent-back"),
        pytest.param(OSError("https://me:secret@hub.co: 500"), "https://***@hub.co: 500", id="password"),
    ],
)
def test_what_the_caller_can_put_right_ends_in_one_line_of_status_2(
    ssm_zoo: Callable[..., Result], run_that: Callable[[BaseException], None], error: Exception, line: str
) -> None:
    run_that(error)
    result = ssm_zoo(*DISTILL)
    assert (result.exit_code, result.stderr) == (2, f"ssm-zoo: {line}\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param("generate m p --max-new-tokens 0", "generate: Invalid value for '--max-new-tokens': ", id="0"),
        pytest.param("generate m p --seed x", "generate: Invalid value for '--seed': ", id="word"),
        pytest.param("generate m", "generate: Missing argument", id="missing"),
        pytest.param("finetune lm m o --nope", "finetune lm: No such option: --nope", id="option"),
        pytest.param("nope", "No such command 'nope'", id="command"),
        pytest.param("--nope", "No such option: --nope", id="option-of-the-program"),
    ],
)
def test_a_mistake_in_the_command_line_ends_in_one_line(
    ssm_zoo: Callable[..., Result], arguments: str, line: str
) -> None:
    result = ssm_zoo(*arguments.split())
    assert result.exit_code == 2 and result.stdout == ""
    assert re.fullmatch(rf"ssm-zoo: {re.escape(line)}[^\n]*; see ssm-zoo [^\n]*--help\n", result.stderr), result.stderr


def test_a_termination_takes_what_is_half_written_along(zoo: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, ssm_zoo.conversion.export as e; from ssm_zoo.cli.main import app;"
        "e._verify = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM); app(['export', *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(zoo), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143, "ssm-zoo: terminated")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_says_how_to_go_on(
    ssm_zoo: Callable[..., Result],
    run_that: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    zoo: Path,
) -> None:
    run_that(KeyboardInterrupt())
    result = ssm_zoo(*DISTILL)
    again = "ssm-zoo: interrupted; run the same command again to resume\n"
    assert (result.exit_code, result.stderr) == (130, again)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "_verify", interrupt)
    result = ssm_zoo("export", zoo, "out")
    assert (result.exit_code, result.stderr) == (130, "ssm-zoo: interrupted\n")
    assert list(Path.cwd().iterdir()) == []
    monkeypatch.setenv("RANK", "1")
    result = ssm_zoo(*DISTILL)
    assert (result.exit_code, result.stderr) == (130, "")


def test_processes_that_know_nothing_of_each_other_are_refused(
    ssm_zoo: Callable[..., Result], run_that: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_that(RuntimeError("not to be reached"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(ssm_zoo(*DISTILL), "accelerate: 2 processes were started, but it sees 1")


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        pytest.param({}, "ssm-zoo", id="one"),
        pytest.param({"WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2 -m ssm_zoo.cli.main", id="two"),
        pytest.param(
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "true"},
            "ACCELERATE_USE_CPU=true torchrun --nnodes 2 --nproc-per-node 4 -m ssm_zoo.cli.main",
            id="two-nodes-without-gpu",
        ),
    ],
)
def test_command_repeats_the_run(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], start: str) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = distill_command("my recipe.yaml", Path("out"), ["seed=1", "teacher=a b"])
    assert command == f"{start} distill 'my recipe.yaml' out --set seed=1 --set 'teacher=a b'"
