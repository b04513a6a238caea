"""The models of `synthetic.py`: two layers each, and as many parameters as Mamba within 5 %.

Every arm reads tokens by an embedding, or vectors by a linear layer, and ends in a linear read-out of its own. Mamba's
width is given; the others are made equal by their width, the Transformer by that of its MLP.

`s4d` and `s4d_real` are time-invariant controls, Mamba's block around a recurrence that does not depend on the input
(table 1 of arXiv 2312.00752); `gru` is a nonlinear recurrence, which can count modulo any number.

Symbols: B batch, T tokens, D width, E inner width, N state size.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ssm_zoo.modeling import (
    ZooHybridConfig,
    ZooHybridModel,
    ZooMamba2Config,
    ZooMamba2Model,
    ZooMambaConfig,
    ZooMambaModel,
)
from ssm_zoo.modeling.modeling_mamba import MambaMixer

MAMBA, MAMBA2, TRANSFORMER = "mamba", "mamba2", "transformer"
S4D, S4D_REAL, GRU = "s4d", "s4d_real", "gru"
# Words of each arm.
ARMS = {
    MAMBA: "Mamba (S6)",
    MAMBA2: "Mamba-2",
    TRANSFORMER: "Transformer, RoPE",
    S4D: "Mamba's block, time-invariant (S4D)",
    S4D_REAL: "Mamba's block, time-invariant, real decays",
    GRU: "GRU (control)",
}
LAYERS = 2
# State size of the Mambas and of S4D, channels of an attention head.
STATE, HEAD = 16, 16
# The largest difference of the numbers of parameters, in parts of Mamba's.
EQUAL = 0.05


class TimeInvariantMixer(MambaMixer):
    """Mamba's mixer whose step sizes, B and C are parameters: a convolution along the sequence with one kernel per
    channel, k_t = Re(sum_n C_n exp(dt A_n t)) dt, and no cache.

    It is S4D with the input rule of Mamba (Gu et al., arXiv 2206.11893); B is 1, as C has a value of its own for every
    channel and state.

    Args:
        config: sizes.
        layer_idx: the layer's number.
        rotating: A begins as -1/2 + i pi n (S4D-Lin); otherwise it is real and begins as -(n + 1), like Mamba's.
    """

    def __init__(self, config: ZooMambaConfig, layer_idx: int, rotating: bool) -> None:
        super().__init__(config, layer_idx)
        with torch.no_grad():
            self.initialise()
        inner, states = config.intermediate_size, config.state_size
        self.dt_bias = nn.Parameter(self.dt_proj.bias.detach().clone())
        del self.x_proj, self.dt_proj
        parts = 2 if rotating else 1
        self.C = nn.Parameter(torch.randn(parts, inner, states) * parts**-0.5)
        self.angles = None
        if rotating:
            self.A_log = nn.Parameter(torch.full((inner, states), 0.5).log())
            self.angles = nn.Parameter(math.pi * torch.arange(states).expand(inner, states).clone())

    def kernel(self, length: int) -> Tensor:
        """Return the (E, T) responses to one input, at the time of the input first."""
        dt = nn.functional.softplus(self.dt_bias)[:, None]
        rates = -self.A_log.float().exp() * dt
        times = torch.arange(length, device=dt.device)[:, None, None]
        decays = (times * rates).exp()
        if self.angles is None:
            return dt * torch.einsum("ten,en->et", decays, self.C[0])
        turns = times * (self.angles * dt)
        real, imaginary = self.C
        return dt * (
            torch.einsum("ten,en->et", decays * turns.cos(), real)
            - torch.einsum("ten,en->et", decays * turns.sin(), imaginary)
        )

    def scan(
        self, x: Tensor, z: Tensor, sequence: Any, cache: Any = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, E) inputs and gates to (B, T, E) gated outputs."""
        if cache is not None or output_attentions or sequence.seq_idx is not None:
            raise ValueError("a time-invariant mixer has no cache, matrix or documents: call it without them")
        x, _ = self.conv1d(x)
        return (convolve(x, self.kernel(x.shape[1])) + self.D * x) * nn.functional.silu(z), None


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the (B, T, E) causal convolutions of (B, T, E) inputs with (E, T) kernels."""
    size = 2 * x.shape[1]
    spectrum = torch.fft.rfft(x, size, dim=1) * torch.fft.rfft(kernel, size).T
    return torch.fft.irfft(spectrum, size, dim=1)[:, : x.shape[1]]


class Recurrent(nn.Module):
    """A GRU of two layers with the interface of the other backbones."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.GRU(width, hidden, LAYERS, batch_first=True)

    def forward(self, embeddings: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T, D) embeddings and the state before them to (B, T, H) outputs and the state after them."""
        return self.layers(embeddings, state)


class SequenceModel(nn.Module):
    """A backbone between a read-in and a read-out.

    Args:
        backbone: a model of the package, or `Recurrent`.
        inputs: number of tokens, or of components of a vector.
        outputs: number of classes or of predicted numbers.
        width: D of the read-in.
        final: width of the backbone's outputs.
        vectors: inputs are vectors, otherwise ids.
    """

    def __init__(self, backbone: Any, inputs: int, outputs: int, width: int, final: int, *, vectors: bool) -> None:
        super().__init__()
        self.read_in = nn.Linear(inputs, width) if vectors else nn.Embedding(inputs, width)
        self.backbone = backbone
        self.read_out = nn.Linear(final, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T) ids or (B, T, inputs) vectors to (B, T, outputs)."""
        return self.read_out(self.hidden(inputs)[0])

    def hidden(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the (B, T, H) outputs of the backbone and the state after them: the GRU's, or the cache given."""
        embeddings = self.read_in(inputs)
        if isinstance(self.backbone, Recurrent):
            return self.backbone(embeddings, state)
        found = self.backbone(inputs_embeds=embeddings, cache=state, use_cache=state is not None)
        return found.last_hidden_state, state

    def last(self, inputs: Tensor, chunk: int) -> Tensor:
        """Return the (B, outputs) of the last position, reading `chunk` positions at a time through the cache."""
        state = None if isinstance(self.backbone, Recurrent) else DynamicCache(config=self.backbone.config)
        hidden = None
        for part in inputs.split(chunk, dim=1):
            hidden, state = self.hidden(part, state)
        assert hidden is not None
        return self.read_out(hidden[:, -1])


@dataclass(frozen=True)
class Sizes:
    """Numbers of inputs and outputs of a task, whether inputs are vectors, and Mamba's width."""

    inputs: int
    outputs: int
    vectors: bool
    width: int


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def make(arm: str, sizes: Sizes, seed: int) -> SequenceModel:
    """Return a freshly initialised model.

    Projections of all arms begin as torch's linear layers, U(+-1 / sqrt(fan in)), and embeddings as N(0, 1); the rest
    as the family has it.

    Raises:
        ValueError: if the arm cannot be made equal in parameters at these sizes.
    """
    fit = fitting(arm, sizes)
    torch.manual_seed(seed)
    return build(arm, sizes, fit)


@cache
def fitting(arm: str, sizes: Sizes) -> int:
    """Return the size that makes the arm equal to Mamba in parameters."""
    if arm == MAMBA:
        return sizes.width
    wanted, counts = counted(MAMBA, sizes, sizes.width), partial(counted, arm, sizes)
    if arm == TRANSFORMER:  # linear in the MLP's width
        fit = max(1 + round((wanted - counts(1)) / (counts(2) - counts(1))), 1)
    else:
        fits = range(sizes.width // 2, 2 * sizes.width)
        above = bisect_left(fits, wanted, key=counts)
        fit = min(fits[max(above - 1, 0) : above + 1], key=lambda fit: abs(counts(fit) - wanted))
    if abs(counts(fit) - wanted) > EQUAL * wanted:
        raise ValueError(
            f"sizes must let {arm} have the parameters of {MAMBA} ({wanted}) within {EQUAL:.0%}, got {counts(fit)} "
            f"with {sizes}"
        )
    return fit


@cache
def counted(arm: str, sizes: Sizes, fit: int) -> int:
    """Return the number of parameters of `build`."""
    with torch.device("meta"):
        return parameters(build(arm, sizes, fit))


def build(arm: str, sizes: Sizes, fit: int) -> SequenceModel:
    """Return the arm with `fit` as the size that `fitting` chooses."""
    width, final = (sizes.width, sizes.width) if arm == TRANSFORMER else (fit, fit)
    if arm == GRU:
        width = sizes.width
    backbone = Recurrent(width, fit) if arm == GRU else _backbone(arm, width, fit)
    return SequenceModel(backbone, sizes.inputs, sizes.outputs, width, final, vectors=sizes.vectors)


def _backbone(arm: str, width: int, mlp: int) -> nn.Module:
    """Return the blocks of an arm, without an embedding."""
    common: dict[str, Any] = {"vocab_size": 1, "hidden_size": width, "num_hidden_layers": LAYERS}
    if arm == TRANSFORMER:
        heads = {"intermediate_size": mlp, "num_attention_heads": max(width // HEAD, 1)}
        backbone: Any = ZooHybridModel(ZooHybridConfig(**common, **heads))
        for module in backbone.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    elif arm == MAMBA2:
        backbone = ZooMamba2Model(ZooMamba2Config(**common, state_size=STATE, head_dim=width))
    else:
        config = ZooMambaConfig(**common, state_size=STATE)
        backbone = ZooMambaModel(config)
        if arm in (S4D, S4D_REAL):
            for index, block in enumerate(backbone.layers):
                block.mixer = TimeInvariantMixer(config, index, rotating=arm == S4D)
    backbone.set_input_embeddings(nn.Identity())
    return backbone
