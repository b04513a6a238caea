"""The origin of a teacher or a base model, for reports and model cards."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import model_info

# HTTPError is httpx's, or its replacement in releases of the Hub's client that do not use httpx.
from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

from .json_files import read_json_object
from .published import UNREADABLE, go_without
from .text_files import front_matter

# Written last into a folder that was converted from a GGUF file; names that file.
SOURCE_FILE = "gguf_source.json"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A name that may be a Hub id, with an owner or without."""
_SECONDS = 20.0


def provenance(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return a model's public name and its licence; warn about what cannot be read and leave it out.

    Args:
        source: the Hub id, folder or .gguf file that it was loaded from.
        revision: commit of the Hub id that was loaded.

    Returns:
        The Hub id if it is known, otherwise the name of the folder or file without its path; and the licence's
        identifier, its name if the identifier is "other", None if it is unknown.
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
            card = front_matter(path / "README.md")
            return name, _licence(card.get("license"), card.get("license_name"))
    except UNREADABLE as error:
        go_without(f"the licence of {name}", error)
    return name, None


def _text(value: Any) -> str | None:
    """Return text as one line, and None for any other value, since front matter may hold anything."""
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _licence(identifier: Any, name: Any) -> str | None:
    """Return the licence of a card; one that the Hub does not know is "other" there, with its name beside."""
    licence = _text(identifier)
    return _text(name) or licence if licence == "other" else licence


def _hub_licence(repo_id: str, revision: str | None) -> str | None:
    try:
        card = model_info(repo_id, revision=revision, timeout=_SECONDS).card_data
    except HFValidationError:
        return None  # not a Hub id
    except (HTTPError, *UNREADABLE) as error:
        # The model itself may be in the local cache while the Hub cannot be reached.
        go_without(f"the licence of {repo_id}", error)
        return None
    return _licence(getattr(card, "license", None), getattr(card, "license_name", None))
