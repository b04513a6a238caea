"""The MLP of GPT and of MLP mixers."""

from torch import Tensor, nn
from transformers.activations import ACT2FN


class PlainMLP(nn.Module):
    """`down(act(up(h)))`."""

    def __init__(self, width: int, inner: int, *, act: str, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = ACT2FN[act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(hidden_states)))
