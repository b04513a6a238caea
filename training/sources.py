"""Sources of training data: files of rows, data sets of the library `datasets`, texts that ship with the package."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..harness.published import public_argument
from ..harness.text_files import read_json_lines_of, read_text_file

DATASETS, BUILTIN = "datasets:", "builtin:"
ROW_FILES = (".jsonl", ".parquet")
"""Suffixes of the files that :func:`read_rows` reads."""
DATA_SETS = "'datasets:PATH,SPLIT' or 'datasets:PATH,CONFIG,SPLIT'"
"""The data sets that :func:`read_rows` reads, for an error."""

_WEIGHTED = re.compile(r"(.+)@(\d+\.?\d*|\.\d+)", re.DOTALL)
# Rows of a parquet file that are in memory at a time.
_BATCH = 1024


def public_sources(sources: Sequence[str]) -> list[str]:
    """Return names of sources without the folders of this machine; of the two files of parallel text, both names."""

    def public(source: str) -> str:
        if source.startswith(DATASETS):
            return public_argument(source)
        files = source.split(",")
        two = len(files) == 2 and all(Path(file).suffix or Path(file).is_file() for file in files)
        return ",".join(Path(file).name for file in files) if two else Path(source).name

    return list(map(public, sources))


def note_heldout_in_training(train: Sequence[str], heldout: Sequence[str], field: str) -> None:
    """Print a note if there are :func:`heldout_in_training`; `field` is the name of the held-out setting."""
    if found := heldout_in_training(train, heldout):
        tqdm.write(f"{field}: {', '.join(found)} is training text, too. Its loss says nothing about new text.")


def heldout_in_training(train: Sequence[str], heldout: Sequence[str]) -> list[str]:
    """Return the held-out sources that are training sources, too.

    Built-in texts are none of them: they have a part for each.
    """

    def place(source: str) -> str:
        return source if source.startswith(DATASETS) else str(Path(source).resolve())

    plain = [match[1] if (match := _WEIGHTED.fullmatch(source)) else source for source in train]
    places = {place(source) for source in (*train, *plain)}
    return [source for source in heldout if not source.startswith(BUILTIN) and place(source) in places]


def split_weight(source: str) -> tuple[str, float | None]:
    """Split "SOURCE@WEIGHT" into the source and its weight, which is None without "@" and a number at the end.

    Raises:
        ValueError: if there is a file of the whole name, or the weight is 0; the message goes on after "`train`".
    """
    match = _WEIGHTED.fullmatch(source)
    if match is None:
        return source, None
    if Path(source).exists():
        raise ValueError(
            f"must be unambiguous, got {source!r}, a file that reads as {match[1]!r} with the weight {match[2]}; "
            "rename it"
        )
    if float(match[2]) == 0:
        raise ValueError(f"must give a weight above 0, got {source!r}")
    return match[1], float(match[2])


def read_rows(source: str, field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a source, each with its place (source and number) for errors.

    Args:
        source: a `.jsonl` file (a JSON object a line), a `.parquet` file, or a data set that `datasets.load_dataset`
            finds, "datasets:PATH,SPLIT" or "datasets:PATH,CONFIG,SPLIT". A file is read without the network.
        field: what to call the source in an error.

    Raises:
        ValueError: if the source is missing or malformed.
    """
    name = f"{field}: {source!r}"
    if source.startswith(DATASETS):
        for number, row in enumerate(load_data_set(source, field), start=1):
            yield f"{name}, row {number}", row
    elif Path(source).suffix == ".parquet":
        for number, row in enumerate(_read_parquet(source, field), start=1):
            yield f"{name}, row {number}", row
    else:
        for number, row in read_json_lines_of(source, field):
            place = f"{name}, line {number}"
            if not isinstance(row, dict):
                raise ValueError(f"{place} must be an object, got {row!r:.80}.")
            yield place, row


def _read_parquet(source: str, field: str) -> Iterator[dict[str, Any]]:
    # Not `datasets.load_dataset`, which counts on a server every data set that it loads, those in files too.
    import pyarrow
    from pyarrow import parquet

    if not Path(source).is_file():
        read_text_file(source, field)  # says what is wrong
    try:
        with parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{field}: {source!r} cannot be read as parquet: {error}") from None


def load_data_set(source: str, field: str, *, streaming: bool = False) -> Any:
    """Return the data set of "datasets:PATH,SPLIT" or "datasets:PATH,CONFIG,SPLIT".

    Args:
        source: the text.
        field: what to call it in an error.
        streaming: read it while it is used, instead of copying all of it into the cache first.

    Raises:
        ValueError: if the text is neither.
    """
    import datasets
    from datasets import config as datasets_config

    path, *configuration = source.removeprefix(DATASETS).split(",")
    if not path or len(configuration) not in (1, 2):
        raise ValueError(f"`{field}` must be {DATA_SETS}, got {source!r}.")
    *name, split = configuration
    if Path(path).exists():
        datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a data set that is here already needs no server
    load: Any = datasets.load_dataset
    return load(path, *name, split=split, streaming=streaming)


def builtin_text(source: str, part: str, field: str) -> str:
    """Return one part of a text that ships with the package.

    Args:
        source: "builtin:NAME".
        part: "train" or "heldout".
        field: what to call the source in an error.

    Raises:
        ValueError: if there is no such text.
    """
    name, texts = source.removeprefix(BUILTIN), resources.files("ssm_zoo.distill").joinpath("data")
    available = sorted(folder.name for folder in texts.iterdir() if folder.joinpath(f"{part}.txt").is_file())
    if name not in available:
        accepted = ", ".join(f"{BUILTIN}{folder}" for folder in available)
        raise ValueError(f"`{field}` must be {accepted} or the path of a text file, got {source!r}.")
    return texts.joinpath(name, f"{part}.txt").read_text(encoding="utf-8")


def text_at(row: Mapping[str, Any], key: str, place: str) -> str:
    """Return the text in a row's field.

    Args:
        row: the row.
        key: the field.
        place: where the row is.

    Raises:
        ValueError: if the field is missing or holds anything else.
    """
    if key not in row:
        raise ValueError(f"{place}: `{key}` is missing; the row has {', '.join(map(repr, row)) or 'no field'}.")
    if not isinstance(row[key], str):
        raise ValueError(f"{place}: `{key}` must be a text, got {row[key]!r:.80}.")
    return row[key]
