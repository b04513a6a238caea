"""Keys of a checkpoint that was saved from inside of a wrapper, or without its head, put right."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .rules import LazyTensor

HEAD = "lm_head.weight"
_SEGMENTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Names that torch.compile, FSDP and activation checkpointing put into keys, anywhere; no model has them itself."""


@dataclass(frozen=True)
class Fitted:
    """Tensors under the names that a format expects, as far as that was possible.

    Attributes:
        tensors: the tensors.
        notes: lines for the report: what was changed.
        hint: what an error about keys should add; empty if there is nothing to say.
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
        f"keys: {prefix!r} was removed from {count} of {len(tensors)}, as asked for"
    ]


def without_wrappers(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
    """Remove what torch.compile, FSDP and activation checkpointing insert into keys; say so in a line."""
    names = {}
    for key in tensors:
        name = key
        for segment in _SEGMENTS:
            name = name.replace(segment, "") if f".{segment}" in f".{name}" else name
        names[key] = name
    found = [segment for segment in _SEGMENTS if any(f".{segment}" in f".{key}" for key in tensors)]
    if not found:
        return dict(tensors), []
    return _renamed(tensors, names), [f"keys: {', '.join(map(repr, found))} was removed wherever it stood"]


def fit_keys(
    tensors: Mapping[str, LazyTensor],
    expected: Collection[str],
    embedding: str,
    *,
    tied: bool,
    former_keys: Mapping[str, str],
) -> Fitted:
    """Give tensors the names that a format expects, where it is beyond doubt how.

    The keys of a model begin with one name, such as `backbone.`, but for the head's. Where they begin with another,
    with more, or with none, and every key fits once that is put right, it is put right. A tied checkpoint that has the
    head alone has it for the embedding.

    Args:
        tensors: what was read.
        expected: the names that the configuration promises.
        embedding: that of the embedding.
        tied: whether the head is the embedding.
        former_keys: names of earlier releases with the later ones.
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
        said.append(f"keys: there is no {embedding}; the tied head {HEAD} is taken for it")
    hint = f" This is after: {'; '.join(said)}." if said else ""
    if scores[best_prefix] == 0 and tensors:
        first, wanted = next(iter(tensors)), next(iter(sorted(expected)))
        hint = (
            f" No key is as expected: the first is {first}, and one such as {wanted} was looked for. If a wrapper put "
            "a prefix before them, pass --strip-prefix PREFIX."
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
    """The names, each with its dot, that all keys begin with; a key's last name is never part of it."""
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
    """Every beginning of a dotted prefix, from none of it to all."""
    names = prefix.split(".")[:-1]
    return ["".join(f"{name}." for name in names[:count]) for count in range(len(names) + 1)]


def _change(prefix: str, body: str, heads: int) -> str:
    if not prefix:
        return f"{body!r} was put before every key{f' but {HEAD}' if heads else ''}"
    if prefix.endswith(body) and body:
        return f"{prefix.removesuffix(body)!r} was removed from the beginning of every key that had it"
    return f"{prefix!r} at the beginning became {body!r}"
