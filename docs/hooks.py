"""Build the documentation from the tree as it is: the API pages from the modules, the plots from the benchmarks."""

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

PACKAGES = ("modeling", "kernels", "distill", "training", "evaluation", "conversion", "reports")

_sources = tempfile.TemporaryDirectory(prefix="ssm-zoo-docs-")


@event_priority(100)
def on_config(config: Any) -> Any:
    """Show mkdocstrings the folders under their import names: `ssm_zoo` is a namespace without a folder of its own."""
    package = Path(_sources.name) / "ssm_zoo"
    package.mkdir(exist_ok=True)
    for name in (*PACKAGES, "harness"):
        link = package / name
        if not link.exists():
            link.symlink_to(_root(config) / name, target_is_directory=True)
    config["plugins"]["mkdocstrings"].config.handlers["python"]["paths"] = [_sources.name]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add a page per package with its modules, and the plots of benchmarks/results as images/."""
    for package in PACKAGES:
        entries = [f"::: ssm_zoo.{module}" for module in _modules(_root(config), package)]
        page = "\n\n".join([f"# API: {package}", *entries]) + "\n"
        files.append(File.generated(config, f"api/{package}.md", content=page))
    for path in sorted((_root(config) / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))
    return files


def on_shutdown() -> None:
    """Remove the links."""
    _sources.cleanup()


def _root(config: Any) -> Path:
    return Path(config["config_file_path"]).parent


def _modules(root: Path, package: str) -> list[str]:
    """Dotted names of a package's modules below `ssm_zoo`, without private ones and device code."""
    paths = sorted((root / package).rglob("*.py"))
    return [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in paths
        if not path.name.startswith("_") and "_triton" not in path.name
    ]
