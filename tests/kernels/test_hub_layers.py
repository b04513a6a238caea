"""The layers of the kernel repository: the arguments of what they replace, norms, documents, and what they refuse."""

import inspect
from typing import Any

import pytest
import torch
from sweeps import SWEEP
from torch import Tensor, nn
from transformers.models.jamba import modeling_jamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.llama import modeling_llama
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.zamba import modeling_zamba

from ssm_zoo.kernels import compat, hub_layers
from ssm_zoo.kernels.causal_conv1d import causal_conv1d
from ssm_zoo.kernels.ssd import ssd

# transformers' functions by the name of the layer that replaces them.
MAMBA2 = {
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
    "mamba_chunk_scan_combined": "mamba2_chunk_scan",
    "mamba_split_conv1d_scan_combined": "mamba2_split_conv1d_scan_combined",
    "selective_state_update": "mamba2_selective_state_update",
}
MAMBA = {
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
    "mamba_inner_fn": "mamba_inner_fn",
    "selective_scan_fn": "mamba_selective_scan",
    "selective_state_update": "mamba_selective_state_update",
}
ZAMBA = {name: function for name, function in MAMBA.items() if name != "mamba_inner_fn"}
FUNCTIONS = [
    *((modeling_mamba2, *pair) for pair in MAMBA2.items()),
    *((modeling_mamba, *pair) for pair in MAMBA.items()),
    *((modeling_jamba, *pair) for pair in MAMBA.items()),
    *((modeling_zamba, *pair) for pair in ZAMBA.items()),
]
GATED = [modeling_qwen3_next.Qwen3NextRMSNormGated, modeling_kimi_linear.KimiLinearRMSNormGated]
NORMS = {"RMSNorm": [modeling_llama.LlamaRMSNorm, modeling_jamba.JambaRMSNorm], "RMSNormGated": GATED}
TOLERANCE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def arguments(function: Any) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each argument; a sign for the module that `kernels` makes of a function is left out."""
    parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    return [(each.name, each.kind, each.default) for each in parameters if each.name != "self"]


@pytest.mark.parametrize(
    ("module", "layer", "function"), [pytest.param(*row, id=f"{row[0].__name__[33:]}-{row[1]}") for row in FUNCTIONS]
)
def test_a_layer_has_the_arguments_of_the_function(module: Any, layer: str, function: str) -> None:
    assert arguments(getattr(hub_layers, layer)) == arguments(getattr(module, function))


@pytest.mark.parametrize(("layer", "norm"), [(layer, norm) for layer, norms in NORMS.items() for norm in norms])
def test_a_norm_has_the_arguments_and_the_values_of_the_module(layer: str, norm: type[nn.Module]) -> None:
    replacement = getattr(hub_layers, layer)
    assert [each[:2] for each in arguments(replacement)] == [each[:2] for each in arguments(norm)]
    module = norm(6, eps=1e-3)
    with torch.no_grad():
        module.weight.add_(0.5 * draw(6))
    inputs = [draw(2, 3, 6, seed=seed) for seed in range(len(arguments(norm)))]
    torch.testing.assert_close(replacement.forward(module, *inputs), module(*inputs), **TOLERANCE)
    halves = [each.bfloat16() for each in inputs]
    module.bfloat16()
    assert torch.equal(replacement.forward(module, *halves), module(*halves))


def test_every_layer_is_without_state() -> None:
    allowed = {name for name, _ in inspect.getmembers(nn.Module)} | {"can_torch_compile", "has_backward"}
    for name in hub_layers.__all__:
        layer = getattr(hub_layers, name)
        assert layer.__init__ is nn.Module.__init__
        assert {member for member, _ in inspect.getmembers(layer)} <= allowed


def test_a_gated_norm_refuses_another_activation_and_no_gate() -> None:
    module = modeling_qwen3_next.Qwen3NextRMSNormGated(6)
    with pytest.raises(ValueError, match="gate must be a tensor, got None"):
        hub_layers.RMSNormGated.forward(module, draw(2, 6), None)  # type: ignore[arg-type]
    module.activation = "gelu"
    with pytest.raises(ValueError, match="must be 'silu', 'swish' or 'sigmoid', got 'gelu'"):
        hub_layers.RMSNormGated.forward(module, draw(2, 6), draw(2, 6))


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens", "cu_seq_lens_q"])
def test_convolution_and_scan_keep_documents_apart(name: str) -> None:
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]], dtype=torch.int32)
    packing = {name: seq_idx if name == "seq_idx" else torch.tensor([0, 3, 5, 9], dtype=torch.int32)}
    x, taps = draw(1, 6, 9), draw(6, 4)
    expected = causal_conv1d(x.transpose(1, 2), taps, activation="silu", seq_idx=seq_idx)
    assert isinstance(expected, Tensor)
    got = hub_layers.causal_conv1d_fn()(x, taps, activation="silu", **packing)
    assert torch.equal(got, expected.transpose(1, 2))
    operands = draw(1, 9, 4, 3), draw(1, 9, 4), -draw(4).exp(), draw(1, 9, 2, 5), draw(1, 9, 2, 5, seed=1)
    scan, options = hub_layers.mamba_chunk_scan_combined(), {"D": draw(4), "dt_bias": draw(4, seed=1)}
    assert torch.equal(
        scan(*operands, 256, dt_softplus=True, z=None, **options, **packing),
        ssd(*operands, dt_softplus=True, seq_idx=seq_idx, **options),
    )
    with pytest.raises(ValueError, match=f"{name} must be None for the scan of Mamba-1"):
        hub_layers.selective_scan_fn()(x, x, -taps.exp(), draw(1, 4, 9), draw(1, 4, 9), **packing)


@pytest.mark.parametrize(
    ("rows", "bounds", "message"),
    [
        (2, [0, 3, 9], "cu_seqlens must come with a single row, got 2 rows"),
        (1, [0, 3, 8], "cu_seqlens must rise from 0 to the number of tokens, 9, got"),
        (1, [[0, 3, 9]], r"cu_seqlens must be \(number of sequences \+ 1\)"),
        (1, [0.0, 9.0], "cu_seqlens must have an integer dtype"),
    ],
    ids=["rows", "end", "axes", "dtype"],
)
def test_bounds_that_do_not_fit_are_refused(rows: int, bounds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hub_layers.causal_conv1d_fn()(draw(rows, 6, 9), draw(6, 4), cu_seqlens=torch.tensor(bounds))


def test_the_steps_and_the_gate_are_those_of_the_compatibility_layer() -> None:
    states = draw(2, 6, 4)
    expected = states.clone()
    step = draw(2, 6), draw(2, 6), -draw(6, 4).exp(), draw(2, 4), draw(2, 4, seed=1)
    options = {"D": draw(6), "dt_bias": draw(6, seed=1), "dt_softplus": True, "z": draw(2, 6, seed=2)}
    got = hub_layers.selective_state_update()(states, *step, **options)
    assert torch.equal(got, compat.selective_state_update(expected, *step, **options)) and torch.equal(states, expected)
    x, held, taps = draw(2, 6, 1), draw(2, 6, 4), draw(6, 4)
    kept = held.clone()
    got = hub_layers.causal_conv1d_update()(x, held, taps, None, "silu")
    assert torch.equal(got, compat.causal_conv1d_update(x, kept, taps, None, "silu")) and torch.equal(held, kept)


def compiled_calls() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    packing, x = {"seq_idx": torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)}, draw(1, 6, 9).requires_grad_()
    maps = draw(1, 9, 2, 5), draw(1, 9, 2, 5, seed=1)
    return {
        "causal_conv1d_fn": (hub_layers.causal_conv1d_fn(), (x, draw(6, 4), draw(6), "silu"), packing),
        "bounds": (hub_layers.causal_conv1d_fn(), (x, draw(6, 4)), {"cu_seqlens": torch.tensor([0, 4, 9])}),
        "causal_conv1d_update": (hub_layers.causal_conv1d_update(), (draw(2, 6, 1), draw(2, 6, 4), draw(6, 4)), {}),
        "mamba_chunk_scan_combined": (
            hub_layers.mamba_chunk_scan_combined(),
            (draw(1, 9, 4, 3).requires_grad_(), draw(1, 9, 4), -draw(4).exp(), *maps, 256, draw(4)),
            {"dt_softplus": True, **packing},
        ),
        "selective_scan_fn": (
            hub_layers.selective_scan_fn(),
            (x, draw(1, 6, 9), -draw(6, 5).exp(), draw(1, 5, 9), draw(1, 5, 9, seed=1)),
            {"delta_softplus": True, "z": draw(1, 6, 9, seed=2)},
        ),
        "selective_state_update": (
            hub_layers.selective_state_update(),
            (draw(2, 6, 4), draw(2, 6), draw(2, 6, seed=1), -draw(6, 4).exp(), draw(2, 4), draw(2, 4, seed=1)),
            {"dt_softplus": True},
        ),
    }


@SWEEP
@pytest.mark.parametrize("name", compiled_calls())
def test_a_compiled_layer_gives_the_same_values_and_gradients(name: str) -> None:
    found = []
    for compiled in (False, True):
        layer, operands, options = compiled_calls()[name]
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        y = run(*operands, **options)
        if y.requires_grad:
            y.square().sum().backward()
        found.append([y.detach(), *(each.grad for each in operands if isinstance(each, Tensor) and each.requires_grad)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
