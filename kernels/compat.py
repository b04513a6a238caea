"""Drop-in replacements for the functions of mamba_ssm 2.3 and causal-conv1d 1.7, built on the ops of this package.

Names, argument order, layouts, defaults and results are those of the originals (state-spaces/mamba@e9594ce;
causal-conv1d 1.7.0). These versions also support any channel count and stride, packed rows together with initial and
final states, gradients of final states, and CPU tensors. Unsupported arguments raise a ValueError that names them.

Each import corresponds to a file of the originals. mamba_ssm has two files of norms that both define `RMSNorm`; as in
its own modules, the gated classes are called `RMSNormGated` and `LayerNormGated` here.
"""

from __future__ import annotations

from .compat_conv import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from .compat_norm import RMSNorm, layer_norm_fn, layer_norm_linear_fn, rms_norm_fn
from .compat_norm_gated import LayerNorm as LayerNormGated
from .compat_norm_gated import RMSNorm as RMSNormGated
from .compat_norm_gated import layernorm_fn, rmsnorm_fn
from .compat_scan import mamba_inner_fn, selective_scan_fn, selective_state_update
from .compat_ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

__all__ = [
    "LayerNormGated",
    "RMSNorm",
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_fn",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_state_update",
]
