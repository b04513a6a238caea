"""Compile the Triton kernels that an op launches, for a GPU that is not there.

The ops run on fake tensors, which have shapes and no numbers, so that nothing is computed and no memory is taken. A
stand-in for Triton's driver names the compute capability. A launch compiles its kernel, with Triton's own ptxas, and
is recorded.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ssm_zoo.kernels import checks, ssd_triton, tracing

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# One for all: a fake tensor that a case keeps belongs to its mode.
_FAKE = FakeTensorMode()
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        cubin: machine code.
        source: file of the kernel.
        registers: registers of a thread, from ptxas -v like the next three.
        stack, spill_stores, spill_loads: bytes of a thread.
        shared: bytes of shared memory of a program.
        warps: warps of a program.
    """

    cubin: bytes
    source: Path
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: `file.function`, its binary, the grid, and the arguments by name."""

    kernel: str
    binary: Binary
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        number = 1
        for size in self.grid:
            number *= size
        return number


class _NoDevice:
    """Answers to what Triton asks of a driver before it compiles."""

    class utils:  # noqa: N801 - the name that Triton asks for
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"multiprocessor_count": 132, "max_shared_mem": 227 * 1024}

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled for a device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Pointer:
    """A tensor as Triton specialises for it: its dtype and the alignment of its first element."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return 2**12 + self.offset  # an allocation is aligned


class OfflineCompiler:
    """Compiles and records all launches of a process from its creation on.

    Args:
        capability: compute capability, e.g. 90.
        processors: multiprocessors of the device, on which the number of programs of some launches depends.
    """

    def __init__(self, capability: int, processors: int) -> None:
        self.launches: list[Launch] = []
        self._binaries: dict[str, Binary] = {}
        knobs.nvidia.dump_ptxas_log = True
        driver.set_active(_NoDevice(capability))  # type: ignore[arg-type]
        JITFunction.__getitem__ = lambda kernel, grid: self._launcher(kernel, grid)  # type: ignore[method-assign]
        ssd_triton._INTERPRETED_PROCESSORS, ssd_triton._INTERPRETED_CAPABILITY = processors, capability // 10
        # The ops take fake tensors on the CPU for those of a GPU. Nothing can read their values.
        replacements = {
            checks.choose_implementation: lambda *_, **__: "triton",
            tracing.host_reads: lambda _: False,
        }
        for name, module in list(sys.modules.items()):
            if name.startswith("ssm_zoo.kernels."):
                for attribute, value in list(vars(module).items()):
                    if isinstance(value, Callable) and value in replacements:
                        setattr(module, attribute, replacements[value])

    def record(self, run: Callable[[], Any], fake: bool = True) -> list[Launch]:
        """Call `run`, which makes its tensors itself, and return its launches in order.

        Args:
            run: a call of an op on the CPU.
            fake: whether its tensors are fake; some ops select by masks between launches, which needs values.
        """
        self.launches = []
        with _FAKE if fake else contextlib.nullcontext():
            run()
        return self.launches

    def _launcher(self, kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            pointers = [_Pointer(value) if isinstance(value, Tensor) else value for value in args]
            with _printed() as log:
                compiled = kernel.run(*pointers, grid=grid, warmup=True, **options)
            if compiled.hash not in self._binaries:
                self._binaries[compiled.hash] = _binary(kernel, compiled, log.getvalue())
            sizes: Any = grid(options) if callable(grid) else grid
            name = f"{kernel.module.rpartition('.')[2]}.{kernel.__name__}"
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
            self.launches.append(Launch(name, self._binaries[compiled.hash], tuple(map(int, sizes)), arguments))

        return launch


@contextlib.contextmanager
def _printed() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield text


def _binary(kernel: Any, compiled: Any, log: str) -> Binary:
    used, spilled = _USED.search(log), _SPILLED.search(log)
    if used is None or spilled is None:
        raise RuntimeError(
            f"ptxas reported no registers for {kernel.__name__}. Set TRITON_CACHE_DIR to an empty folder, because "
            "Triton does not run ptxas for a kernel that its cache holds."
        )
    stack, stores, loads = map(int, spilled.groups())
    return Binary(
        cubin=compiled.asm["cubin"],
        source=Path(kernel.fn.__code__.co_filename),
        registers=int(used[1]),
        stack=stack,
        spill_stores=stores,
        spill_loads=loads,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
    )
