"""The rules of the source tree, checked by reading it: what may import what, and what the Hub loader can follow.

Every rule is a function from a tree of files to a list of violations. The same function runs over this repository,
where the list must be empty, and over a small wrong tree, where it must not be.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A kernel file holds a whole op, and may be longer.
MAX_LINES, MAX_KERNEL_LINES = 500, 1000

# What each folder may import beside itself: cli -> distill -> training -> evaluation -> conversion, reports -> modeling
# -> kernels. harness/ imports nothing of the project; all but the two exported folders may import it.
_LAYERS = {
    "cli": {"distill", "training", "evaluation", "conversion", "reports", "modeling", "kernels", "harness"},
    "distill": {"training", "evaluation", "conversion", "reports", "modeling", "kernels", "harness"},
    "training": {"evaluation", "conversion", "reports", "modeling", "kernels", "harness"},
    "evaluation": {"conversion", "reports", "modeling", "kernels", "harness"},
    "conversion": {"modeling", "kernels", "harness"},
    "reports": {"modeling", "kernels", "harness"},
    "modeling": {"kernels"},
    "kernels": set(),
    "harness": set(),
}
MAY_IMPORT = {folder: {folder, *others} for folder, others in _LAYERS.items()}
# The exported code of a model must load with torch and transformers alone.
THIRD_PARTY = {"kernels": {"torch"}, "modeling": {"torch", "transformers", "huggingface_hub"}}
TRITON_FILE = "kernels/_triton.py"
EXPORTED = ("kernels", "modeling")
VAGUE_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}
NOT_SOURCE = {".git", ".venv", ".venv-oldest", "venv", "build", "dist", "runs", "outputs", "__pycache__"}

# transformers.dynamic_module_utils.get_relative_imports finds the files of a model by these expressions, in the
# text, so a docstring line can match them too.
LOADER_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import|^\s*import\s+\.(\S+)\s*$", re.MULTILINE)
# A path of somebody's machine: a home, scratch or work folder where a path starts, not the middle of an address.
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:work|tmp|root|home|Users|scratch|mnt)/\w")


def sources(root: Path, *folders: str) -> Iterator[tuple[str, Path]]:
    """Yield (path from the root, with slashes; path) of the Python files: all of them, or those of `folders`."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not NOT_SOURCE.intersection(parts) and (not folders or parts[0] in folders):
            yield "/".join(parts), path


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield (line, level, dotted module) of every import, at whatever depth; level counts the leading dots."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                for alias in node.names:
                    yield node.lineno, node.level, alias.name
            else:
                yield node.lineno, node.level, node.module


def imports_against_the_direction(root: Path) -> list[str]:
    found = []
    for name, path in sources(root, *MAY_IMPORT):
        own = name.split("/")
        for line, level, module in imports(path):
            if level == 0:
                if module.split(".")[0] == "ssm_zoo":
                    found.append(f"{name}:{line}: imports {module} by its absolute name; use a relative import")
                continue
            base = own[: len(own) - level]  # the folders left after going up; nothing left is ssm_zoo itself
            target = "a package outside ssm_zoo" if level > len(own) else base[0] if base else module.split(".")[0]
            if target not in MAY_IMPORT[own[0]]:
                found.append(f"{name}:{line}: {own[0]} may not import {target}")
    return found


def third_party_imports_of_exported_files(root: Path) -> list[str]:
    found = []
    for name, path in sources(root, *EXPORTED):
        allowed = THIRD_PARTY[name.split("/")[0]] | set(sys.stdlib_module_names)
        if name == TRITON_FILE:
            allowed |= {"triton"}
        for line, level, module in imports(path):
            top = module.split(".")[0]
            # The absolute name of the package itself is reported by imports_against_the_direction.
            if level == 0 and top not in allowed | {"ssm_zoo"}:
                found.append(
                    f"{name}:{line}: imports {top}; accepted: {', '.join(sorted(THIRD_PARTY[name.split('/')[0]]))}"
                )
    return found


def imports_the_loader_misreads(root: Path) -> list[str]:
    """The loader's expressions must find the relative imports of an exported file, all of them and no others."""
    found = []
    for name, path in sources(root, *EXPORTED):
        if path.name == "__init__.py":
            continue  # not exported
        text = path.read_text(encoding="utf-8")
        seen = {dotted or plain for dotted, plain in LOADER_IMPORT.findall(text)}
        real = set()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                if node.module is None:
                    found.append(
                        f"{name}:{node.lineno}: `from {'.' * node.level} import` is not followed; name the file"
                    )
                    continue
                # The expressions take one dot; the others stay in what they captured.
                real.add("." * (node.level - 1) + node.module)
        found += [f"{name}: a line of text reads like an import of .{module}" for module in sorted(seen - real)]
        found += [f"{name}: the import of .{module} is not followed" for module in sorted(real - seen)]
    return found


def kernels_package_files(root: Path) -> list[str]:
    return [name for name, _ in sources(root, "kernels") if name.endswith("__init__.py")]


def names_used_twice(root: Path) -> list[str]:
    """An exported model is one flat folder, so a file name may occur once over modeling/ and kernels/."""
    first: dict[str, str] = {}
    found = []
    for name, path in sources(root, *EXPORTED):
        if path.name in first:
            found.append(f"{name} and {first[path.name]} have the same name")
        first[path.name] = name
    return found


def vague_names(root: Path) -> list[str]:
    return [name for name, path in sources(root) if path.name in VAGUE_NAMES]


def long_files(root: Path) -> list[str]:
    found = []
    for name, path in sources(root):
        length = len(path.read_text(encoding="utf-8").splitlines())
        limit = MAX_KERNEL_LINES if name.startswith("kernels/") else MAX_LINES
        if length > limit:
            found.append(f"{name}: {length} lines, at most {limit}")
    return found


def undecided_loading(root: Path) -> list[str]:
    """Who loads something with transformers says whether code that it brings is run: left out, a user would be asked.

    A configuration's own class reads JSON and runs nothing, whatever the file names.
    """
    found = []
    for name, path in sources(root, *set(MAY_IMPORT) - {"kernels"}):
        for node in ast.walk(parse(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            loader, owner = node.func.attr, ast.unparse(node.func.value)
            plain = owner.endswith(("Config", "config_class")) and not owner.endswith("AutoConfig")
            said = {keyword.arg for keyword in node.keywords} & {"trust_remote_code", None}
            by_auto_class = loader == "from_config" and owner.startswith("Auto")
            if ((loader == "from_pretrained" and not plain) or by_auto_class) and not said:
                found.append(f"{name}:{node.lineno}: {owner}.{loader} without trust_remote_code")
    return found


def machine_paths(root: Path) -> list[str]:
    """Read what git would commit: the tracked files and the new ones it does not ignore."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, check=True, capture_output=True).stdout.decode().split("\0")
    found = []
    for name in sorted(set(filter(None, names))):
        path = root / name
        if not path.is_file():
            continue  # deleted, but not yet from the index
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue  # not a text
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {match[0]}...")
    return found


# Per rule the files that would break it: case -> (name, text, what the rule must say about it).
WRONG: dict[Callable[[Path], list[str]], dict[str, tuple[str, str, str]]] = {
    imports_against_the_direction: {
        "kernel-up": ("kernels/a.py", "from ..modeling.b import B", "kernels may not import modeling"),
        "model-up": ("modeling/a.py", "from .. import conversion", "modeling may not import conversion"),
        "in-a-function": ("modeling/a.py", "def f():\n    from ..cli.b import c", "modeling may not import cli"),
        "sideways": ("reports/a.py", "from ..conversion.b import c", "reports may not import conversion"),
        "upwards": ("harness/a.py", "from ..modeling.b import c", "harness may not import modeling"),
        "out-of-the-package": ("cli/sub/a.py", "from ....other import b", "outside ssm_zoo"),
        "absolute": ("cli/a.py", "from ssm_zoo.kernels.ssd import ssd", "absolute name"),
    },
    third_party_imports_of_exported_files: {
        "triton": ("kernels/a.py", "import triton.language as tl", "imports triton"),
        "transformers-in-a-kernel": ("kernels/a.py", "import transformers", "imports transformers"),
        "einops": ("modeling/a.py", "from einops import rearrange", "imports einops"),
    },
    imports_the_loader_misreads: {
        "bare-dot": ("modeling/a.py", "from . import cache", "name the file"),
        "docstring": (
            "kernels/a.py",
            '"""Use:\n\n    from .ghost import g\n"""',
            "reads like an import of .ghost",
        ),
        "second-on-the-line": ("kernels/a.py", "x = 1; from .b import c", ".b is not followed"),
    },
    kernels_package_files: {"kernels-init": ("kernels/__init__.py", "", "kernels/__init__.py")},
    names_used_twice: {"same-name": ("kernels/cache.py", "", "same name")},
    vague_names: {"utils": ("distill/utils.py", "", "distill/utils.py")},
    undecided_loading: {
        "left-out": ("distill/a.py", "x = AutoTokenizer.from_pretrained(y, revision=z)", "without trust_remote_code"),
        "any-class": ("cli/a.py", "x = kind.from_pretrained(y)", "kind.from_pretrained without trust_remote_code"),
        "from-a-configuration": ("training/a.py", "x = AutoModel.from_config(y)", "without trust_remote_code"),
    },
    long_files: {
        "long": ("tests/a.py", "x = 1\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
        "long-kernel": ("kernels/a.py", "x = 1\n" * (MAX_KERNEL_LINES + 1), f"{MAX_KERNEL_LINES + 1} lines"),
    },
}


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: rule.__name__)
def test_this_repository_keeps_the_rule(rule: Callable[[Path], list[str]]):
    found = rule(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "name", "text", "message"),
    [pytest.param(rule, *case, id=name) for rule, cases in WRONG.items() for name, case in cases.items()],
)
def test_the_rule_finds_a_wrong_file(
    tmp_path: Path, rule: Callable[[Path], list[str]], name: str, text: str, message: str
):
    right = tmp_path / "modeling" / "cache.py"
    right.parent.mkdir()
    right.write_text("import torch\nfrom ..kernels.ssd import (\n    ssd,\n)\nfrom ._x import y\n")
    assert rule(tmp_path) == []
    wrong = tmp_path / name
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_text(text)
    found = rule(tmp_path)
    assert len(found) == 1
    assert message in found[0]


def test_triton_may_be_imported_by_its_own_file_alone(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    for name in ("_triton.py", "ssd.py"):
        (tmp_path / "kernels" / name).write_text("try:\n    import triton\nexcept ImportError:\n    pass\n")
    found = third_party_imports_of_exported_files(tmp_path)
    assert len(found) == 1
    assert found[0].startswith("kernels/ssd.py:2")


@pytest.fixture
def needs_git() -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")


@pytest.mark.usefixtures("needs_git")
def test_no_committed_text_names_a_path_of_a_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git check-out: git cannot list what is committed")
    found = machine_paths(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.usefixtures("needs_git")
def test_machine_paths_are_found_and_addresses_are_not(tmp_path: Path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    home = "/" + "home"
    (tmp_path / "bad.md").write_text(f"one\nread {home}/someone/data\n")
    (tmp_path / "good.md").write_text(f"https://example.org{home}/page and a/relative{home}/page, and {home}\n")
    (tmp_path / "ignored.md").write_text(f"{home}/someone\n")
    (tmp_path / ".gitignore").write_text("ignored.md\n")
    (tmp_path / "weights.bin").write_bytes(f"\0 {home}/someone".encode())
    assert machine_paths(tmp_path) == [f"bad.md:2: {home}/s..."]


@pytest.mark.usefixtures("needs_git")
def test_a_hook_runs_these_tests_without_changing_the_repository_that_it_checks(tmp_path: Path):
    """As `git commit` does in a work tree beside the main one, where GIT_DIR is set."""
    tree, common = tmp_path / "tree", tmp_path / "repository" / ".git"
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (
        ["init", "--quiet", str(common.parent)],
        [*who, "-C", str(common.parent), "commit", "--quiet", "--allow-empty", "-m", "first"],
        ["-C", str(common.parent), "worktree", "add", "--quiet", "--detach", str(tree)],
    ):
        subprocess.run(["git", *arguments], check=True)
    before = (common / "config").read_text()
    environment = os.environ | {"GIT_DIR": str(common / "worktrees" / "tree"), "GIT_INDEX_FILE": str(tmp_path / "none")}
    tests = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "machine_paths"]
    done = subprocess.run(tests, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert (common / "config").read_text() == before


def test_every_python_file_that_docs_and_makefile_name_exists() -> None:
    folders = ("docs", ".github", "examples", "benchmarks")
    written = [*ROOT.glob("*.md"), *(path for name in folders for path in (ROOT / name).rglob("*"))]
    written = [path for path in written if path.suffix in (".md", ".yml") and path.name != "CHANGELOG.md"]
    tops = [path for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier()]
    files = ["/" + path.relative_to(ROOT).as_posix() for top in tops for path in top.rglob("*.py")]
    # A name that no file is to have, and the files that a reader of docs/adding.md writes.
    others = {"utils.py", "modeling/leaky.py", "modeling/configuration_retnet.py", "modeling/modeling_retnet.py"}
    others |= {"kernels/delta_rule.py", "kernels/delta_rule_triton.py", "modeling/gated_deltanet.py"}
    others |= {"tests/kernels/test_delta_rule.py"}
    for path in (*written, ROOT / "Makefile", ROOT / "mkdocs.yml", ROOT / "pyproject.toml"):
        for name in set(re.findall(r"(?:[\w-]+/)*\w+\.py\b", path.read_text(encoding="utf-8"))) - others:
            assert any(file.endswith(f"/{name}") for file in files), f"{path.relative_to(ROOT)} names {name}"
