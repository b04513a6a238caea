"""Build the documentation from the tree as it is: sources for the API pages, plots for the results page."""

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

PACKAGES = ("kernels", "modeling", "conversion", "reports", "evaluation", "training", "distill", "harness")

_sources = tempfile.TemporaryDirectory(prefix="ssm-zoo-docs-")


@event_priority(100)
def on_config(config: Any) -> Any:
    """Show mkdocstrings the folders under their import names: `ssm_zoo` is a namespace without a folder of its own."""
    root = Path(config["config_file_path"]).parent
    package = Path(_sources.name) / "ssm_zoo"
    package.mkdir(exist_ok=True)
    for name in PACKAGES:
        link = package / name
        if (root / name).is_dir() and not link.exists():
            link.symlink_to(root / name, target_is_directory=True)
    config["plugins"]["mkdocstrings"].config.handlers["python"]["paths"] = [_sources.name]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Serve the plots of benchmarks/results as images/, without a second copy of them in the repository."""
    results = Path(config["config_file_path"]).parent / "benchmarks" / "results"
    for path in sorted(results.glob("*.png")):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))
    return files


def on_shutdown() -> None:
    """Remove the links."""
    _sources.cleanup()
