"""Additions to transformers' saving: removal of stale weights, a default card, and a plain push."""

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def written_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Return time and size of the single weights file and the shard index of a folder, if they exist."""
    stats = {name: folder / name for name in (_SINGLE, _INDEX) if (folder / name).is_file()}
    return {name: (path.stat().st_mtime_ns, path.stat().st_size) for name, path in stats.items()}


def remove_stale_weights(folder: Path, before: dict[str, tuple[int, int]]) -> None:
    """Remove weights that an earlier save with another sharding left, as transformers prefers the single file.

    Args:
        folder: folder that has been saved to.
        before: result of :func:`written_weights` before saving.
    """
    after = written_weights(folder)
    new = {name for name, written in after.items() if before.get(name) != written}
    if len(after) == 2 and len(new) == 1:
        (folder / (after.keys() - new).pop()).unlink()


def write_default_card(folder: Path, *, model_type: str, class_name: str, auto_class: str, parameters: int) -> None:
    """Write a minimal README.md on the model and how to load it, unless there is one."""
    if (folder / "README.md").exists():
        return
    text = f"""---
library_name: transformers
tags:
- ssm-zoo
- {model_type}
- custom_code
---

# {folder.resolve().name}

A `{model_type}` model (`{class_name}`, {parameters:,} parameters) from ssm-zoo. The code is in this repository:
loading it needs torch and transformers only.

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("<this repository>", trust_remote_code=True)
```
"""
    write_atomically(folder / "README.md", text)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it, so that the file is never incomplete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    replace: bool = False,
    tags: list[str] | None = None,
    **commit: Any,
) -> str:
    """Upload a folder that a model was just saved to; a card that the repository has is kept.

    Raises:
        ValueError: if the repository has other weights, which might be loaded instead of the new ones, and `replace` is
            False; or if there are `tags`, which only the package writes.
    """
    if tags:
        raise ValueError(
            f"tags must be None for a model loaded with trust_remote_code, got {tags}. Edit its card instead"
        )
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    there = set(api.list_repo_files(repo_id, revision=revision, token=token))
    new = {path.name for path in folder.iterdir()}
    old = sorted(name for name in there - new if name.endswith((".safetensors", _INDEX)))
    if old and not replace:
        raise ValueError(f"{repo_id} holds other weights ({', '.join(old)}). Pass replace=True to remove them")
    commit["commit_message"] = commit.get("commit_message") or "Upload model"
    kept = ["README.md"] if "README.md" in there else None
    return str(
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            token=token,
            revision=revision,
            ignore_patterns=kept,
            delete_patterns=old or None,
            **commit,
        ).commit_url
    )
