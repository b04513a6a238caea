"""Every snippet of README.md and of the quick start runs as pasted, in order, in one folder and without a network.

The Hub is the stand-in of tests/support, which serves a tiny Llama under the id of the teacher that the texts name.
What else differs from pasting is listed in `INSTEAD` and `SHORTER`, with the reason.
"""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked_runs
import pytest
import typer
from huggingface_hub import HfApi
from teachers import save_teacher

from hub_stand_in import HubStandIn
from ssm_zoo.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
RUN = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
README_LINES = 150
COMMAND = {"ssm-zoo", "ssm_zoo.cli.main"}

INSTALLED = f"{shlex.quote(sys.executable)} -P -c 'import ssm_zoo.cli.main'"
# Lines that something else is run for.
INSTEAD = {
    # The package is installed already, and a test does not change its environment.
    "python3 -m venv .venv && source .venv/bin/activate": INSTALLED,
    "pip install -e .": INSTALLED,
    "pip install -c constraints.txt -e .": INSTALLED,
    # Takes ten minutes and downloads a teacher: only its target is looked for. Its command is run by tests/cli.
    "make demo": f"make --dry-run --directory {shlex.quote(str(ROOT))} demo",
}
# Beginnings of lines, and what is added for a run of seconds.
SHORTER = {
    "ssm-zoo distill zoo": "--set stages.0.tokens=128 --set stages.0.sequence_length=32 --set data.sequence_length=32 "
    "--set evaluation.tokens=256 --set evaluation.sequence_length=32 --set evaluation.repeat_distance=64 "
    "--set evaluation.final=false",
    "ssm-zoo finetune lm": "--steps 2 --row-tokens 64",
    "ssm-zoo train": "--set hidden_size=32 --set head_dim=16 --set state_size=16 --train-tokenizer 300 --steps 2 "
    "--row-tokens 64",
}
HUB_MODELS = ("HuggingFaceTB/SmolLM2-135M",)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced code blocks of a page, without the indentation of a list."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def commands(page: Path) -> list[str]:
    """The lines in the shell blocks of a page that start `ssm-zoo`, by its name or as a module."""
    lines = [line for language, text in blocks(page) if language == "bash" for line in forked_runs.logical_lines(text)]
    return [line for line in lines if COMMAND & set(shlex.split(line, comments=True))]


def shortened(text: str) -> str:
    """The shell lines to run for a block."""
    lines = []
    for line in forked_runs.logical_lines(text):
        plain = " ".join(line.partition(" #")[0].split())
        added = next((more for start, more in SHORTER.items() if plain.startswith(start)), "")
        lines.append(f"{INSTEAD.get(plain, plain)} {added}")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_snippet_runs_in_order(page: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    plan = [
        {"kind": language, "text": shortened(text) if language == "bash" else text, "folder": str(work)}
        for language, text in blocks(page)
    ]
    (work / "distill").symlink_to(ROOT / "distill")  # the texts of a checkout
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with HubStandIn() as hub:
        api = HfApi(endpoint=hub.endpoint, token="any")
        for name in HUB_MODELS:
            api.create_repo(name)
            api.upload_folder(repo_id=name, folder_path=save_teacher(tmp_path / "teacher"))
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", forked_runs.__file__, "plan.json", "results.json"]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True)
        pushed = [model.id for model in api.list_models() if model.id not in HUB_MODELS]
    results = json.loads((tmp_path / "results.json").read_text())
    failed = [
        f"{item['text']}\n{result['output']}" for item, result in zip(plan, results, strict=True) if result["status"]
    ]
    assert not failed, failed[0]
    assert len(pushed) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_name_a_language_and_what_they_import_exists(page: Path) -> None:
    for language, text in blocks(page):
        assert language in {"bash", "python", "text", "yaml"}, text
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ssm_zoo"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize(
    ("page", "line"),
    [pytest.param(page, line, id=f"{page.stem}-{n}") for page in PAGES for n, line in enumerate(commands(page))],
)
def test_command_lines_have_the_options_that_they_use(page: Path, line: str) -> None:
    """Placeholders in capitals may stand for an argument."""
    command: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)
    words = words[1 + words.index(next(word for word in words if word in COMMAND)) :]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)  # raises for what does not parse; runs nothing
    assert context.args == [], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_commands_named_in_the_text_exist(page: Path) -> None:
    for named in re.findall(r"`ssm-zoo ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
        command: Any = typer.main.get_command(app)
        for word in named.split():
            if hasattr(command, "commands"):
                assert word in command.commands, named
                command = command.commands[word]


LOADING = re.compile(
    r"\b(?:Auto(?:Model\w*|Tokenizer|Config)\.from_pretrained|SentenceTransformer|CrossEncoder|pipeline)"
    r"\((?P<arguments>[^()]*(?:\([^()]*\)[^()]*)*)\)"
)
# What examples load that is no folder of the zoo, and so brings no code.
NOT_THE_ZOO = {"options.tokenizer", "theirs"}


def test_what_loads_a_folder_of_the_zoo_says_whether_its_code_may_run() -> None:
    """Without the package, even the tokenizer of such a folder asks on the terminal before it loads.

    With it, the package's own classes are used, and scripts that import the package may say False.
    """
    cards = [*(ROOT / "reports").glob("*.py"), *(ROOT / "model_cards").glob("*.md")]
    found = 0
    for page in [*PAGES, *cards, *(ROOT / "examples").glob("*.py")]:
        text = page.read_text(encoding="utf-8")
        registered = page.suffix == ".py" and re.search(r"^(from|import) (ssm_zoo|tiny_inputs)\b", text, re.MULTILINE)
        for call in LOADING.finditer(text):
            source, *_ = arguments = [part.strip() for part in call["arguments"].split(",")]
            if (
                source in NOT_THE_ZOO or not source or source.startswith("modules=")
            ):  # modules have options of their own
                continue
            found += 1
            trust = next((part for part in arguments if part.startswith("trust_remote_code=")), "")
            accepted = {"True", "trust", "False"} if registered else {"True"}
            assert trust.partition("=")[2] in accepted, f"{page.relative_to(ROOT)}: {call[0]}"
    assert found >= 20


def test_readme_is_short_and_its_links_and_pictures_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert any(target.endswith(".png") for target in targets)
    assert [target for target in targets if not (ROOT / target).exists()] == []
