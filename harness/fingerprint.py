"""Fingerprints of a run's weights, configuration and tokenizer, so that it is not resumed with different ones."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .run_folder import check_claim, claim_output_folder, recorded_recipe

__all__ = ["check_run", "check_sources", "claim_run", "fingerprint", "pinned_revision", "sha256_of"]

_PARTS = {
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "config": ("config.json",),
    "tokenizer": (
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "*.tiktoken",
    ),
}
"""Parts of a model's folder, and the files that hold them."""

# A snapshot's folder, and so the commit, is known from any of these, whichever the repository has.
_SMALL_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: str, commit: str | None = None, parts: Iterable[str] = tuple(_PARTS)) -> dict[str, str]:
    """Return values that distinguish a source from any other with the same name.

    Args:
        source: a folder, a file or a Hub id.
        commit: commit of the Hub id; see :func:`pinned_revision`.
        parts: those of "weights", "config" and "tokenizer" that the run reads from a folder.

    Returns:
        "source" and, for a Hub id, its "commit"; for a file, its SHA-256 as "weights"; for a folder, a SHA-256 of the
        names and contents of the files of each of `parts` that it has.
    """
    path = Path(source)
    if path.is_file():
        return {"source": source, "weights": sha256_of(path)}
    if not path.is_dir():
        assert commit is not None
        return {"source": source, "commit": commit}
    found = {"source": source}
    for part in parts:
        files = sorted({file for pattern in _PARTS[part] for file in path.glob(pattern) if file.is_file()})
        if files:
            text = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
            found[part] = hashlib.sha256(text.encode()).hexdigest()
    return found


def pinned_revision(source: str, revision: str | None, output: Path, name: str) -> str | None:
    """Return the commit of a Hub id that a run reads, since an adapter or a student fits no other weights.

    Args:
        source: a folder, a file or a Hub id.
        revision: branch, tag or commit; None means the commit with which the run in `output` was started or, for a new
            run, the newest.
        output: folder of the run.
        name: the source's name in `sources` of :func:`claim_run`.

    Returns:
        The commit, or None for a folder or file.

    Raises:
        ValueError: if a revision is given for a folder or file.
        OSError: if the repository is not found or cannot be reached.
    """
    if Path(source).exists():
        if revision is not None:
            kind = "folder" if Path(source).is_dir() else "file"
            raise ValueError(f"`revision` must be left out for the {kind} {source}, got {revision!r}.")
        return None
    earlier = _sources_of(output).get(name, {})
    if revision is None and earlier.get("source") == source and "commit" in earlier:
        return str(earlier["commit"])
    for index, filename in enumerate(_SMALL_FILES):
        try:
            # A snapshot's folder has the name of its commit.
            return Path(hf_hub_download(source, filename, revision=revision)).parent.name
        except EntryNotFoundError:
            if index + 1 == len(_SMALL_FILES):
                raise
    raise AssertionError("unreachable")


def claim_run(
    output: Path, recipe: Mapping[str, Any], sources: Mapping[str, Mapping[str, str]], kind: str
) -> dict[str, Any] | None:
    """Claim a run's folder, as `claim_output_folder` does, for a recipe and the sources that it reads.

    Args:
        output: the folder.
        recipe: what the run computes.
        sources: the :func:`fingerprint` of each source, by its name.
        kind: name of this kind of run.

    Returns:
        What `claim_output_folder` returns.

    Raises:
        ValueError: as `claim_output_folder`, and if a source has changed since the run was started.
    """
    return claim_output_folder(output, _with_sources(output, recipe, sources, kind), kind)


def check_run(output: Path, recipe: Mapping[str, Any], sources: Mapping[str, Mapping[str, str]], kind: str) -> None:
    """Check that :func:`claim_run` would accept a folder, without claiming it; nothing is written.

    Raises:
        ValueError: as there.
    """
    check_claim(output, _with_sources(output, recipe, sources, kind), kind)


def check_sources(output: Path, sources: Mapping[str, Mapping[str, str]]) -> None:
    """Check that the sources of a run are what they were when it was started.

    Args:
        output: folder of the run.
        sources: the :func:`fingerprint` of each source, by its name.

    Raises:
        ValueError: naming the source and the parts of it that have changed.
    """
    for name, here in sources.items():
        _check_source(name, _sources_of(output).get(name, {}), here, output)


def _with_sources(
    output: Path, recipe: Mapping[str, Any], sources: Mapping[str, Mapping[str, str]], kind: str
) -> Mapping[str, Any]:
    """Return what a run records, after comparing its sources with those of the run in the folder."""
    recorded = recorded_recipe(output, kind)
    if recorded:
        earlier: Any = recorded.get("sources")
        if sources and not isinstance(earlier, dict):
            raise ValueError(
                f"output folder: {output} holds a run of an earlier version, which did not record its weights. Finish "
                "it with that version, or choose another folder."
            )
        for name, here in sources.items():
            _check_source(name, earlier.get(name, {}), here, output)
    return {**recipe, "sources": sources} if sources else recipe


def _check_source(name: str, there: Mapping[str, str], here: Mapping[str, str], output: Path) -> None:
    if there.get("source") != here["source"]:
        return  # a different source: the comparison of the recipes reports it
    changed = [part for part in (*_PARTS, "commit") if there.get(part) != here.get(part)]
    if changed == ["commit"]:
        raise ValueError(
            f"{name}: the run in {output} was started from commit {there.get('commit')} of {here['source']}, got "
            f"{here.get('commit')}. Give that commit as the revision, or another folder."
        )
    if changed:
        raise ValueError(
            f"{name}: {' and '.join(changed)} of {here['source']} changed since the run in {output} was started. "
            "Restore what was there, or give another folder to start again."
        )


def _sources_of(output: Path) -> dict[str, Any]:
    sources = recorded_recipe(output).get("sources")
    return sources if isinstance(sources, dict) else {}
