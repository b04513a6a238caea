"""An embedder whose modules are incomplete, damaged or code of somebody else is not published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_pairs import save_model
from safetensors.torch import load_file, save_file

from ssm_zoo.conversion.export import export
from ssm_zoo.conversion.publishable import check_publishable

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

WEIGHTS = "2_Dense/model.safetensors"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a pooling, a layer with weights, and a normalisation."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    from ssm_zoo.evaluation.embedder import make_embedder

    folder = tmp_path_factory.mktemp("embedder")
    save_model(folder / "base", "mamba2")
    made: Any = make_embedder(str(folder / "base"), device="cpu")
    made.append(Dense(16, 8))
    made.append(Normalize())
    made.save(str(folder / "saved"))
    return export(folder / "saved", folder / "exported", verify=False)


def module(number: int, **changes: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        modules[number] |= changes
        (folder / "modules.json").write_text(json.dumps(modules))

    return change


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["linear.weight"][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "2_Dense" / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def renamed(folder: Path) -> None:
    (folder / "2_Dense").rename(folder / "dense")
    module(2, path="dense")(folder)


def test_a_whole_embedder_is_published(embedder: Path, tmp_path: Path) -> None:
    check_publishable(embedder)
    folder = shutil.copytree(embedder, tmp_path / "older")
    shutil.rmtree(folder / "3_Normalize")  # older releases of sentence-transformers wrote nothing there
    (folder / "1_Pooling" / ".DS_Store").write_bytes(b"")
    check_publishable(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda f: shutil.rmtree(f / "1_Pooling"), "names 1_Pooling, of which .*config.json", id="missing"),
        pytest.param(with_nan, rf"{WEIGHTS}: 1 of the weights are not finite, first: linear\.weight", id="nan"),
        pytest.param(as_pickle, "of which 2_Dense/pytorch_model.bin is missing or would not be uploaded", id="pickle"),
        pytest.param(renamed, "of which dense/config.json is missing or would not be uploaded", id="renamed"),
        pytest.param(module(1, type="mine.Pooling"), "sentence-transformers alone, got 'mine.Pooling'", id="code"),
        pytest.param(module(1, path="../pooling"), r"`path` must be a folder in .*, got '\.\./pooling'", id="outside"),
    ],
)
def test_a_broken_embedder_is_refused(
    embedder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(embedder, tmp_path / "embedder")
    spoil(folder)
    with pytest.raises(ValueError, match=rf"^FOLDER: .*{message}"):
        check_publishable(folder)
