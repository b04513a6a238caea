"""transformers' own tests of a model, run on every family."""

import unittest
from typing import Any

import torch
from families import ENCODERS, FAMILIES, Family
from library_tests import TRANSFORMERS
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ssm_zoo.modeling.attention import Attention

common = TRANSFORMERS.module("test_modeling_common")
configuration = TRANSFORMERS.module("test_configuration_common")
training = TRANSFORMERS.module("test_training_mixin")
generation = TRANSFORMERS.module("generation.test_utils")
causal_lm = TRANSFORMERS.module("causal_lm_tester")

# The tests know a class's labels by its name in these tables, which no package outside transformers can extend.
for _auto_class, _table in {
    AutoModel: "MODEL_MAPPING_NAMES",
    AutoModelForCausalLM: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    AutoModelForMaskedLM: "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    AutoModelForSequenceClassification: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    AutoModelForTokenClassification: "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}.items():
    _ours = {kind.model_type: made.__name__ for kind, made in _auto_class._model_mapping._extra_content.items()}
    setattr(common, _table, getattr(common, _table) | _ours)


class FamilyTester(causal_lm.CausalLMModelTester):
    """What the mixins ask for: a configuration, classes, and inputs with right-padded rows, as their own have."""

    family: Family
    batch_size, seq_length, is_training = 3, 7, True
    num_labels = type_sequence_label_size = 3

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        config = self.get_config()
        self.config_class = type(config)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if hasattr(config, name):
                setattr(self, name, getattr(config, name))
        self.base_model_class = self.family.backbone
        self.causal_lm_class = None if is_encoder(config) else self.family.causal_lm
        self.sequence_classification_class = class_of(AutoModelForSequenceClassification, config)
        self.token_classification_class = class_of(AutoModelForTokenClassification, config)
        self.question_answering_class = None

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        classes = [self.base_model_class, self.causal_lm_class, self.sequence_classification_class]
        classes += [self.token_classification_class]
        if is_encoder(self.get_config()):
            classes.append(class_of(AutoModelForMaskedLM, self.get_config()))
        return tuple(kind for kind in classes if kind is not None)

    @property
    def pipeline_model_mapping(self) -> dict[str, Any]:
        return {}

    def get_config(self) -> Any:
        return self.family.config(pad_token_id=0)

    def prepare_config_and_inputs(self) -> tuple:
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(ids).tril(self.seq_length - self.batch_size)
        labels = common.ids_tensor([self.batch_size], self.num_labels)
        token_labels = common.ids_tensor([self.batch_size, self.seq_length], self.num_labels)
        return self.get_config(), ids, None, mask, labels, token_labels, None

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config, ids, _, mask, *_ = self.prepare_config_and_inputs()
        return config, {"input_ids": ids, "attention_mask": mask}


def is_encoder(config: Any) -> bool:
    return getattr(config, "bidirectional", False)


def class_of(auto_class: Any, config: Any) -> type | None:
    return auto_class._model_mapping.get(type(config), None)


class ModelContract(common.ModelTesterMixin, training.TrainingTesterMixin):
    """Tests of every model. A class per family is made below."""

    model_tester: Any = None
    model_tester_class: type[FamilyTester]

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = self.model_tester_class(self)  # pyright: ignore[reportArgumentType]
        self.all_model_classes = self.model_tester.all_model_classes
        self.config_tester = configuration.ConfigTester(self, config_class=self.model_tester.config_class)  # pyright: ignore

    # The default rate is one for models ten times as wide.
    training_overfit_learning_rate = 1e-2

    def _check_attentions_for_generate(
        self, batch: int, attentions: Any, prompt: int, length: int, config: Any, cache: Any
    ) -> None:
        """As theirs, but layers may differ in their number of heads, and a block without a mixer has no matrix."""
        assert len(attentions) == length - prompt
        for step, layers in enumerate(attentions):
            columns = prompt + step
            rows = 1 if cache is not None and step else columns
            assert len(layers) == config.num_hidden_layers
            kinds = getattr(config, "mixer_types", None) or [""] * len(layers)
            for matrix, kind in zip(layers, kinds, strict=True):
                assert (matrix is None) == (kind == "none")
                assert matrix is None or (matrix.shape[0], *matrix.shape[2:]) == (batch, rows, columns)

    def _check_past_key_values_for_generate(self, batch: int, cache: Any, length: int | None, config: Any) -> None:
        """As theirs asks for where layers of a cache are not transformers' own."""
        assert len(cache.layers) == config.num_hidden_layers
        for layer, kind in zip(cache.layers, config.layer_types, strict=True):
            assert layer.get_seq_length() == length
            if kind.startswith("zoo_"):
                assert layer._layer_type == kind
                assert all(
                    getattr(layer, name) is None or len(getattr(layer, name)) == batch for name in layer._tensors
                )
            else:
                assert layer.keys.shape == layer.values.shape
                assert layer.keys.shape[0] == batch and layer.keys.shape[2] == length

    def _check_caches_are_equal(self, first: Any, second: Any) -> None:
        """As theirs asks for where layers of a cache are not transformers' own."""
        assert len(first.layers) == len(second.layers)
        for one, other in zip(first.layers, second.layers, strict=True):
            assert type(one) is type(other)
            for name in getattr(one, "_tensors", ("keys", "values")):
                torch.testing.assert_close(getattr(one, name), getattr(other, name))


class GenerationContract(ModelContract, causal_lm.CausalLMModelTest, generation.GenerationTesterMixin):
    """Those of `generate` and of a causal language model as well."""


def without_softmax_attention(self: unittest.TestCase) -> None:
    """Stand for one of two dozen comparisons of implementations of softmax attention."""
    self.skipTest("No softmax attention")


def contract(name: str, family: Family, base: type) -> type:
    tester = type("Tester", (FamilyTester,), {"family": family})
    body: dict[str, Any] = {"model_tester_class": tester, "__module__": __name__}
    if not any(isinstance(module, Attention) for module in family.backbone(family.config()).modules()):
        body |= {test: without_softmax_attention for test in dir(base) if test.startswith("test_eager_matches")}
    made = type(name, (base, unittest.TestCase), body)
    made.__abstractmethods__ = frozenset()  # a mixin's abstract property, which is an attribute here
    return made


for _name, _family in FAMILIES.items():
    globals()[f"Test_{_name}"] = contract(f"Test_{_name}", _family, GenerationContract)
for _name, _family in ENCODERS.items():
    globals()[f"Test_{_name}"] = contract(f"Test_{_name}", _family, ModelContract)
