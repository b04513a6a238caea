"""Where a teacher or a base model comes from: what reports and model cards say of it."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, model_info
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

# Written last into a folder that was converted from another file: says from which.
SOURCE_FILE = "gguf_source.json"


def provenance(source: str) -> tuple[str, str | None]:
    """A model's public name and its licence.

    Args:
        source: what it was loaded from: a Hub id, a folder or a .gguf file.

    Returns:
        The Hub id where one is known, otherwise the name of the folder or file without its path; and the licence's
        identifier, None where nothing says it.
    """
    path = Path(source)
    if path.is_file():
        return path.name, None
    if not path.is_dir():
        return source, _hub_licence(source)
    if (path / SOURCE_FILE).is_file():
        made_from = json.loads((path / SOURCE_FILE).read_text(encoding="utf-8"))
        return made_from.get("hub_id", path.name), made_from.get("license")
    if (path / "README.md").is_file():
        licence = getattr(ModelCard.load(path / "README.md").data, "license", None)
        return path.resolve().name, licence if isinstance(licence, str) else None
    return path.resolve().name, None


def _hub_licence(repo_id: str) -> str | None:
    try:
        card = model_info(repo_id).card_data
    except (HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, OSError):
        return None  # the model itself may be in the local cache while the Hub cannot be reached
    licence = getattr(card, "license", None)
    return licence if isinstance(licence, str) else None
