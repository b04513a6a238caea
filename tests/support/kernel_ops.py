"""The table of ops, with the shapes of their tensors: shared tests of kernels read it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ssm_zoo.kernels import compat
from ssm_zoo.kernels.bounded_attention import (
    BoundedMemory,
    bounded_attention,
    bounded_attention_matrix,
    bounded_attention_reference,
    bounded_attention_step,
)
from ssm_zoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step
from ssm_zoo.kernels.mamba2_step import mamba2_step
from ssm_zoo.kernels.matrix_distance import SSDFactors, row_distances
from ssm_zoo.kernels.position_mix import (
    masked_mix,
    masked_mix_reference,
    masked_mix_step,
    toeplitz_mix,
    toeplitz_mix_reference,
    toeplitz_mix_step,
)
from ssm_zoo.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from ssm_zoo.kernels.selective_scan import selective_scan, selective_scan_reference, selective_scan_step
from ssm_zoo.kernels.ssd import (
    ssd,
    ssd_log_decay,
    ssd_log_decay_reference,
    ssd_log_decay_step,
    ssd_matrix,
    ssd_reference,
    ssd_step,
)
from ssm_zoo.kernels.window_attention import window_attention, window_attention_matrix, window_attention_reference

# Batch, length, heads or channels, head width, groups, states, taps, taps less one, a longer state's places and rows,
# selected tokens
SIZES = {"B": 2, "L": 5, "H": 4, "P": 3, "G": 2, "N": 6, "K": 4, "J": 3, "S": 5, "R": 7, "M": 3}
# Of the compatibility layer: projected inputs and convolved channels of Mamba-2, its H P; 2 H and M + 2 N of Mamba-1;
# outputs, one, all tokens, bounds of a sequence
SIZES |= {"Z": 52, "Y": 36, "X": 12, "W": 8, "V": 15, "O": 5, "I": 1, "T": 9, "Q": 2}
INDICES = ("cu_seqlens", "seq_idx", "cache_seqlens", "state_batch_indices", "conv_state_indices")
COUNTING = ("index", "positions")  # indices too, which have to increase
INTEGERS = (*INDICES, *COUNTING)


@dataclass(frozen=True)
class Op:
    """An op, and its tensors as `name:shape` with a letter for a dimension.

    Attributes:
        op: what is called.
        shapes: the tensors; the others have to be on the device of the first one.
        written: tensors that a successful call writes to.
        options: other arguments.
        sizing: tensors whose sizes are parts of the sizes of others.
    """

    op: Callable[..., Any]
    shapes: str
    written: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sizing: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, str]:
        return dict(entry.split(":") for entry in self.shapes.split())

    def arguments(self) -> dict[str, Any]:
        values = {}
        for name, letters in self.tensors.items():
            shape = [SIZES[letter] for letter in letters]
            if name in COUNTING:
                values[name] = torch.arange(shape[-1]).repeat(*shape[:-1], 1)
            else:
                values[name] = torch.zeros(shape, dtype=torch.long) if name in INDICES else torch.full(shape, -0.5)
        return values | self.options


SSD = "B:BLGN C:BLGN D:HP z:BLHP initial_state:BHPN seq_idx:BL"
SSD_STEP = "B:BGN C:BGN D:HP z:BHP"
SCAN = "x:BLH dt:BLH A:HN B:BLGN C:BLGN D:H z:BLH dt_bias:H initial_state:BHN seq_idx:BL"
CONVOLUTION = "x:BLH weight:HK bias:H initial_state:BHJ seq_idx:BL"
WINDOW = "index:M positions:BL seq_idx:BL"
MIX = "bias:HN residual:BLHP seq_idx:BL"
MIX_STEP = "bias:HN positions:B residual:BHP"
BOUNDED = "q:BLHP k:BLGP v:BLGP seq_idx:BL"
EPS = {"eps": 1e-5}
BOUNDS = {"window": 3, "slots": [1, 2], "sinks": 1, "chunk_size": 2}


@functools.wraps(row_distances)
def _row_distances(queries: torch.Tensor, keys: torch.Tensor, implementation: str = "auto", **factors: Any) -> Any:
    return row_distances(SSDFactors(**factors), queries, keys, 0.7, implementation=implementation)


@functools.wraps(bounded_attention_step)
def _bounded_attention_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, implementation: str = "auto", **memory: torch.Tensor
) -> torch.Tensor:
    options: dict[str, Any] = {"window": 2, "slots": [1, 1], "chunk_size": 2, "implementation": implementation}
    return bounded_attention_step(q, k, v, BoundedMemory(**memory), **options)  # 6 rows


OPS: dict[str, Op] = {
    "ssd": Op(ssd, f"x:BLHP dt:BLH A:H {SSD} dt_bias:H"),
    "ssd_reference": Op(ssd_reference, f"x:BLHP dt:BLH A:H {SSD} dt_bias:H"),
    "ssd_log_decay": Op(ssd_log_decay, f"x:BLHP log_decay:BLH {SSD}"),
    "ssd_log_decay_reference": Op(ssd_log_decay_reference, f"x:BLHP log_decay:BLH {SSD}"),
    "ssd_step": Op(ssd_step, f"x:BHP state:BHPN dt:BH A:H {SSD_STEP} dt_bias:H", ("state",)),
    "ssd_log_decay_step": Op(ssd_log_decay_step, f"x:BHP state:BHPN log_decay:BH {SSD_STEP}", ("state",)),
    "ssd_matrix": Op(ssd_matrix, "log_decay:BLH B:BLGN C:BLGN seq_idx:BL"),
    "selective_scan": Op(selective_scan, SCAN),
    "selective_scan_reference": Op(selective_scan_reference, SCAN),
    "selective_scan_step": Op(
        selective_scan_step, "x:BH state:BHN dt:BH A:HN B:BGN C:BGN D:H z:BH dt_bias:H", ("state",)
    ),
    "causal_conv1d": Op(causal_conv1d, CONVOLUTION),
    "causal_conv1d_reference": Op(causal_conv1d_reference, CONVOLUTION),
    "causal_conv1d_step": Op(causal_conv1d_step, "x:BH weight:HK state:BHJ bias:H", ("state",)),
    "mamba2_step": Op(
        mamba2_step,
        "xBC:BY conv_state:BYJ state:BHPN dt:BH weight:YK bias:Y A_log:H D:HP z:BHP dt_bias:H",
        ("conv_state", "state"),
    ),
    "rms_norm": Op(rms_norm, "x:BH weight:H z:BH", options=EPS),
    "rms_norm_reference": Op(rms_norm_reference, "x:BH weight:H z:BH", options=EPS),
    "add_rms_norm": Op(add_rms_norm, "x:BH residual:BH weight:H", options=EPS),
    "add_rms_norm_reference": Op(add_rms_norm_reference, "x:BH residual:BH weight:H", options=EPS),
    "window_attention": Op(window_attention, f"q:MHP k:BLGP v:BLGP {WINDOW}", options={"window": 2}),
    "window_attention_reference": Op(
        window_attention_reference, f"q:MHP k:BLGP v:BLGP {WINDOW}", options={"window": 2}
    ),
    "window_attention_matrix": Op(window_attention_matrix, f"q:MHP k:BLGP {WINDOW}", options={"window": 2}),
    "bounded_attention": Op(bounded_attention, BOUNDED, options=BOUNDS),
    "bounded_attention_step": Op(
        _bounded_attention_step,
        "q:BHP k:BGP v:BGP keys:BNP values:BNP scores:BN positions:BN",
        ("keys", "values", "scores", "positions"),
    ),
    "bounded_attention_reference": Op(bounded_attention_reference, BOUNDED, options=BOUNDS),
    "bounded_attention_matrix": Op(bounded_attention_matrix, BOUNDED, options=BOUNDS),
    "row_distances": Op(
        _row_distances,
        "log_decay:BLH B:BLGN C:BLGN scale:BLH skip:H queries:BLHP keys:BLHP",
        options={"least_sum": 1e-6},
        sizing=("log_decay",),
    ),
    "masked_mix": Op(masked_mix, f"x:BLHP weight:HNN {MIX}"),
    "masked_mix_reference": Op(masked_mix_reference, f"x:BLHP weight:HNN {MIX}"),
    "masked_mix_step": Op(masked_mix_step, f"history:BLHP weight:HNN {MIX_STEP}"),
    "toeplitz_mix": Op(toeplitz_mix, f"x:BLHP weight:HN {MIX}"),
    "toeplitz_mix_reference": Op(toeplitz_mix_reference, f"x:BLHP weight:HN {MIX}"),
    "toeplitz_mix_step": Op(toeplitz_mix_step, f"history:BLHP weight:HN {MIX_STEP}"),
    "mamba_chunk_scan_combined": Op(
        compat.mamba_chunk_scan_combined,
        f"x:BLHP dt:BLH A:H {SSD} dt_bias:H".replace("initial_state", "initial_states"),
        options={"chunk_size": 4},
    ),
    "selective_scan_fn": Op(compat.selective_scan_fn, "u:BHL delta:BHL A:HN B:BGNL C:BGNL D:H z:BHL delta_bias:H"),
    "mamba_split_conv1d_scan_combined": Op(
        compat.mamba_split_conv1d_scan_combined,
        "zxbcdt:BLZ conv1d_weight:YK conv1d_bias:Y dt_bias:H A:H D:HP initial_states:BHPN seq_idx:BL rmsnorm_weight:X "
        "outproj_weight:OX outproj_bias:O",
        options={"chunk_size": 4, "ngroups": 2},
        sizing=("D",),
    ),
    "mamba_inner_fn": Op(
        compat.mamba_inner_fn,
        "xz:BWL conv1d_weight:HIK conv1d_bias:H x_proj_weight:VH delta_proj_weight:HM out_proj_weight:OH "
        "out_proj_bias:O A:HN D:H delta_bias:H B_proj_bias:N C_proj_bias:N b_rms_weight:N c_rms_weight:N "
        "dt_rms_weight:H",
        sizing=("A",),
    ),
    "layer_norm_fn": Op(compat.layer_norm_fn, "x:BH weight:H bias:H residual:BH x1:BH weight1:H bias1:H"),
    "rms_norm_fn": Op(compat.rms_norm_fn, "x:BH weight:H bias:H residual:BH rowscale:B"),
    "layer_norm_linear_fn": Op(
        compat.layer_norm_linear_fn, "x:BH norm_weight:H norm_bias:H linear_weight:OH linear_bias:O residual:BH"
    ),
    "layernorm_fn": Op(compat.layernorm_fn, "x:BH weight:H bias:H z:BH"),
    "rmsnorm_fn": Op(compat.rmsnorm_fn, "x:BH weight:H bias:H z:BH"),
    "causal_conv1d_varlen_states": Op(
        compat.causal_conv1d_varlen_states, "x:TH cu_seqlens:Q", options={"state_len": 3}
    ),
    "selective_state_update": Op(
        compat.selective_state_update,
        "x:BHP state:BHPN dt:BHP A:HPN B:BGN C:BGN D:HP z:BHP dt_bias:HP",
        ("state",),
    ),
    "selective_state_update of Mamba-1": Op(
        compat.selective_state_update,
        "x:BP state:RPN dt:BP A:PN B:BN C:BN D:P z:BP dt_bias:P state_batch_indices:B",
        ("state",),
    ),
    "causal_conv1d_fn": Op(
        compat.causal_conv1d_fn,
        "x:BHL weight:HK bias:H seq_idx:BL initial_states:BHJ final_states_out:BHJ",
        ("final_states_out",),
        {"return_final_states": True},
    ),
    "causal_conv1d_update": Op(
        compat.causal_conv1d_update, "x:BHL conv_state:BHS weight:HK bias:H cache_seqlens:B", ("conv_state",)
    ),
    "causal_conv1d_update of indexed rows": Op(
        compat.causal_conv1d_update, "x:BH conv_state:RHS weight:HK bias:H conv_state_indices:B", ("conv_state",)
    ),
}
