"""What holds for every test: no usage statistics, one thread, interpreted Triton where no CUDA device is."""

import os
import sys

# Read when huggingface_hub and tokenizers are imported, hence before anything else. HF_HUB_OFFLINE stays unset:
# tests talk to a Hub stand-in on their own machine through the real client.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton looks at this when a kernel is decorated, so it has to be set before a kernel file is imported. torch does
# not import triton by itself.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Git tells a hook by these which repository it works on. A `git init` of a test would be about that one, and make a
# work tree's repository bare (core.bare in its configuration).
for name in ("DIR", "COMMON_DIR", "WORK_TREE", "INDEX_FILE", "OBJECT_DIRECTORY", "ALTERNATE_OBJECT_DIRECTORIES"):
    os.environ.pop(f"GIT_{name}", None)

# The tensors of the tests are tiny: more threads only wait for each other, and one thread sums in a fixed order.
torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Refuse a test parametrized over a set: its order differs between processes, which stops pytest-xdist."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        values = mark.args[1] if len(mark.args) > 1 else mark.kwargs.get("argvalues")
        if isinstance(values, set | frozenset):  # views of a dict have an order
            pytest.fail(f"`parametrize({mark.args[0]!r}, ...)` was given a set; sort it.", pytrace=False)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its relatives return with NaN, or the largest integer, or True.

    Uninitialised memory is often zero, which hides an output that a kernel forgot to write. Ask for it with
    `@pytest.mark.usefixtures("poisoned_empty")`.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(float("nan"))
                elif tensor.dtype == torch.bool:
                    tensor.fill_(True)
                else:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return allocate_poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def without_gate_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let selective attention choose in training as in evaluation, so that two runs choose the same tokens."""
    from ssm_zoo.modeling import selective_attention

    monkeypatch.setattr(selective_attention, "logistic_noise", torch.zeros_like)


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of this test's own for the code of checkpoints, which transformers imports as `transformers_modules`.

    That package is imported once a process, from the folder of whichever test came first: a later test with a folder of
    its own would not find its code there. The checkpoint's code registers cache layers of its own with transformers;
    the package's are registered again afterwards, as the later tests' caches are to be made of classes still imported.
    """
    from transformers import cache_utils, dynamic_module_utils

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    folder = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    for table in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING):
        for layer_type, layer in table.items():
            monkeypatch.setitem(table, layer_type, layer)
    forget()
    yield folder
    forget()
