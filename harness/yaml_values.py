"""YAML of recipes and configurations: parsing, writing, and overriding of single values.

There are two departures from PyYAML's defaults: `1e-3` is a number (as in YAML 1.2; PyYAML follows 1.1 and reads a
string), and a key that occurs twice in a mapping is an error, where PyYAML takes the last one.

Why not OmegaConf, tried at 2.4.0: its interpolation reads the environment (`${oc.env:HF_TOKEN}`), so a recipe from the
Web could put a secret into a report that is published, and a prompt with a literal `${` is refused; `from_dotlist` does
not reach into lists (`stages.1.learning_rate`); an override without "=" becomes null, and one below a number replaces
the number silently. Here both are errors that name the override.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

_EXPONENT_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Not at construction, when the merge keys (<<) have already been resolved into the node.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    # The dumper needs it too: it then quotes a text that would read back as a number.
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def read_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        source: name of the document in an error.

    Raises:
        ValueError: if it is not YAML, or repeats a key.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError(f"{source} is not valid YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML does not catch the ValueError of int() or date(), e.g. for the date 2024-13-45.
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from None


def write_yaml(value: Any) -> str:
    """Return YAML text that `read_yaml` turns back into `value`, with the keys in their given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def merge(base: Any, changes: Any) -> Any:
    """Return `base` with `changes`: mappings are merged key by key at every depth, everything else is replaced."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = merge(base[key], value) if key in base else value
    return merged


def override(values: Any, assignments: Sequence[str]) -> Any:
    """Return a copy of `values` with assignments such as "stages.1.learning_rate=1e-3" carried out in order.

    A number in the dotted key is an index into a list. Missing mappings along the key are created; missing list items
    are an error.

    Args:
        values: nested dicts and lists, which are not changed.
        assignments: "dotted.key=YAML value".

    Raises:
        ValueError: if an assignment has no key or no "=", or its key leads to nothing that can be set.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"override must be of the form dotted.key=value, got {assignment!r}.")
        values = _assign(values, keys, read_yaml(text, f"override {assignment!r}: the value"), assignment)
    return values


def _assign(values: Any, keys: list[str], value: Any, assignment: str, depth: int = 0) -> Any:
    if depth == len(keys):
        return value
    key, here = keys[depth], ".".join(keys[:depth]) or "the top"
    if isinstance(values, dict):
        return {**values, key: _assign(values.get(key, {}), keys, value, assignment, depth + 1)}
    if not isinstance(values, list):
        raise ValueError(f"override {assignment!r}: {here} is {values!r}, which has no keys to set.")
    if not (key.isascii() and key.isdecimal() and int(key) < len(values)):
        accepted = f"an integer from 0 to {len(values) - 1}" if values else "left out, since the list is empty"
        raise ValueError(f"override {assignment!r}: the index into {here} must be {accepted}, got {key!r}.")
    index = int(key)
    item = _assign(values[index], keys, value, assignment, depth + 1)
    return [*values[:index], item, *values[index + 1 :]]
