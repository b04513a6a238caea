"""mamba2_step against the two steps that it is made of, and its use by the mixer."""

from typing import Any

import pytest
import torch
from nothing_waits import NothingWaits
from torch import Tensor

from ssm_zoo.kernels import mamba2_step_triton
from ssm_zoo.kernels.causal_conv1d import causal_conv1d_reference
from ssm_zoo.kernels.mamba2_step import mamba2_step
from ssm_zoo.kernels.ssd import ssd_reference
from ssm_zoo.modeling.cache import RecurrentLayer
from tolerances import TOLERANCES
from with_triton import DEVICE, NEEDS_TRITON

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=NEEDS_TRITON)]
SIZES = [  # B, H, P, N, G, K
    pytest.param((1, 1, 1, 1, 1, 2), id="smallest"),
    pytest.param((1, 4, 5, 7, 2, 4), id="one-row"),
    pytest.param((3, 6, 16, 16, 3, 3), id="groups"),
    pytest.param((2, 4, 9, 5, 4, 4), id="a-group-for-each-head"),
    pytest.param((5, 2, 20, 130, 1, 4), id="more-states-than-a-warp"),
    pytest.param((0, 4, 5, 7, 2, 4), id="no-row"),
]
TOKENS = 3
CHANNELS = "xBC must have H P + 2 G N channels,"


def draw(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, wide_skip: bool = False) -> dict[str, Tensor]:
    """Tokens (TOKENS, B, ...) and the rest of the arguments."""
    B, H, P, N, G, K = sizes
    channels = H * P + 2 * G * N
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = {"xBC": (TOKENS, B, channels), "dt": (TOKENS, B, H), "z": (TOKENS, B, H, P)}
    shapes |= {"conv_state": (B, channels, K - 1), "state": (B, H, P, N), "weight": (channels, K), "bias": (channels,)}
    shapes |= {"A_log": (H,), "D": (H, P) if wide_skip else (H,), "dt_bias": (H,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    kept = ("state", "A_log", "D", "dt_bias")
    return {name: value if name in kept else value.to(dtype) for name, value in drawn.items()}


def token(values: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    return {name: value[t] if name in ("xBC", "dt", "z") else value for name, value in values.items()}


def counts(values: dict[str, Tensor], groups: int) -> Tensor:
    return torch.zeros(len(values["state"]), groups, dtype=torch.int32, device=values["state"].device)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.cpu().double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def check(sizes: tuple[int, ...], dtype: torch.dtype, implementation: str, without: tuple[str, ...] = ()) -> None:
    """Outputs and states of several tokens are those of the definitions."""
    H, P, N, G = sizes[1:5]
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.1, 1.5)}
    values = {name: value for name, value in draw(sizes, dtype).items() if name not in without}
    double = {name: value.double() for name, value in values.items()}
    convolved, conv_state = causal_conv1d_reference(
        double["xBC"].transpose(0, 1),
        double["weight"],
        double.get("bias"),
        activation="silu",
        initial_state=double["conv_state"],
        return_final_state=True,
    )
    convolved = convolved.to(dtype).double()  # as the op rounds
    x, B, C = convolved.split([H * P, G * N, G * N], dim=-1)
    y, state = ssd_reference(
        x.unflatten(-1, (H, P)),
        double["dt"].transpose(0, 1),
        -double["A_log"].exp(),
        B.unflatten(-1, (G, N)),
        C.unflatten(-1, (G, N)),
        D=double.get("D"),
        z=double["z"].transpose(0, 1) if "z" in double else None,
        dt_bias=double.get("dt_bias"),
        **options,
        initial_state=double["state"],
        return_final_state=True,
    )
    device = DEVICE if implementation == "triton" else "cpu"
    here = {"bias": None} | {name: value.to(device, copy=True) for name, value in values.items()}
    arrivals = counts(values, G).to(device)
    for t in range(TOKENS):
        found = mamba2_step(**token(here, t), **options, arrivals=arrivals, implementation=implementation)
        assert found.dtype == dtype and found.is_contiguous()
        close(found, y[:, t], dtype, f"y at {t}")
    assert not arrivals.any()
    assert torch.equal(here["conv_state"].cpu(), conv_state.to(dtype))
    close(here["state"], state, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, "the state")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.usefixtures("poisoned_empty")
def test_tokens_equal_the_definitions(sizes: tuple[int, ...], dtype: torch.dtype, implementation: str) -> None:
    check(sizes, dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("without", [("bias",), ("D",), ("z",), ("dt_bias",), ("bias", "D", "z", "dt_bias")], ids=str)
def test_without_optional_arguments(without: tuple[str, ...], implementation: str) -> None:
    check((2, 4, 5, 7, 2, 4), torch.float32, implementation, without)


@NEEDS_TRITON
@pytest.mark.parametrize("whole", [1, 1000], ids=["whole-heads", "tiles"])
@pytest.mark.parametrize("tiles", [((16, 0),), ((4096, 100), (32, 0))], ids=str)
def test_tiles_of_the_width(tiles: Any, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba2_step_triton, "_TILES", tiles)
    monkeypatch.setattr(mamba2_step_triton, "_WHOLE_HEADS", whole)
    check((2, 4, 9, 7, 2, 4), torch.float32, "triton")


@NEEDS_TRITON
def test_tiles_by_the_number_of_programs() -> None:
    assert mamba2_step_triton._tile(24, 64, 128) == (4, 128, 1, 1)  # of mamba2-130m, batch 1
    assert mamba2_step_triton._tile(64, 64, 128) == (32, 128, 1, 4)
    assert mamba2_step_triton._tile(128 * 64, 64, 128) == (32, 128, 2, 4)
    assert mamba2_step_triton._tile(1, 3, 5000) == (1, 8192, 1, 8)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_equals_the_separate_steps(dtype: torch.dtype) -> None:
    """The tokens are views of a projection, and the skip is one of each channel."""
    H, P = 4, 5
    values = token(draw((3, H, P, 7, 2, 4), dtype, wide_skip=True), 0)
    parts = [values["z"].flatten(1), values["xBC"], values["dt"]]
    z, xBC, dt = torch.cat(parts, 1).split([part.shape[1] for part in parts], dim=1)
    values |= {"z": z.unflatten(1, (H, P)), "xBC": xBC, "dt": dt}
    expected = values | {name: values[name].clone() for name in ("conv_state", "state")}
    expected["y"] = mamba2_step(**expected, dt_softplus=True, implementation="torch")
    there = {name: value.to(DEVICE) for name, value in values.items()}
    y = mamba2_step(**there, dt_softplus=True, implementation="triton")
    for name, value in {"y": y, "conv_state": there["conv_state"], "state": there["state"]}.items():
        close(value, expected[name], value.dtype, name)


@NEEDS_TRITON
@pytest.mark.parametrize("name", ["conv_state", "state", "weight", "xBC"])
def test_strided_tensors_go_through_the_separate_steps(name: str) -> None:
    values = token(draw((2, 4, 5, 7, 2, 4)), 0)
    turned = {name: values[name].mT.contiguous().mT}
    with pytest.raises(ValueError, match="implementation='triton' of mamba2_step is not available for these arguments"):
        mamba2_step(**(values | turned), implementation="triton")
    held = {name: values[name].clone() for name in ("conv_state", "state")}
    found, expected = mamba2_step(**(values | turned)), mamba2_step(**(values | {name: values[name].clone()} | held))
    close(found, expected, torch.float32, "y")


@NEEDS_TRITON
def test_two_calls_are_bit_identical() -> None:
    values = {name: value.to(DEVICE) for name, value in token(draw((2, 4, 9, 16, 1, 4)), 0).items()}
    found = []
    for _ in range(2):
        held = {name: values[name].clone() for name in ("conv_state", "state")}
        y = mamba2_step(**(values | held), dt_softplus=True, implementation="triton")
        found.append((y, *held.values()))
    for first, second in zip(*found, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_never_waits_and_its_states_stay(implementation: str) -> None:
    device = DEVICE if implementation == "triton" else "cpu"
    values = {name: value.to(device) for name, value in draw((2, 4, 5, 7, 2, 4)).items()}
    arrivals = counts(values, 2)
    held = {name: values[name] for name in ("conv_state", "state")}
    addresses = {name: value.data_ptr() for name, value in held.items()}
    for t in range(TOKENS):
        before = {name: value.clone() for name, value in held.items()}
        with NothingWaits():
            mamba2_step(**token(values, t), dt_softplus=True, arrivals=arrivals, implementation=implementation)
        assert {name: value.data_ptr() for name, value in held.items()} == addresses
        assert not any(torch.equal(held[name], before[name]) for name in held)


def test_a_step_needs_no_value() -> None:
    values = {name: value.to("meta") for name, value in token(draw((2, 4, 5, 7, 2, 4)), 0).items()}
    with torch.no_grad(), NothingWaits():
        y = mamba2_step(**values, dt_softplus=True)
    assert y.is_meta and y.shape == values["z"].shape


def test_a_gradient_is_recorded_by_torch_alone() -> None:
    values = token(draw((1, 2, 3, 5, 1, 4)), 0)
    values["xBC"].requires_grad_()
    (gradient,) = torch.autograd.grad(mamba2_step(**values).sum(), values["xBC"])
    assert gradient.isfinite().all() and gradient.any()
    with pytest.raises(ValueError, match="implementation='triton' of mamba2_step is not available for these arguments"):
        mamba2_step(**values, implementation="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"state": (1, 2, 3, 4)},
            "xBC must have H P + 2 G N channels, where H = 2, P = 3, N = 4 and G divides H, got 16",
        ),
        (
            {"state": (1, 2, 3, 0)},
            "xBC must have H P + 2 G N channels, where H = 2, P = 3, N = 0 and G divides H, got 16",
        ),
        ({"weight": (16, 1)}, "weight must have at least 2 columns, got 1"),
        ({"arrivals": (1, 2)}, "arrivals must be (B, G) = (1, 1), got shape (1, 2)"),
    ],
)
def test_wrong_sizes(changes: dict[str, tuple[int, ...]], message: str) -> None:
    values = token(draw((1, 2, 3, 5, 1, 4)), 0)
    for name, shape in changes.items():
        values[name] = torch.zeros(shape, dtype=torch.int32 if name == "arrivals" else torch.float32)
    with pytest.raises(ValueError) as caught:
        mamba2_step(**values)
    assert str(caught.value) == message


def test_counts_are_int32() -> None:
    with pytest.raises(ValueError, match=r"^arrivals must be torch\.int32, got torch\.int64$"):
        mamba2_step(**token(draw((1, 2, 3, 5, 1, 4)), 0), arrivals=torch.zeros(1, 1, dtype=torch.long))


def test_a_cache_keeps_its_counts_until_its_rows_change() -> None:
    layer = RecurrentLayer()
    layer.set_states(torch.zeros(2, 16, 3), torch.zeros(2, 2, 3, 5), 4)
    first = layer.step_counts(1)
    assert first.shape == (2, 1) and first.dtype == torch.int32 and not first.any()
    assert layer.step_counts(1) is first
    layer.batch_repeat_interleave(2)
    assert layer.step_counts(1).shape == (4, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_steps() -> None:
    values = {name: value.cuda() for name, value in draw((2, 4, 64, 128, 1, 4), torch.bfloat16).items()}
    arrivals = counts(values, 1)
    held = {name: value.clone() for name, value in token(values, 0).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mamba2_step(**held, dt_softplus=True, arrivals=arrivals)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mamba2_step(**held, dt_softplus=True, arrivals=arrivals)
    for name in ("conv_state", "state"):
        held[name].copy_(values[name])
    for t in range(TOKENS):
        for name in ("xBC", "dt", "z"):
            held[name].copy_(values[name][t])
        graph.replay()
        expected = mamba2_step(**token(values, t), dt_softplus=True, arrivals=arrivals)
        assert torch.equal(y, expected), f"y at {t}"
    assert torch.equal(held["conv_state"], values["conv_state"])
    assert torch.equal(held["state"], values["state"])
