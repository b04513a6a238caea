"""The gated MLP of Llama's blocks, SwiGLU with `act="silu"` (arXiv 2002.05202)."""

from torch import Tensor, nn
from transformers.activations import ACT2FN


class GatedMLP(nn.Module):
    """`down(act(gate(h)) * up(h))`."""

    def __init__(self, width: int, inner: int, *, act: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = ACT2FN[act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
