"""The modules that an embedder or reranker of sentence-transformers has beside its model, e.g. a pooling."""

from pathlib import Path

from ..harness.json_files import read_json, typed

__all__ = ["embedder_modules"]

FILE = "modules.json"


def embedder_modules(folder: Path, field: str) -> dict[str, str]:
    """Return the classes of a folder's modules by their own folders; empty for a model without modules.

    Args:
        folder: the folder of the embedder.
        field: what errors call it.

    Raises:
        ValueError: if modules.json is malformed, or names a place outside the folder or a class that is not of
            sentence-transformers, whose code is neither exported nor published.
    """
    if not (folder / FILE).is_file():
        return {}
    name = f"{field}: {FILE}"
    found = {}
    for module in typed(read_json(folder / FILE, name), list, name, ""):
        typed(module, dict, name, "")
        kind, path = typed(module.get("type"), str, name, "type"), typed(module.get("path"), str, name, "path")
        if not kind.startswith("sentence_transformers."):
            raise ValueError(
                f"{name} must name modules of sentence-transformers alone, got {kind!r}. A module with code of its own "
                "is neither exported nor published."
            )
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{name}: `path` must be a folder in {folder}, got {path!r}.")
        if path:
            found[path] = kind
    return found
