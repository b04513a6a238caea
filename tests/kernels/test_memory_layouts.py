"""An op has the same results and gradients however its tensors lie in memory, for every op of the table."""

import inspect
from collections.abc import Callable

import pytest
import torch
from kernel_ops import COUNTING, INDICES, OPS, SIZES
from torch import Tensor

from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON

IMPLEMENTED = [key for key, op in OPS.items() if "implementation" in inspect.signature(op.op).parameters]
# Steps whose kernels take contiguous tensors only, or do not run under the interpreter.
CONTIGUOUS = ("mamba2_step", "bounded_attention_step", "masked_mix_step", "toeplitz_mix_step")
CASES = [
    *(pytest.param(key, None, id=key) for key in OPS),
    *(
        pytest.param(key, "triton", id=f"{key}-triton", marks=NEEDS_TRITON)
        for key in IMPLEMENTED
        if key not in CONTIGUOUS
    ),
]
INTEGERS = {
    "seq_idx": [[0, 0, 1, -1, 1], [-1, 0, 0, 2, 2]],
    "index": [1, 4, 7],
    "positions": [[0, 2, -1, 3, 7], [-1, 1, 2, 4, 5]],
    "cu_seqlens": [0, 7],
    "cache_seqlens": [3, 6],
    "state_batch_indices": [4, 1],
    "conv_state_indices": [4, 1],
}


def axes_reversed(x: Tensor) -> Tensor:
    order = range(x.dim() - 1, -1, -1)
    return x.permute(*order).contiguous().permute(*order)


def every_other(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), 77)
    wide[..., 3::2] = x
    return wide[..., 3::2]


def values(key: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, letters in OPS[key].tensors.items():
        shape = [SIZES[letter] for letter in letters]
        if name in (*INDICES, *COUNTING):
            given = torch.tensor(INTEGERS[name])
            # Positions of a memory, and numbers of the tokens before a step.
            found[name] = given if list(given.shape) == shape else torch.arange(shape[-1]).repeat(*shape[:-1], 1)
            continue
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name in ("A", "log_decay"):
            x = -x.abs() - 0.1
        if name in ("dt", "delta", "scale"):
            x = x.abs() + 0.1
        if key == "row_distances" and name in ("B", "C"):  # so that the sums of rows are not near zero
            x = x.abs()
        found[name] = x.to(dtype)
    return found


def run(key: str, implementation: str | None, layout: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    op, device = OPS[key], DEVICE if implementation == "triton" else "cpu"
    dtype = torch.float32 if implementation == "triton" else torch.float64
    given = {name: layout(x.to(device)) for name, x in values(key, dtype).items()}
    leaves = {name: x.requires_grad_() for name, x in given.items() if x.is_floating_point() and not op.written}
    options = op.options if implementation is None else op.options | {"implementation": implementation}
    results = op.op(**given, **options)
    parts = results if isinstance(results, tuple) else (results,)
    found = {f"result {number}": part for number, part in enumerate(parts) if isinstance(part, Tensor)}
    recorded = [part for part in found.values() if part.requires_grad]
    if recorded:
        weights = [torch.linspace(-1, 1, part.numel(), device=device, dtype=part.dtype) for part in recorded]
        loss = sum((part.flatten() * weight).sum() for part, weight in zip(recorded, weights, strict=True))
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True) if x is not None}
    return {name: x.detach() for name, x in (found | {name: given[name] for name in op.written}).items()}


@pytest.mark.parametrize("layout", [axes_reversed, every_other])
@pytest.mark.parametrize(("key", "implementation"), CASES)
def test_memory_layouts_make_no_difference(
    key: str, implementation: str | None, layout: Callable[[Tensor], Tensor]
) -> None:
    expected = run(key, implementation, Tensor.clone)
    found = run(key, implementation, layout)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        rtol, atol = TOLERANCES[x.dtype] if x.is_floating_point() else (0, 0)
        torch.testing.assert_close(
            x, expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
