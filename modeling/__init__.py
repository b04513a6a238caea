"""The model families, registered with transformers' Auto classes."""

import transformers

from . import hub_code
from .configuration_hybrid import ZooHybridConfig
from .configuration_mamba import ZooMambaConfig
from .configuration_mamba2 import ZooMamba2Config
from .configuration_masked_mixer import MaskedMixerConfig
from .configuration_retrieval_mixer import RetrievalMixerConfig
from .configuration_taipan import TaipanConfig
from .modeling_hybrid import (
    ZooHybridForCausalLM,
    ZooHybridForSequenceClassification,
    ZooHybridForTokenClassification,
    ZooHybridModel,
)
from .modeling_mamba import (
    ZooMambaForCausalLM,
    ZooMambaForMaskedLM,
    ZooMambaForSequenceClassification,
    ZooMambaForTokenClassification,
    ZooMambaModel,
)
from .modeling_mamba2 import (
    ZooMamba2ForCausalLM,
    ZooMamba2ForMaskedLM,
    ZooMamba2ForSequenceClassification,
    ZooMamba2ForTokenClassification,
    ZooMamba2Model,
)
from .modeling_masked_mixer import (
    MaskedMixerForCausalLM,
    MaskedMixerForMaskedLM,
    MaskedMixerForSequenceClassification,
    MaskedMixerForTokenClassification,
    MaskedMixerModel,
)
from .modeling_retrieval_mixer import RetrievalMixer
from .modeling_taipan import (
    TaipanForCausalLM,
    TaipanForSequenceClassification,
    TaipanForTokenClassification,
    TaipanModel,
)
from .presets import preset
from .pretrained import ZooPreTrainedModel

ZooPreTrainedModel.publisher = hub_code

for _config, *_classes in (
    (
        ZooMambaConfig,
        ZooMambaModel,
        ZooMambaForCausalLM,
        ZooMambaForMaskedLM,
        ZooMambaForSequenceClassification,
        ZooMambaForTokenClassification,
    ),
    (
        ZooMamba2Config,
        ZooMamba2Model,
        ZooMamba2ForCausalLM,
        ZooMamba2ForMaskedLM,
        ZooMamba2ForSequenceClassification,
        ZooMamba2ForTokenClassification,
    ),
    (
        ZooHybridConfig,
        ZooHybridModel,
        ZooHybridForCausalLM,
        ZooHybridForSequenceClassification,
        ZooHybridForTokenClassification,
    ),
    (
        TaipanConfig,
        TaipanModel,
        TaipanForCausalLM,
        TaipanForSequenceClassification,
        TaipanForTokenClassification,
    ),
    (
        MaskedMixerConfig,
        MaskedMixerModel,
        MaskedMixerForCausalLM,
        MaskedMixerForMaskedLM,
        MaskedMixerForSequenceClassification,
        MaskedMixerForTokenClassification,
    ),
    (RetrievalMixerConfig, RetrievalMixer),
):
    transformers.AutoConfig.register(_config.model_type, _config)
    for _class in _classes:
        _auto = next(auto for auto, name in _class.auto_classes.items() if name == _class.__name__)
        getattr(transformers, _auto).register(_config, _class)

__all__ = [
    "MaskedMixerConfig",
    "MaskedMixerForCausalLM",
    "MaskedMixerForMaskedLM",
    "MaskedMixerForSequenceClassification",
    "MaskedMixerForTokenClassification",
    "MaskedMixerModel",
    "RetrievalMixer",
    "RetrievalMixerConfig",
    "TaipanConfig",
    "TaipanForCausalLM",
    "TaipanForSequenceClassification",
    "TaipanForTokenClassification",
    "TaipanModel",
    "ZooHybridConfig",
    "ZooHybridForCausalLM",
    "ZooHybridForSequenceClassification",
    "ZooHybridForTokenClassification",
    "ZooHybridModel",
    "ZooMamba2Config",
    "ZooMamba2ForCausalLM",
    "ZooMamba2ForMaskedLM",
    "ZooMamba2ForSequenceClassification",
    "ZooMamba2ForTokenClassification",
    "ZooMamba2Model",
    "ZooMambaConfig",
    "ZooMambaForCausalLM",
    "ZooMambaForMaskedLM",
    "ZooMambaForSequenceClassification",
    "ZooMambaForTokenClassification",
    "ZooMambaModel",
    "preset",
]
