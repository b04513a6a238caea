"""A stack of leaky sums."""

from torch import nn
from transformers import GenerationMixin

from .backbone import ZooModel
from .configuration_leaky import LeakyConfig
from .heads import ZooForCausalLM, ZooForSequenceClassification, ZooForTokenClassification
from .layers import MixerBlock
from .leaky import LeakySum
from .pretrained import ZooPreTrainedModel


class LeakyPreTrainedModel(ZooPreTrainedModel):
    """What the family's models share."""

    config: LeakyConfig
    config_class = LeakyConfig
    _no_split_modules = ["MixerBlock"]


class LeakyModel(LeakyPreTrainedModel, ZooModel):
    """Without a head."""

    norm_eps = "layer_norm_epsilon"

    def make_block(self, config: LeakyConfig, layer_idx: int) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return MixerBlock(config, LeakySum(config.hidden_size, config.num_attention_heads, layer_idx))


class LeakyForCausalLM(LeakyPreTrainedModel, ZooForCausalLM, GenerationMixin):
    """With a language-modelling head."""

    backbone_class = LeakyModel


class LeakyForSequenceClassification(LeakyPreTrainedModel, ZooForSequenceClassification):
    """With a score for each row."""

    backbone_class = LeakyModel


class LeakyForTokenClassification(LeakyPreTrainedModel, ZooForTokenClassification):
    """With labels for each token."""

    backbone_class = LeakyModel


__all__ = ["LeakyForCausalLM", "LeakyForSequenceClassification", "LeakyForTokenClassification", "LeakyModel"]
