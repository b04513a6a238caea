"""Where a teacher or a base model comes from: what reports and model cards say of it."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import model_info

# HTTPError: httpx's, or what the Hub's client has instead of httpx.
from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

from .decoration import UNREADABLE, go_without
from .json_files import read_json_object

# Written last into a folder that was converted from another file: says from which.
SOURCE_FILE = "gguf_source.json"
_SECONDS = 20.0


def provenance(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """A model's public name and its licence. What cannot be read is told in a warning and left out.

    Args:
        source: what it was loaded from: a Hub id, a folder or a .gguf file.
        revision: of a Hub id, the commit that it was loaded at.

    Returns:
        The Hub id where one is known, otherwise the name of the folder or file without its path; and the licence's
        identifier, None where nothing says it.
    """
    path = Path(source)
    if path.is_file():
        return path.name, None
    if not path.is_dir():
        return source, _hub_licence(source, revision)
    name = path.resolve().name
    try:
        if (path / SOURCE_FILE).is_file():
            made_from = read_json_object(path / SOURCE_FILE)
            return _text(made_from.get("hub_id")) or name, _text(made_from.get("license"))
        if (path / "README.md").is_file():
            return name, _text(front_matter(path / "README.md").get("license"))
    except UNREADABLE as error:
        go_without(f"the licence of {name}", error)
    return name, None


def front_matter(card: Path) -> dict[str, Any]:
    """The values between the two lines `---` that a model card begins with; empty where it has none.

    Raises:
        ValueError: if they are no YAML mapping, or the card is not UTF-8.
        OSError: if it cannot be read.
    """
    lines = card.read_text(encoding="utf-8-sig").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    ends = [number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == "---"]
    if not ends:
        raise ValueError(f"{card}: the front matter has no end, a line ---")
    try:
        values = yaml.safe_load("\n".join(lines[1 : ends[0]]))
    except yaml.YAMLError as error:
        raise ValueError(f"{card}: the front matter is not YAML: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{card}: the front matter must be a mapping, got {type(values).__name__}")
    return values or {}


def _text(value: Any) -> str | None:
    """A value that is one line of text, else None: front matter may hold anything."""
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _hub_licence(repo_id: str, revision: str | None) -> str | None:
    try:
        card = model_info(repo_id, revision=revision, timeout=_SECONDS).card_data
    except HFValidationError:
        return None  # a name that is no Hub id has no licence there
    except (HTTPError, *UNREADABLE) as error:
        # The model itself may be in the local cache while the Hub cannot be reached.
        go_without(f"the licence of {repo_id}", error)
        return None
    return _text(getattr(card, "license", None))
