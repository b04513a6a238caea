"""Import Triton, or provide a placeholder that lets kernel files be imported without it.

A kernel file takes `triton` and `tl` from here and starts with `from __future__ import annotations`, so that an
annotation such as `BLOCK: tl.constexpr` is not evaluated where `tl` is None. Without Triton a decorated kernel is
a plain function, which is never called because `checks.choose_implementation` raises an error first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    triton: Any
    tl: Any
    HAS_TRITON: bool
    INTERPRETED: bool
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
        # Triton reads TRITON_INTERPRET when it decorates a kernel, right after this file is imported. Interpreted
        # kernels accept CPU tensors, compiled ones do not.
        INTERPRETED = bool(triton.knobs.runtime.interpret)
    except ImportError:

        class _Absent:
            """Accepts the decorators of kernel files, bare or with options."""

            @staticmethod
            def jit(fn=None, **options):
                return fn if fn is not None else lambda kernel: kernel

        triton, tl, HAS_TRITON, INTERPRETED = _Absent(), None, False, False
