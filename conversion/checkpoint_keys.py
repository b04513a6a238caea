"""Repair of the keys of a checkpoint that was saved inside a wrapper, or with the head instead of the embedding."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .rules import LazyTensor

HEAD = "lm_head.weight"
_SEGMENTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Names that torch.compile, FSDP and activation checkpointing insert anywhere in keys; no model uses them itself."""


@dataclass(frozen=True)
class Fitted:
    """Tensors with the keys that a format expects, as far as possible.

    Attributes:
        tensors: the tensors.
        notes: lines for the report on the changes.
        hint: sentence to add to an error about keys; may be empty.
    """

    tensors: dict[str, LazyTensor]
    notes: list[str] = field(default_factory=list)
    hint: str = ""


def strip_prefix(tensors: Mapping[str, LazyTensor], prefix: str) -> tuple[dict[str, LazyTensor], list[str]]:
    """Remove a prefix from every key that begins with it.

    Returns:
        The tensors, and a line for the report.

    Raises:
        ValueError: if no key begins with it, or two keys would become the same.
    """
    count = sum(key.startswith(prefix) for key in tensors)
    if not prefix or not count:
        first = next(iter(tensors), "none")
        raise ValueError(f"--strip-prefix must be the beginning of a key, got {prefix!r}; the first key is {first}.")
    return _renamed(tensors, {key: key.removeprefix(prefix) for key in tensors}), [
        f"keys: {prefix!r} was removed from {count} of {len(tensors)}, as requested"
    ]


def without_wrappers(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
    """Remove the names that torch.compile, FSDP and activation checkpointing insert; return a line for the report."""
    names = {}
    for key in tensors:
        name = key
        for segment in _SEGMENTS:
            name = name.replace(segment, "") if f".{segment}" in f".{name}" else name
        names[key] = name
    found = [segment for segment in _SEGMENTS if any(f".{segment}" in f".{key}" for key in tensors)]
    if not found:
        return dict(tensors), []
    return _renamed(tensors, names), [f"keys: {', '.join(map(repr, found))} was removed everywhere"]


def fit_keys(
    tensors: Mapping[str, LazyTensor],
    expected: Collection[str],
    embedding: str,
    *,
    tied: bool,
    former_keys: Mapping[str, str],
) -> Fitted:
    """Rename tensors to the keys that a format expects, if there is no doubt how.

    All keys of a model but that of the head begin with one name, such as `backbone.`. If those of the checkpoint begin
    with another name, with several or with none, the prefix under which most keys fit replaces theirs. If a tied
    checkpoint has the head but no embedding, the head becomes the embedding.

    Args:
        tensors: the tensors that were read.
        expected: the keys that the configuration promises.
        embedding: the key of the embedding.
        tied: whether the head is tied to the embedding.
        former_keys: keys of earlier releases, with the present ones.
    """
    tensors, notes = without_wrappers(tensors)
    expected = set(expected)
    body = _common_prefix([key for key in expected if key != HEAD])
    body = body.partition(".")[0] + "." if body else ""
    heads = [key for key in tensors if key == HEAD or key.endswith(f".{HEAD}")]
    shared = _common_prefix([key for key in tensors if key not in heads])
    best: dict[str, str] = {}
    best_prefix = None
    scores: dict[str | None, int] = {}
    for prefix in [None, *_beginnings(shared)]:
        names = {key: former_keys.get(key, key) for key in tensors}
        if prefix is not None:
            moved = {key: HEAD if key in heads else body + key[len(prefix) :] for key in tensors}
            names = {key: former_keys.get(name, name) for key, name in moved.items()}
        if len(set(names.values())) < len(names):
            continue
        scores[prefix] = len(expected & set(names.values()))
        if prefix is None or (2 * scores[prefix] >= len(expected) and scores[prefix] > scores.get(best_prefix, 0)):
            best, best_prefix = names, prefix
    if not best:
        return Fitted(dict(tensors), notes, "")
    found = _renamed(tensors, best)
    said = [] if best_prefix is None else [f"keys: {_change(best_prefix, body, len(heads))}"]
    if tied and HEAD in found and embedding not in found and set(found) - {HEAD} == expected - {embedding, HEAD}:
        found[embedding] = found.pop(HEAD)
        said.append(f"keys: there is no {embedding}; the tied head {HEAD} is used instead")
    hint = f" The keys were changed before: {'; '.join(said)}." if said else ""
    if scores[best_prefix] == 0 and tensors:
        first, wanted = next(iter(tensors)), next(iter(sorted(expected)))
        hint = (
            f" No key is as expected: the first is {first}, while an expected one is {wanted}. If a wrapper added a "
            "prefix, pass --strip-prefix PREFIX."
        )
    return Fitted(found, [*notes, *said], hint)


def _renamed(tensors: Mapping[str, LazyTensor], names: Mapping[str, str]) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        if names[key] in found or not names[key]:
            raise ValueError(f"keys: {key} cannot become {names[key]!r}, which is empty or the name of another tensor.")
        found[names[key]] = tensor
    return found


def _common_prefix(keys: Collection[str]) -> str:
    """Return the names, each with its dot, with which all keys begin; the last name of a key is never part of it."""
    common: list[str] | None = None
    for key in keys:
        names = key.split(".")[:-1]
        if common is None:
            common = names
            continue
        length = next((i for i, (a, b) in enumerate(zip(common, names, strict=False)) if a != b), None)
        common = common[: min(len(common), len(names)) if length is None else length]
    return "".join(f"{name}." for name in common or [])


def _beginnings(prefix: str) -> list[str]:
    """Return every beginning of a dotted prefix, from the empty one to the whole."""
    names = prefix.split(".")[:-1]
    return ["".join(f"{name}." for name in names[:count]) for count in range(len(names) + 1)]


def _change(prefix: str, body: str, heads: int) -> str:
    if not prefix:
        return f"{body!r} was added to every key{f' but {HEAD}' if heads else ''}"
    if prefix.endswith(body) and body:
        return f"{prefix.removesuffix(body)!r} was removed from the beginning of every key that had it"
    return f"{prefix!r} at the beginning became {body!r}"
