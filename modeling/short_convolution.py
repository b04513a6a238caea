"""The short convolution of the recurrent mixers, as a module."""

from torch import Tensor, nn
from transformers import initialization as init

from ..kernels.causal_conv1d import causal_conv1d, causal_conv1d_step


class ShortConvolution(nn.Conv1d):
    """A causal depthwise convolution: PyTorch's parameters, our op.

    A module that is called, so that hooks on it (offloading, say) see every use of its weights.
    """

    def __init__(self, channels: int, width: int, *, bias: bool, activation: str | None = None) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias)
        self.activation = activation

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None, *, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Convolve along L.

        Args:
            x: (B, L, D) inputs.
            state: (B, D, K-1) the inputs before them.
            seq_idx: (B, L) document of each token, negative at padding.
            in_place: update `state`, which is then needed, in place; L must be 1 and `seq_idx` None.

        Returns:
            (B, L, D) outputs and the (B, D, K-1) state after them.
        """
        weight = self.weight[:, 0]
        if in_place:
            assert state is not None and seq_idx is None
            y = causal_conv1d_step(x[:, 0], state, weight, self.bias, activation=self.activation)
            return y[:, None], state
        y, state = causal_conv1d(
            x,
            weight,
            self.bias,
            activation=self.activation,
            initial_state=state,
            seq_idx=seq_idx,
            return_final_state=True,
        )
        return y, state


def init_short_convolution(convolution: ShortConvolution) -> None:
    """PyTorch's default, U(+-1 / sqrt(K)), for weight and bias."""
    bound = convolution.kernel_size[0] ** -0.5
    init.uniform_(convolution.weight, -bound, bound)
    if convolution.bias is not None:
        init.uniform_(convolution.bias, -bound, bound)
