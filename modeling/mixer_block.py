"""The block of models that are a stack of token mixers without an MLP."""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .causal_lm import RMSNorm, normed
from .token_layout import Sequence


class MixerBlock(GradientCheckpointingLayer):
    """norm -> mixer -> add, with the residual stream in float32 if `config.residual_in_fp32`."""

    def __init__(self, config: PreTrainedConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = mixer

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) hidden states to (B, L, D), and the mixer's matrix if asked for."""
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        mixed, attention = self.mixer(normed(self.norm, hidden_states), sequence, past_key_values, output_attentions)
        return residual + mixed, attention
