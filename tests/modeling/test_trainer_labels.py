"""transformers decides by class names: which labels its Trainer shifts and counts, which loss a model has, what a
pipeline takes. Ours are known to it, of this package and of exported code."""

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, draw_ids, make_config, make_head, make_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto
from transformers.trainer_pt_utils import LabelSmoother

from ssm_zoo.modeling import outputs

SMOOTHING = 0.1


def trainer_of(model: Any, folder: Path, **arguments: Any) -> Trainer:
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True} | arguments
    return Trainer(model, TrainingArguments(output_dir=str(folder), **options))


def smoothed_loss(model: Any, ids: Tensor, labels: Tensor, folder: Path) -> float:
    trainer = trainer_of(model, folder, label_smoothing_factor=SMOOTHING)
    with torch.no_grad():
        return float(trainer.compute_loss(model, {"input_ids": ids, "labels": labels}))


def by_hand(logits: Tensor, labels: Tensor, shift: bool) -> float:
    return float(LabelSmoother(epsilon=SMOOTHING)({"logits": logits}, labels, shift_labels=shift))


@pytest.mark.parametrize("name", FAMILIES)
def test_smoothed_labels_are_those_of_the_next_token(name: str, tmp_path: Path) -> None:
    model, ids = make_model(name), draw_ids(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
    expected = by_hand(logits, ids, shift=True)
    assert abs(expected - by_hand(logits, ids, shift=False)) > 1e-3
    assert smoothed_loss(model, ids, ids, tmp_path) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_predicts_the_same_token_is_not_taken_for_a_good_one(tmp_path: Path) -> None:
    """The untrained model of the report: tied weights, so that a token's own logit is the largest."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        make_config("mamba2", num_hidden_layers=1, vocab_size=50, hidden_size=32, initializer_range=1.0)
    ).eval()
    ids = torch.randint(1, 50, (2, 12))
    with torch.no_grad():
        logits = model(ids).logits
    right, wrong = by_hand(logits, ids, shift=True), by_hand(logits, ids, shift=False)
    assert right > 2 * wrong
    assert smoothed_loss(model, ids, ids, tmp_path) == pytest.approx(right, rel=1e-6)


def test_a_subclass_under_any_name_is_shifted_and_has_its_loss(tmp_path: Path) -> None:
    class Speller(FAMILIES["mamba"].causal_lm):
        pass

    torch.manual_seed(0)
    model, ids = Speller(make_config("mamba")).eval(), draw_ids(2, 7)
    with torch.no_grad():
        logits = model(ids).logits
    assert smoothed_loss(model, ids, ids, tmp_path) == pytest.approx(by_hand(logits, ids, shift=True), rel=1e-6)
    assert model.loss_type == "ForCausalLM"

    class Tagger(type(make_head(AutoModelForTokenClassification, "mamba"))):
        pass

    assert Tagger(make_config("mamba")).loss_type == "ForTokenClassification"


@pytest.mark.usefixtures("modules_cache")
def test_exported_code_is_shifted_too(tmp_path: Path) -> None:
    model, ids = make_model("mamba2"), draw_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True, code_revision=None)
    with torch.no_grad():
        expected = by_hand(loaded(ids).logits, ids, shift=True)
    assert smoothed_loss(loaded, ids, ids, tmp_path) == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("modules_cache")
def test_exported_code_enters_its_own_class_into_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mamba2")
    model.save_pretrained(tmp_path)
    table = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = type(model).__name__
    assert table[name] == name
    monkeypatch.delitem(table, name)
    before = set(sys.modules)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind = get_class_from_dynamic_module(f"modeling_mamba2.{name}", str(tmp_path))
    assert inspect.getfile(kind) != inspect.getfile(type(model))
    assert table[name] == name
    for added in set(sys.modules) - before:
        del sys.modules[added]


@pytest.mark.parametrize("name", ["mixer-encoder", "mixer-toeplitz-encoder"])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_an_encoder_that_tells_the_next_token_is_shifted(name: str, lookahead: int, tmp_path: Path) -> None:
    model, ids = make_head(AutoModelForMaskedLM, name, lookahead=lookahead), draw_ids(2, 9)
    with torch.no_grad():
        output = model(ids, labels=ids)
    shift = lookahead == 2
    flat, targets = (output.logits[:, :-1], ids[:, 1:]) if shift else (output.logits, ids)
    expected = torch.nn.functional.cross_entropy(flat.flatten(0, 1), targets.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert smoothed_loss(model, ids, ids, tmp_path) == pytest.approx(by_hand(output.logits, ids, shift), rel=1e-6)


@pytest.mark.parametrize("lookahead", [1, 2])
def test_the_trainer_counts_the_labels_that_the_loss_compares(lookahead: int, tmp_path: Path) -> None:
    model, ids = make_head(AutoModelForMaskedLM, "mixer-encoder", lookahead=lookahead), draw_ids(2, 9)
    count = trainer_of(model, tmp_path)._get_num_items_in_batch(
        [{"input_ids": ids, "labels": ids}], torch.device("cpu")
    )
    assert int(count) == (16 if lookahead == 2 else 18)


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [
        (AutoModelForCausalLM, "taipan"),
        (AutoModelForMaskedLM, "mamba-encoder"),
        (AutoModelForSequenceClassification, "mamba"),
        (AutoModelForTokenClassification, "mixer"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_pipelines_find_our_classes(auto_class: Any, name: str) -> None:
    table = {
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }[auto_class.__name__]
    assert type(make_head(auto_class, name)).__name__ in table.values()


def test_a_capacity_loss_that_a_loss_of_the_trainer_leaves_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label smoothing reads the logits alone: what the model adds to its own loss is not in the Trainer's."""
    told: list[str] = []
    monkeypatch.setattr(outputs.logger, "warning_once", told.append)
    ids = draw_ids(2, 9)
    for coefficient in (0.0, 0.5):
        model = make_model("taipan", router_aux_loss_coef=coefficient).train()
        trainer = trainer_of(model, tmp_path, label_smoothing_factor=SMOOTHING)
        trainer.compute_loss(model, {"input_ids": ids, "labels": ids}, num_items_in_batch=torch.tensor(16))
        assert len(told) == (coefficient > 0)
    assert "router_aux_loss_coef" in told[0]
    model(ids, labels=ids, num_items_in_batch=torch.tensor(16))
    model(ids)
    assert len(told) == 1
