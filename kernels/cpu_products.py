"""Float32 matrix products by oneDNN on AMD processors with AVX-512, where torch's own take twice as long.

torch's builds for x86 multiply float32 matrices with MKL, which uses AVX-512 on Intel's processors only. oneDNN, which
is in the same builds, uses it on AMD's as well (`benchmarks/kernels/cpu_products.py` measures both).
:func:`fast_products` replaces the CPU kernels of `aten::mm` and `aten::addmm`, by which all linear layers compute their
forward and backward, for the time of a block; compiled graphs call their variants with `out`, which are replaced as
well. Results differ by rounding.

The replaced kernels stay registered after the first block, since torch does not allow a kernel to be removed while
another thread calls it. Outside of blocks they pass each product on to torch's own kernels, which costs 2 to 3
microseconds.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# With fewer channels on either side, reading and writing take longer than the multiplication.
_CHANNELS = 16
# With fewer multiplications, the Python call costs more than oneDNN saves.
_LEAST = 2**21
# Below so many rows a product is bound by reading the weight. From so many entries on oneDNN reads it faster if it has
# the layout of a linear layer's; those of other layouts it would copy.
_FEW_ROWS, _LARGE_WEIGHT = 8, 2**18


class _Blocks:
    """The open blocks of this process, and the replaced kernels."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.library: torch.library.Library | None = None
        self.kernels: dict[str, Any] = {}  # torch's own, by name
        self.on = self.off = 0

    @property
    def fast(self) -> bool:
        return self.on > 0 and self.off == 0

    def replace_kernels(self) -> None:
        if self.library is not None:
            return
        library = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
                for name, kernel in _REPLACEMENTS.items():
                    self.kernels[name] = torch.library.get_kernel(f"aten::{name}", "CPU")
                    library.impl(name, kernel, "CPU")
        except BaseException:
            library._destroy()
            raise
        self.library = library


_blocks = _Blocks()


def products_pay() -> bool:
    """Return whether oneDNN's products are the faster ones: on AMD processors with AVX-512."""
    return _available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


@contextmanager
def fast_products(enabled: bool | None = None) -> Iterator[bool]:
    """Compute float32 matrix products on the CPU by oneDNN within the block, in all threads of the process.

    Args:
        enabled: True: by oneDNN; False: by torch's own kernels, within an outer block too; None: by oneDNN if that pays
            on this machine (:func:`products_pay`), otherwise as outside of the block.

    Yields:
        Whether products are oneDNN's at the begin of the block.

    Raises:
        ValueError: if oneDNN is asked for, and this build of torch has none.
    """
    if enabled and not _available():
        raise ValueError("`enabled` must be False or None, since this build of torch has no oneDNN, got True.")
    wanted = products_pay() or None if enabled is None else enabled
    with _blocks.lock:
        if wanted:
            _blocks.replace_kernels()
        _blocks.on += wanted is True
        _blocks.off += wanted is False
    try:
        yield _blocks.fast
    finally:
        with _blocks.lock:
            _blocks.on -= wanted is True
            _blocks.off -= wanted is False


def products_are_fast() -> bool:
    """Return whether products are oneDNN's now."""
    return _blocks.fast


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _by_onednn(left: Tensor, right: Tensor) -> bool:
    """Return whether a product is large enough to gain, and oneDNN has a fast kernel for the layout of `right`."""
    if not (_blocks.fast and left.dtype is right.dtype is torch.float32 and left.dim() == right.dim() == 2):
        return False
    (rows, inner), (found, columns) = left.shape, right.shape
    if found != inner or rows == 0 or min(inner, columns) < _CHANNELS or left.is_neg() or right.is_neg():
        return False
    if rows < _FEW_ROWS:
        return inner * columns >= _LARGE_WEIGHT and right.stride() == (1, inner)
    return rows * inner * columns >= _LEAST and right.stride() in ((columns, 1), (1, inner))


def _by_torch(name: str, *args: Any, **options: Any) -> Tensor:
    return _blocks.kernels[name].call_boxed(_CPU, *args, **options)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _by_onednn(left, right):
        return torch.ops.mkldnn._linear_pointwise.default(left, right.t(), None, "none", [], "")
    return _by_torch("mm", left, right)


def _mm_out(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    if _by_onednn(left, right) and _fits(out, left, right):
        return out.copy_(torch.ops.mkldnn._linear_pointwise.default(left, right.t(), None, "none", [], ""))
    return _by_torch("mm.out", left, right, out=out)


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    if _by_onednn(left, right) and _plain(bias, right, beta, alpha):
        return torch.ops.mkldnn._linear_pointwise.default(left, right.t(), bias, "none", [], "")
    return _by_torch("addmm", bias, left, right, beta=beta, alpha=alpha)


def _addmm_out(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Tensor) -> Tensor:
    if _by_onednn(left, right) and _plain(bias, right, beta, alpha) and _fits(out, left, right):
        return out.copy_(torch.ops.mkldnn._linear_pointwise.default(left, right.t(), bias, "none", [], ""))
    return _by_torch("addmm.out", bias, left, right, beta=beta, alpha=alpha, out=out)


def _plain(bias: Tensor, right: Tensor, beta: Any, alpha: Any) -> bool:
    plain = beta == 1 and alpha == 1 and bias.dtype is torch.float32 and bias.dim() == 1 and bias.is_contiguous()
    return plain and bias.shape[0] == right.shape[1] and not bias.is_neg()


def _fits(out: Tensor, left: Tensor, right: Tensor) -> bool:
    """Return whether a product may be copied to `out`; torch resizes it otherwise, or says what is wrong."""
    return out.dtype is torch.float32 and out.shape == (left.shape[0], right.shape[1]) and out.device.type == "cpu"


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_REPLACEMENTS = {"mm": _mm, "mm.out": _mm_out, "addmm": _addmm, "addmm.out": _addmm_out}
