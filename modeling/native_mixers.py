"""The Mamba layers of transformers' own models, computed with the ops of this package.

Each function replaces the `forward` of a mixer class of transformers 5.17 and later. It takes the same arguments, uses
the same modules, parameters and cache, and returns the same values, with these exceptions, which are all intended:

* Several tokens after a cached prefix: Mamba-1 continues from the cached state. transformers' own scan ignores it. The
  attention mask may cover the prefix too, as in the hybrids, where Mamba and FalconMamba of transformers take none.
* Documents of packed rows are kept apart in the convolution and in the scan (:mod:`native_packing`).
* `dt_proj` of Mamba-1 is called as a module unless it is a plain linear layer, so that an adapter on it has an effect;
  transformers reads its weight. Likewise in_proj, x_proj and out_proj are always called: the fused functions of
  mamba_ssm that transformers uses in training read their weights and so skip adapters.
* Limits of Mamba-2's step sizes also hold in a step of one token, which transformers does not limit.
* Step sizes are computed in float32 from the projection on, also if the weights have 16 bits.

`use_mambapy` and `use_associative_scan` choose between algorithms for the same result, and have no effect here.

Symbols: B batch, L length, D channels, N state size, G groups, H heads, P head width, K convolution width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.causal_conv1d import causal_conv1d
from ..kernels.checks import accumulator, recorded
from ..kernels.rms_norm import rms_norm
from ..kernels.selective_scan import selective_scan, selective_scan_step
from ..kernels.ssd import ssd, ssd_step
from .native_packing import from_mask


def mamba_forward(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    cache_params: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Compute a mixer of Mamba, FalconMamba or Jamba.

    Args:
        self: the mixer.
        hidden_states: (B, L, width) normed inputs.
        cache: transformers' cache, updated in place.
        attention_mask: (B, L) mask of real tokens, which may carry documents.
        cache_params: name of `cache` before transformers 5.23.
        **kwargs: `seq_idx`, the (B, L) document of each token; others are ignored, as by the original.

    Returns:
        (B, L, width) outputs.
    """
    cache = cache_params if cache is None else cache
    seq_idx, mask = from_mask(attention_mask, kwargs.get("seq_idx"))
    conv_state, state = _states(cache, self.layer_idx)
    x, gate = self.in_proj(_masked(hidden_states, mask)).chunk(2, dim=-1)
    x = _masked(_convolve(self, x, cache, conv_state, seq_idx), mask)
    step, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    if hasattr(self, "dt_layernorm"):
        step, B, C = self.dt_layernorm(step), self.b_layernorm(B), self.c_layernorm(C)
    if type(self.dt_proj) is nn.Linear and not _hooked(self.dt_proj):
        dt, bias = F.linear(step, self.dt_proj.weight), self.dt_proj.bias
    else:  # an adapter, a quantised or a pruned layer: its product includes the bias
        dt, bias = self.dt_proj(step), None
    A = -torch.exp(self.A_log.to(accumulator(x)))
    y = _scan(self, cache, state, (x, dt, A, B[:, :, None], C[:, :, None], self.D, gate, bias), seq_idx)
    return self.out_proj(y.to(hidden_states.dtype))


def zamba_forward(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    cache_params: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Compute a mixer of Zamba: Mamba-1 with H heads, each with projections, maps and a state of its own.

    The heads are the groups of one scan. Inputs and gates alternate in the columns of `in_proj`. See
    :func:`mamba_forward` for the arguments.
    """
    cache = cache_params if cache is None else cache
    seq_idx, mask = from_mask(attention_mask, kwargs.get("seq_idx"))
    conv_state, state = _states(cache, self.layer_idx)
    x, gate = self.in_proj(_masked(hidden_states, mask)).unflatten(-1, (-1, 2)).unbind(-1)
    x = _masked(_convolve(self, x.contiguous(), cache, conv_state, seq_idx), mask)
    heads = x.unflatten(-1, (self.n_mamba_heads, self.mamba_head_dim))
    maps = torch.einsum("blhp,hkp->blhk", heads, self.x_proj_weight)
    step, B, C = maps.split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    dt = torch.einsum("blhr,hpr->blhp", step, self.dt_proj_weight).flatten(2)
    A = -torch.exp(self.A_log.to(accumulator(x))).flatten(0, 1)
    bias = None if self.dt_proj_bias is None else self.dt_proj_bias.flatten()
    held = None if state is None else state.flatten(1, 2)
    shape = (self.n_mamba_heads, self.mamba_head_dim)
    y = _scan(self, cache, held, (x, dt, A, B, C, self.D.flatten(), gate.contiguous(), bias), seq_idx, shape)
    return self.out_proj(y.to(hidden_states.dtype))


def mamba2_forward(
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    cache_params: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Compute a mixer of Mamba-2, Bamba, Zamba2, FalconH1, GraniteMoeHybrid or NemotronH.

    FalconH1 scales the inputs and the projection, and may gate without a norm. See :func:`mamba_forward` for the
    arguments.
    """
    cache = cache_params if cache is None else cache
    seq_idx, mask = from_mask(attention_mask, kwargs.get("seq_idx"))
    conv_state, state = _states(cache, self.layer_idx)
    x = _masked(hidden_states, mask)
    if hasattr(self, "mup_vector"):
        projected = self.in_proj(x * self.ssm_in_multiplier) * self.mup_vector
    else:
        projected = self.in_proj(x)
    gate, convolved, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
    convolved = _masked(_convolve(self, convolved, cache, conv_state, seq_idx), mask)
    maps = self.n_groups * self.ssm_state_size
    x, B, C = convolved.split([self.intermediate_size, maps, maps], dim=-1)
    x = x.unflatten(-1, (self.num_heads, self.head_dim))
    B, C = (each.unflatten(-1, (self.n_groups, self.ssm_state_size)) for each in (B, C))
    normed = getattr(self, "mamba_rms_norm", True)
    z = None if normed else gate.unflatten(-1, (self.num_heads, self.head_dim))
    A = -torch.exp(self.A_log.to(accumulator(x)))
    options = {"dt_softplus": True, "dt_limit": tuple(self.time_step_limit)}
    if state is not None and _one_step(state, x, seq_idx, projected, A, self.D, self.dt_bias):
        vectors = {"D": self.D, "z": None if z is None else z[:, 0], "dt_bias": self.dt_bias}
        held = state.to(accumulator(state))
        y = ssd_step(held, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **vectors, **options)[:, None]
        _store(state, held)
    else:
        vectors = {"D": self.D, "z": z, "dt_bias": self.dt_bias, "seq_idx": seq_idx}
        before = _entering(state, projected, x, A, self.D, self.dt_bias)
        y, final = ssd(x, dt, A, B, C, **vectors, **options, initial_state=before, return_final_state=True)
        if cache is not None:
            cache.update_recurrent_state(final, self.layer_idx)
    y = y.flatten(2)
    return self.out_proj((_gated_norm(self.norm, y, gate) if normed else y).to(hidden_states.dtype))


def _gated_norm(norm: Any, y: Tensor, gate: Tensor) -> Tensor:
    """Apply the norm after the gate; in one op, whose backward takes a fifth of the time, if it is just that."""
    plain = type(norm).__module__.startswith("transformers.") and hasattr(norm, "group_size")
    if not plain or _hooked(norm) or "forward" in vars(norm):  # accelerate replaces it, or a kernel for this module
        return norm(y, gate)
    return rms_norm(y, norm.weight, norm.variance_epsilon, z=gate, group_size=norm.group_size, norm_before_gate=False)


def _hooked(module: nn.Module) -> bool:
    """Return whether a call of the module does more than its `forward`: pruning makes the weight in a hook."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def _states(cache: Any, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the states of the convolution and of the scan of a layer that has seen tokens, otherwise None."""
    if cache is None:
        return None, None
    if hasattr(cache, "get_conv_state"):
        return cache.get_conv_state(layer, state_idx=0), cache.get_recurrent_state(layer, state_idx=0)
    if not cache.has_previous_state(layer):
        return None, None
    return cache.layers[layer].conv_states[0], cache.layers[layer].recurrent_states[0]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set padding to zero as transformers does; a scan and a convolution without bias then pass over it.

    The mask may cover cached tokens too, which come first.
    """
    return x if mask is None else (x * mask[:, -x.shape[1] :, None]).to(x.dtype)


def _convolve(mixer: Any, x: Tensor, cache: Any, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Run the short convolution on (B, L, D) inputs and keep the last ones in the cache."""
    convolution = mixer.conv1d
    if hasattr(convolution, "get_delta_weight") and not (convolution.merged or convolution.disable_adapters):
        raise ValueError(
            "conv1d must not have an adapter, because the convolution reads its weight, got "
            f"{type(convolution).__name__}. Leave conv1d out of target_modules."
        )
    weight = convolution.weight.squeeze(1)
    before = None
    if state is not None:
        before = state[..., max(state.shape[-1] - weight.shape[1] + 1, 0) :].to(x.dtype)
        # A copy, because the state is overwritten below; a cache that records its past may hold fewer inputs.
        before = F.pad(before, (weight.shape[1] - 1 - before.shape[-1], 0)).clone()
    if cache is not None:
        kept = x if seq_idx is None else x.masked_fill((seq_idx < 0)[..., None], 0)
        cache.update_conv_state(kept.transpose(1, 2), mixer.layer_idx, conv_kernel_size=weight.shape[1])
    fused = mixer.activation in ("silu", "swish")
    y = causal_conv1d(
        x, weight, convolution.bias, activation="silu" if fused else None, initial_state=before, seq_idx=seq_idx
    )
    assert isinstance(y, Tensor)
    if fused:
        return y
    y = mixer.act(y)
    return y if seq_idx is None else y.masked_fill((seq_idx < 0)[..., None], 0)


def _scan(
    mixer: Any,
    cache: Any,
    state: Tensor | None,
    operands: tuple[Any, ...],
    seq_idx: Tensor | None,
    heads: tuple[int, int] | None = None,
) -> Tensor:
    """Run Mamba-1's scan from the (B, D, N) state, or a step of it, and update the cache.

    Args:
        mixer: mixer whose layer of the cache is updated.
        cache: cache, or None.
        state: (B, D, N) state, a view of that in the cache where possible; None before the first token.
        operands: x, dt, A, B, C, D, z and bias of the step sizes, as :func:`selective_scan` takes them.
        seq_idx: (B, L) documents.
        heads: axes (H, P) of the cached state in place of D.

    Returns:
        (B, L, D) outputs.
    """
    x, dt, A, B, C, D, z, bias = operands
    if state is not None and _one_step(state, x, seq_idx, *operands):
        held = state.to(accumulator(state))
        vectors = {"D": D, "z": z[:, 0], "dt_bias": bias, "dt_softplus": True}
        y = selective_scan_step(held, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **vectors)[:, None]
        if heads is None:
            _store(state, held)
        else:
            cache.update_recurrent_state(held.unflatten(1, heads), mixer.layer_idx)
        return y
    y, final = selective_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=bias,
        dt_softplus=True,
        initial_state=_entering(state, *operands),
        seq_idx=seq_idx,
        return_final_state=True,
    )
    if cache is not None:
        cache.update_recurrent_state(final if heads is None else final.unflatten(1, heads), mixer.layer_idx)
    return y


def _one_step(state: Tensor, x: Tensor, seq_idx: Tensor | None, *operands: Tensor | None) -> bool:
    """Return whether the one-token step serves: it updates the state in place and records no gradient."""
    return x.shape[1] == 1 and seq_idx is None and not recorded(state, *operands)


def _entering(state: Tensor | None, *operands: Tensor | None) -> Tensor | None:
    """Return the state before the first token; a copy if a backward needs it, because the cache is overwritten."""
    return state.clone() if state is not None and recorded(state, *operands) else state


def _store(state: Tensor, held: Tensor) -> None:
    """Write a state that was computed in a wider dtype back into the cache."""
    if held is not state:
        state.copy_(held)
