"""Layers without state, which transformers puts in place of its own functions and norms through the package `kernels`.

transformers marks the functions behind its Mamba mixers, and its norms, with names (`use_kernel_forward_from_hub`).
Under such a name a kernel repository offers a class of its module `layers`, and `kernels.kernelize` replaces the
`forward`. This file is that module in the repository that `ssm_zoo.cli.kernel_package` writes.

The classes follow the rules of the Hub (huggingface/kernels, docs/source/kernel-requirements.md): no constructor, no
members besides `forward` and the two flags, and the arguments of what is replaced (transformers 5.24, e.g.
`models/mamba2/modeling_mamba2.py`), in number, kind and name. For norms, `self` is the module of transformers.

The two fused functions of a training step decline by returning None, and transformers' mixer then calls its projections
as modules, with the convolution and the scan of this file between them. The fused forms are given the raw weights of
the projections, past any adapter, and neither padding nor an activation other than SiLU. Computed on our ops, they
would be no faster.

The convolution cannot tell for whom it works. Zamba hands it the documents of packed rows, but not to its scan, which
then mixes them, as it does with mamba_ssm.

Symbols: B batch, L length, D channels, H heads, P head width, G groups, N state size, K convolution width, S sequences.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .checks import accumulator, check_integers
from .compat_conv import causal_conv1d_fn as convolve
from .compat_conv import causal_conv1d_update as convolve_step
from .compat_scan import selective_scan_fn as scan
from .compat_scan import selective_state_update as update
from .rms_norm import rms_norm
from .ssd import ssd
from .tracing import host_reads

__all__ = [
    "RMSNorm",
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]


class RMSNorm(nn.Module):
    """Root-mean-square norm, for modules like `LlamaRMSNorm`.

    In half precision it rounds like `LlamaRMSNorm`, before the multiplication by the weight. Unlike there, the result
    has the dtype of the inputs even if the weight has a wider one.
    """

    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise (..., D) inputs."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class RMSNormGated(nn.Module):
    """Norm followed by a gate, for modules like `Qwen3NextRMSNormGated` and `KimiLinearRMSNormGated`.

    The gate is the module's `activation` of its argument, "silu" ("swish") or "sigmoid"; others raise a ValueError.
    With SiLU it rounds in half precision like `Qwen3NextRMSNormGated`, with a sigmoid once at the end.
    """

    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float
    activation: str

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        """Normalise and gate (..., D) inputs; the gate has their shape."""
        if gate is None:
            raise ValueError("gate must be a tensor, got None")
        if self.activation in ("silu", "swish"):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon, z=gate, norm_before_gate=True)
        if self.activation != "sigmoid":
            raise ValueError(
                f"activation of the gated norm must be 'silu', 'swish' or 'sigmoid', got {self.activation!r}. Take "
                "RMSNormGated out of the kernel mapping."
            )
        sums = accumulator(hidden_states)
        normed = rms_norm(hidden_states.to(sums), self.weight.to(sums), self.variance_epsilon)
        return (normed * torch.sigmoid(gate.to(sums))).to(hidden_states.dtype)


class causal_conv1d_fn(nn.Module):  # noqa: N801
    """Causal depthwise convolution."""

    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Convolve (B, D, L) inputs with (D, K) taps; documents are kept apart, as in :func:`_documents`."""
        _refuse(kwargs, "initial_states", "return_final_states", "final_states_out")
        seq_idx = _documents(kwargs, hidden_states.shape[0], hidden_states.shape[2])
        return convolve(hidden_states, weight, bias, seq_idx=seq_idx, activation=activation)


class causal_conv1d_update(nn.Module):  # noqa: N801
    """Step of the convolution: (B, D, L) inputs; the (B, D, S) state is updated in place, without a gradient."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Any:
        """Convolve a few tokens and update `conv_state`."""
        return convolve_step(hidden_states, conv_state, weight, bias, activation)


class mamba_chunk_scan_combined(nn.Module):  # noqa: N801
    """Scan of Mamba-2."""

    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Scan (B, L, H, P) inputs; documents are kept apart, as in :func:`_documents`.

        `chunk_size` has no effect: the op has its own. A gate `z`, (B, L, H, P), is applied if it is given.
        """
        _refuse(kwargs, "return_varlen_states")
        return ssd(
            hidden_states,
            dt,
            A,
            B,
            C,
            D=D,
            z=kwargs.get("z"),
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_state=initial_states,
            seq_idx=_documents(kwargs, *hidden_states.shape[:2]),
            return_final_state=return_final_states,
        )


class mamba_split_conv1d_scan_combined(nn.Module):  # noqa: N801
    """Declines the fused training step of Mamba-2 (see the module's docstring)."""

    can_torch_compile = True

    def forward(
        self,
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        chunk_size: int,
        initial_states: Tensor | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        activation: str = "silu",
        rmsnorm_weight: Tensor | None = None,
        rmsnorm_eps: float = 1e-6,
        outproj_weight: Tensor | None = None,
        outproj_bias: Tensor | None = None,
        headdim: int | None = None,
        ngroups: int = 1,
        norm_before_gate: bool = True,
        **kwargs: Any,
    ) -> None:
        """Return None, so that the mixer computes the step in its parts."""


class mamba_inner_fn(nn.Module):  # noqa: N801
    """Declines the fused training step of Mamba-1 (see the module's docstring)."""

    can_torch_compile = True

    def forward(
        self,
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        A: Tensor,
        B: Tensor | None = None,
        C: Tensor | None = None,
        D: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = True,
        b_rms_weight: Tensor | None = None,
        c_rms_weight: Tensor | None = None,
        dt_rms_weight: Tensor | None = None,
        b_c_dt_rms_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        """Return None, so that the mixer computes the step in its parts."""


class selective_scan_fn(nn.Module):  # noqa: N801
    """Scan of Mamba-1."""

    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Scan (B, D, L) inputs. The two choices between transformers' own forms have no effect."""
        for name in _DOCUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None for the scan of Mamba-1, which has no documents here")
        return scan(
            hidden_states,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            return_last_state=return_last_state,
        )


class selective_state_update(nn.Module):  # noqa: N801
    """Step of Mamba-1's or Mamba-2's scan; the (B, [H,] P, N) state is updated in place, without a gradient."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run one token of (B, [H,] P) inputs and update `state`."""
        _refuse(kwargs, "state_batch_indices", "dt_limit")
        return update(state, hidden_states, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)


_BOUNDS = ("cu_seqlens", "cu_seq_lens_q")
_DOCUMENTS = ("seq_idx", *_BOUNDS)


def _refuse(options: dict[str, Any], *names: str) -> None:
    """Raise ValueError if an argument is given that the op would need and this layer does not pass on."""
    for name in names:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name} is not supported by this layer. Call the function of the same name instead.")


def _documents(options: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Return the (B, L) document index of each token, from any of the arguments that transformers passes on.

    `seq_idx` is taken as it is. `cu_seqlens` or `cu_seq_lens_q`, (S + 1) bounds of the sequences of a single row, are
    used without it; that they do not decrease is checked on the CPU only.
    """
    if options.get("seq_idx") is not None:
        return options["seq_idx"]
    name = next((name for name in _BOUNDS if options.get(name) is not None), None)
    if name is None:
        return None
    bounds: Tensor = options[name]
    check_integers(name, bounds, (max(bounds.numel(), 2),), "(number of sequences + 1)")
    if batch != 1:
        raise ValueError(f"{name} must come with a single row, got {batch} rows. Pass seq_idx.")
    if host_reads(bounds):
        if int(bounds[0]) != 0 or int(bounds[-1]) != length or bool((bounds.diff() < 0).any()):
            raise ValueError(
                f"{name} must rise from 0 to the number of tokens, {length}, got {bounds.tolist()}. Pass seq_idx."
            )
    else:
        torch._assert_async((bounds[0] == 0) & (bounds[-1] == length))  # pyright: ignore[reportPrivateImportUsage]
    tokens = torch.arange(length, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)[None]
