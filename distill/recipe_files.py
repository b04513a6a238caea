"""Read recipes: files, the presets that come with the package, and the overrides of the command line.

A recipe with the key `preset` is based on that preset and names only what it changes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..harness.text_files import read_text_file
from ..harness.yaml_values import merge, override, read_yaml
from .recipe import MIXERS_WITH, Recipe, StudentSpec, parse_recipe
from .stages import MEANINGFUL_UNDER, StageSpec

__all__ = ["load_recipe", "preset_names"]


def preset_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    files = resources.files("ssm_zoo.distill").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(recipe: str | Path, overrides: Sequence[str] = (), report: Callable[[str], object] = print) -> Recipe:
    """Read a recipe file or preset, merge it with the preset that it is based on, apply overrides, and check it.

    A recipe with the key `preset: NAME` is based on that preset: mappings are merged key by key, lists are replaced.
    Values of the preset that have no effect with the user's values, such as another mixer, are left out. Relative paths
    in a recipe are relative to the working directory.

    Args:
        recipe: name of a preset, or path of a YAML file. For a file with a preset's name write ./NAME.
        overrides: "dotted.key=YAML value", list items by index, e.g. "stages.1.learning_rate=1e-3".
        report: receives a sentence if values of the preset are left out.

    Returns:
        The checked recipe.

    Raises:
        ValueError: naming each key that is unknown, missing or has a value that is not accepted.
    """
    if isinstance(recipe, str) and recipe in preset_names():
        values, source = {"preset": recipe}, f"preset {recipe}"
    else:
        values, source = _read_file(recipe), f"recipe {recipe}"
    whole = override(_inherit(values, source, ()), overrides)
    unused = _inherited_without_effect(whole, values, overrides)
    checked = parse_recipe(whole, source)
    if unused:
        names = ", ".join(f"{place}.{field}" for place, field in unused)
        report(f"preset {values['preset']}: left out {names}, which have no effect with the other values given")
    return checked


def _read_file(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"recipe must be a YAML file or one of {', '.join(preset_names())}, got {str(path)!r}")
    return read_yaml(read_text_file(path, "recipe"), f"recipe {path}")


def _inherit(values: Any, source: str, visited: tuple[str, ...]) -> dict[str, Any]:
    """Merge a recipe with the preset that its key `preset` names, if it has one."""
    if not isinstance(values, dict):
        keys = ", ".join(Recipe.model_fields)
        raise ValueError(f"{source}: the top level must be a mapping with the keys {keys}, got {reprlib.repr(values)}")
    if "preset" not in values:
        return values
    own = dict(values)
    name = own.pop("preset")
    available = [preset for preset in preset_names() if preset not in visited]
    if name not in available:
        raise ValueError(f"{source}: `preset` must be one of {', '.join(available)}, got {name!r}")
    preset, file = f"preset {name}", resources.files("ssm_zoo.distill").joinpath("presets", f"{name}.yaml")
    inherited = _inherit(read_yaml(file.read_text(encoding="utf-8"), preset), preset, (*visited, name))
    return merge(inherited, own)


def _inherited_without_effect(
    whole: dict[str, Any], own: dict[str, Any], overrides: Sequence[str]
) -> list[tuple[str, str]]:
    """Remove from a recipe the values of its preset that have no effect with the values that a user gave.

    Args:
        whole: the recipe merged with its preset, after the overrides; changed in place.
        own: the recipe without its preset.
        overrides: the overrides.

    Returns:
        What was removed: "student" or "stages.N", and the field.
    """
    if "preset" not in own:
        return []
    student, stages, mine = whole.get("student"), whole.get("stages"), own.get("student")
    places = [("student", StudentSpec, student, MIXERS_WITH, mine if isinstance(mine, dict) else {})]
    if isinstance(stages, list) and "stages" not in own:  # a list is replaced as a whole
        places += [(f"stages.{index}", StageSpec, stage, MEANINGFUL_UNDER, {}) for index, stage in enumerate(stages)]
    given = [text.partition("=")[0].strip() for text in overrides]
    removed = []
    for place, kind, values, table, written in places:
        for field, (key, options) in table.items():
            if not isinstance(values, dict) or field not in values or field in written:
                continue
            chosen = values.get(key, kind.model_fields[key].default)
            named = any(f"{place}.{field}.".startswith(f"{override}.") for override in given)
            if chosen not in options and not named:
                del values[field]
                removed.append((place, field))
    return removed
