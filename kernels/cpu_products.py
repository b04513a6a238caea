"""Float32 matrix products by oneDNN on AMD processors with AVX-512, where torch's own take twice as long.

torch's builds for x86 multiply float32 matrices with MKL, which uses AVX-512 on Intel's processors only: on an AMD EPYC
of 2024 a core reaches 110 GFLOP/s with it, and 250 with oneDNN, which is in the same builds
(`benchmarks/kernels/cpu_products.py`). :func:`fast_products` replaces the CPU kernels of `aten::mm` and `aten::addmm`,
by which all linear layers compute their forward and backward, for the time of a block. Results differ by rounding.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# With fewer rows reading the weights takes longer than multiplying.
_ROWS = 8
# Multiplications in a product. For fewer the calls take longer than what they save.
_LEAST = 2**20
_active = 0


def products_pay() -> bool:
    """Return whether oneDNN's products are the faster ones: on x86 processors with AVX-512 that are not Intel's.

    The environment variable `SSM_ZOO_FAST_PRODUCTS` set to 0 says no.
    """
    if os.environ.get("SSM_ZOO_FAST_PRODUCTS") == "0" or not _available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() not in ("GenuineIntel", "")


@contextmanager
def fast_products(enabled: bool | None = None) -> Iterator[bool]:
    """Compute float32 matrix products on the CPU by oneDNN within the block, in all threads of the process.

    Args:
        enabled: whether to do so; None: if it pays on this machine (:func:`products_pay`).

    Yields:
        Whether this block asks for it. It is also done within an outer block that does.

    Raises:
        ValueError: if it is asked for, and this build of torch has no oneDNN.
    """
    global _active
    if enabled and not _available():
        raise ValueError("`enabled` must be False or None, since this build of torch has no oneDNN, got True.")
    if not (products_pay() if enabled is None else enabled):
        yield False
        return
    if _active:  # an outer block has replaced the kernels
        yield True
        return
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            library.impl("mm", _mm, "CPU")
            library.impl("addmm", _addmm, "CPU")
        _active += 1
        yield True
    finally:
        _active -= 1
        library._destroy()


def products_are_fast() -> bool:
    """Return whether a block of :func:`fast_products` is open."""
    return _active > 0


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _taken(left: Tensor, right: Tensor) -> bool:
    """Return whether a product is large enough to gain, and oneDNN has a fast kernel for the layout of `right`."""
    if not (left.dtype is right.dtype is torch.float32 and left.dim() == right.dim() == 2):
        return False
    (rows, inner), (found, columns) = left.shape, right.shape
    if found != inner or rows * inner * columns < _LEAST or rows < _ROWS:
        return False
    return right.stride() in ((columns, 1), (1, inner)) and not (left.is_neg() or right.is_neg())


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _taken(left, right):
        return torch.ops.mkldnn._linear_pointwise.default(left, right.t(), None, "none", [], "")
    # The variant with `out` has a kernel of its own, which is torch's.
    return torch.ops.aten.mm.out(left, right, out=left.new_empty(0))


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    whole = bias.dim() == 1 and bias.shape[0] == right.shape[-1] and bias.is_contiguous()
    if whole and beta == 1 and alpha == 1 and bias.dtype is torch.float32 and _taken(left, right):
        return torch.ops.mkldnn._linear_pointwise.default(left, right.t(), bias, "none", [], "")
    return torch.ops.aten.addmm.out(bias, left, right, beta=beta, alpha=alpha, out=left.new_empty(0))
