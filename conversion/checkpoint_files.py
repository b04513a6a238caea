"""Which files of a folder are a checkpoint's, so that replacing the checkpoint deletes nothing else."""

from fnmatch import fnmatchcase
from pathlib import Path

__all__ = ["check_replaceable"]

_PATTERNS = (
    "*config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    ".gitattributes",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
    "plots/*.png",
    "*.py",
)
_SHOWN = 5


def check_replaceable(folder: Path) -> None:
    """Raise a ValueError, with the first names, if a folder holds files that are no part of a checkpoint."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_real_folder(path))
    foreign = [name for name in names if not any(_matches(name, pattern) for pattern in _PATTERNS)]
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise ValueError(
            f"{folder} is not replaced: it also holds {', '.join(foreign[:_SHOWN])}{more}, which would be deleted. "
            "Move them, or write to another folder."
        )


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _matches(name: str, pattern: str) -> bool:
    # A star stands for no slash: what lies in a folder is not what lies beside the weights.
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
