"""Mamba-2's and Mamba-1's mixer as functions of an input and of parameters that both sides share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from ssm_zoo.kernels.causal_conv1d import causal_conv1d
from ssm_zoo.kernels.selective_scan import selective_scan
from ssm_zoo.modeling import ZooMamba2Config, ZooMamba2Model

# Kept in float32 whatever the dtype of the rest, as mamba_ssm asks for and our models do.
IN_FLOAT32 = ("A_log", "D", "dt_bias")


@dataclass(frozen=True)
class Parts:
    """A mixer of ours and transformers' own, as functions (x, parameters) -> y over the same parameter names."""

    module: nn.Module  # transformers'
    ours: Callable[[Tensor, dict[str, Tensor]], Tensor]

    def theirs(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(self.module, parameters, (x,))

    def parameters(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {
            name: parameter.detach().to(device, torch.float32 if name in IN_FLOAT32 else dtype, copy=True)
            for name, parameter in sorted(self.module.named_parameters())
        }


@lru_cache(maxsize=2)
def mamba2_parts(width: int) -> Parts:
    """Return Mamba-2 with heads of 64 (16 if the width is below 128), 128 states and one group."""
    head = 64 if width >= 128 else 16
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "state_size": 128,
        "num_heads": 2 * width // head,
        "head_dim": head,
        "n_groups": 1,
    }
    theirs = Mamba2Mixer(Mamba2Config(**sizes, num_hidden_layers=1), layer_idx=0)
    model = ZooMamba2Model(ZooMamba2Config(**sizes, num_hidden_layers=1, vocab_size=8))
    mixer = model.layers[0].get_submodule("mixer")
    with torch.no_grad():
        theirs.out_proj.weight.normal_(std=0.02)

    def ours(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        y, _ = functional_call(mixer, parameters, (x, model.sequence_of(x)))
        return y

    return Parts(theirs, ours)


@lru_cache(maxsize=2)
def mamba1_parts(width: int) -> Parts:
    """Return Mamba-1 with 16 states and a step size rank of a sixteenth of the width; our side consists of our ops."""
    theirs = MambaMixer(MambaConfig(hidden_size=width, num_hidden_layers=1), layer_idx=0)
    states, rank = theirs.ssm_state_size, theirs.time_step_rank

    def ours(hidden: Tensor, p: dict[str, Tensor]) -> Tensor:
        x, z = F.linear(hidden, p["in_proj.weight"]).chunk(2, dim=-1)
        x = causal_conv1d(x, p["conv1d.weight"][:, 0], p["conv1d.bias"], activation="silu")
        assert isinstance(x, Tensor)
        step, B, C = F.linear(x, p["x_proj.weight"]).split([rank, states, states], dim=-1)
        dt = F.linear(step, p["dt_proj.weight"])
        A = -torch.exp(p["A_log"])
        y = selective_scan(
            x, dt, A, B[:, :, None], C[:, :, None], D=p["D"], z=z, dt_bias=p["dt_proj.bias"], dt_softplus=True
        )
        assert isinstance(y, Tensor)
        return F.linear(y, p["out_proj.weight"])

    return Parts(theirs, ours)
