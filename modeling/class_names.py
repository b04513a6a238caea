"""The classes in transformers' tables of names, by which its Trainer and its pipelines decide what a model is.

`Trainer(label_smoothing_factor=...)` shifts the labels of a model whose class name is in the table of causal language
models, and of no other. The registry of the Auto classes does not fill these tables, nor does loading exported code.
"""

from transformers.models.auto import modeling_auto

_TABLES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


def enter_class_name(auto_class: str, name: str) -> None:
    """Put a class into the table of an Auto class, under its own name: there may be several of one model type."""
    _TABLES[auto_class][name] = name
