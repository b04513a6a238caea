"""The model families, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_hybrid import ZooHybridConfig
from .configuration_mamba2 import ZooMamba2Config
from .modeling_hybrid import ZooHybridForCausalLM, ZooHybridModel
from .modeling_mamba2 import ZooSSDForCausalLM, ZooSSDModel

for _config, _model, _causal_lm in (
    (ZooMamba2Config, ZooSSDModel, ZooSSDForCausalLM),
    (ZooHybridConfig, ZooHybridModel, ZooHybridForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)

__all__ = [
    "ZooHybridConfig",
    "ZooHybridForCausalLM",
    "ZooHybridModel",
    "ZooMamba2Config",
    "ZooSSDForCausalLM",
    "ZooSSDModel",
]
