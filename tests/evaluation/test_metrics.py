"""Metrics, offline: their definitions, added in parts, combined, and gathered from two processes."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from torch import Tensor

from ssm_zoo.evaluation.metrics import (
    BLEU,
    ChrF,
    DistillationGap,
    EntityRecall,
    KLDivergence,
    Perplexity,
    Ranking,
    Top1Agreement,
)

needs_ir_measures = pytest.mark.skipif(not importlib.util.find_spec("ir_measures"), reason="ir-measures is missing")
needs_sacrebleu = pytest.mark.skipif(not importlib.util.find_spec("sacrebleu"), reason="sacrebleu is missing")


def predictions(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits (3, 5, 11) of a student and a teacher who agree in part, and the tokens that follow."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 5, 11, generator=generator)
    student = teacher + 0.7 * torch.randn(3, 5, 11, generator=generator)
    labels = torch.randint(11, (3, 5), generator=generator)
    return {"predictions": student.to(dtype), "references": teacher.to(dtype), "labels": labels}


def defined(given: dict[str, Tensor]) -> dict[str, float]:
    """The values by their definitions, in the precision of the logits."""
    q, p = (given[name].float().flatten(0, 1).log_softmax(-1) for name in ("predictions", "references"))
    labels = given["labels"].flatten()[:, None]
    loss, teacher_loss = (-each.gather(-1, labels).double().mean().item() for each in (q, p))
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "teacher_loss": teacher_loss,
        "teacher_perplexity": math.exp(teacher_loss),
        "distillation_gap": loss - teacher_loss,
        "tokens": labels.numel(),
        "kl": (p.exp() * (p - q)).sum(-1).double().mean().item(),
        "teacher_entropy": -(p.exp() * p).sum(-1).double().mean().item(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


def against_a_teacher(**options: Any) -> Any:
    metrics: Any = [DistillationGap(**options), KLDivergence(**options), Top1Agreement(**options)]
    return evaluate.combine(metrics)


# Against a teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_combined_metrics_of_a_teacher_are_their_definitions(dtype: torch.dtype) -> None:
    given = predictions(dtype)
    expected = defined(given)
    assert 0.1 < expected["top1_agreement"] < 0.9
    found = against_a_teacher().compute(**given)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-7 if name == "teacher_entropy" else 1e-9
        assert found[name] == pytest.approx(value, rel=0, abs=tolerance), name


def test_values_may_be_added_in_parts_and_one_by_one_and_a_metric_used_again() -> None:
    given, metric = predictions(), against_a_teacher()
    whole = metric.compute(**given)
    for row in range(3):
        metric.add_batch(**{name: value[row] for name, value in given.items()})
    assert metric.compute() == pytest.approx(whole, rel=1e-12)
    for row in range(3):
        for place in range(5):
            labels = given["labels"][row, place]
            one = {"prediction": given["predictions"][row, place], "reference": given["references"][row, place]}
            metric.add(**one, labels=labels)
    assert metric.compute() == pytest.approx(whole, rel=1e-6)


def test_each_metric_works_alone() -> None:
    given = predictions()
    both = {name: given[name] for name in ("predictions", "references")}
    expected = defined(given)
    found = Perplexity().compute(predictions=given["predictions"], references=given["labels"])
    assert found == pytest.approx({name: expected[name] for name in ("loss", "perplexity", "tokens")})
    assert Top1Agreement().compute(**both) == {"top1_agreement": expected["top1_agreement"]}
    assert KLDivergence().compute(**both)["kl"] == pytest.approx(expected["kl"])
    same = KLDivergence().compute(predictions=both["references"].numpy(), references=both["references"].numpy())
    assert same["kl"] == 0


def test_tokens_that_both_rule_out_do_not_count() -> None:
    given = predictions()
    for name in ("predictions", "references"):
        given[name][..., 10] = -math.inf
    found = KLDivergence().compute(predictions=given["predictions"], references=given["references"])
    kept = {name: given[name][..., :10] for name in ("predictions", "references")}
    assert found == pytest.approx(KLDivergence().compute(**kept))


def test_very_high_losses_have_infinite_perplexity() -> None:
    logits = torch.tensor([[0.0, 1000.0]])
    found = Perplexity().compute(predictions=logits, references=torch.tensor([0]))
    assert found == {"loss": 1000.0, "perplexity": math.inf, "tokens": 1}


def test_bad_inputs_are_refused() -> None:
    given = predictions()
    both = {name: given[name] for name in ("predictions", "references")}
    with pytest.raises(
        ValueError, match=r"`references` must have the shape of `predictions`, \(15, 11\), got \(15, 10"
    ):
        KLDivergence().compute(**{**both, "references": both["references"][..., :10]})
    with pytest.raises(ValueError, match="`labels` must be tokens from 0 to 10, got 0 to 11"):
        DistillationGap().compute(**both, labels=torch.arange(15).clamp(max=11))
    with pytest.raises(ValueError, match="`labels` must have one token for each of 15 predictions, got 14"):
        DistillationGap().compute(**both, labels=torch.zeros(14).long())
    with pytest.raises(ValueError, match="KLDivergence: nothing to compute"):
        KLDivergence().compute()


# Rankings


@needs_ir_measures
def test_rankings_are_measured_by_their_definitions() -> None:
    metric = Ranking(["ndcg@3", "mrr@2", "recall@2", "accuracy@1", "precision@2", "map@3"])
    metric.add_batch(predictions=[["a", "b", "c"]], references=[["b", "z"]])
    metric.add_batch(predictions=[["d"], [], ["u", "v", "w"]], references=[["d"], ["e"], ["w"]])
    found = metric.compute()
    ideal = 1 + 1 / math.log2(3)
    expected = {
        "ndcg@3": ((1 / math.log2(3)) / ideal + 1 + 0 + 1 / math.log2(4)) / 4,
        "mrr@2": (1 / 2 + 1 + 0 + 0) / 4,
        "recall@2": (1 / 2 + 1 + 0 + 0) / 4,
        "accuracy@1": 1 / 4,
        "precision@2": (1 / 2 + 1 / 2 + 0 + 0) / 4,
        "map@3": (1 / 2 / 2 + 1 + 0 + 1 / 3) / 4,
    }
    assert found == pytest.approx(expected, rel=0, abs=1e-9)


@needs_ir_measures
def test_bad_rankings_are_refused() -> None:
    for name in ("ndcg", "ndcg@0", "f1@3"):
        with pytest.raises(ValueError, match=f"`measures` must be of ndcg, mrr, .* as in ndcg@10, got '{name}'"):
            Ranking([name])
    with pytest.raises(ValueError, match="`predictions` must not name a document twice, as those of query 1 do"):
        Ranking().compute(predictions=[["a"], ["b", "b"]], references=[["a"], ["b"]])
    with pytest.raises(ValueError, match="`references` must name a relevant document for every query, got none for 0"):
        Ranking().compute(predictions=[["a"]], references=[[]])


# Translations

TEXTS = ["The cat sat on the mat in the house.", "We met Ann Lee in Oslo today.", "Nothing."]
TRANSLATIONS = ["The cat is on the mat in the house.", "We met Ann Lee in Bergen today.", "Nothing at all."]


@needs_sacrebleu
def test_bleu_and_chrf_are_those_of_sacrebleu_with_one_reference_and_two() -> None:
    import sacrebleu

    both: Any = [BLEU(), ChrF()]
    found = evaluate.combine(both).compute(predictions=TEXTS, references=TRANSLATIONS)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, [TRANSLATIONS]).score, abs=1e-9)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(TEXTS, [TRANSLATIONS]).score, abs=1e-9)
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|")
    assert 20 < found["bleu"] < 90
    two = BLEU().compute(predictions=TEXTS, references=[[one, one.lower()] for one in TRANSLATIONS])
    lower = [one.lower() for one in TRANSLATIONS]
    assert two["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, [TRANSLATIONS, lower]).score, abs=1e-9)
    plus = ChrF(settings={"word_order": 2}).compute(predictions=TEXTS, references=TRANSLATIONS)
    assert plus["chrf"] == pytest.approx(sacrebleu.corpus_chrf(TEXTS, [TRANSLATIONS], word_order=2).score, abs=1e-9)
    with pytest.raises(ValueError, match="`references` must have equally many translations of every text, got 1 to 2"):
        BLEU().compute(predictions=TEXTS[:2], references=[["x"], ["y", "z"]])


def test_entity_recall_is_the_share_of_entities_in_the_texts() -> None:
    entities = [[], ["Ann Lee", "Bergen", "Lee"], ["Nothing"]]
    assert EntityRecall().compute(predictions=TEXTS, references=entities) == {"entity_recall": 0.75, "entities": 4}
    parts = {"predictions": ["in 1957, (Bergen)"], "references": [["5", "57", "Bergen", "1957"]]}
    assert EntityRecall().compute(**parts)["entity_recall"] == 1
    assert EntityRecall(whole_words=True).compute(**parts)["entity_recall"] == 0.5
    with pytest.raises(ValueError, match="`references` must name at least one entity"):
        EntityRecall().compute(predictions=["x"], references=[[]])


def test_entity_recall_by_frequency_in_the_training_text() -> None:
    entities = [["cat"], ["Ann Lee", "Bergen", "Oslo"], ["Nothing", "Nothing at all"]]
    counts = {"cat": 16, "Ann Lee": 15, "Bergen": 1, "Oslo": 40, "Nothing": 0}
    found = EntityRecall(training_counts=counts).compute(predictions=TEXTS, references=entities)
    assert found == {
        "entity_recall": 4 / 6,
        "entities": 6,
        "entity_recall_unseen": 0.5,  # "Nothing", and "Nothing at all", which the counts do not name
        "entities_unseen": 2,
        "entity_recall_regular": 0.5,
        "entities_regular": 2,
        "entity_recall_frequent": 1.0,
        "entities_frequent": 2,
    }
    few = EntityRecall(training_counts={}).compute(predictions=["x"], references=[["x"]])
    assert math.isnan(few["entity_recall_frequent"]) and few["entities_frequent"] == 0


# Everywhere


def test_one_process_writes_no_file_and_asks_no_hub(tmp_path: Path) -> None:
    program = (
        "import evaluate, torch; from ssm_zoo.evaluation.metrics import KLDivergence;"
        "logits = torch.arange(6.0).view(2, 3);"
        "assert KLDivergence().compute(predictions=logits, references=logits)['kl'] == 0"
    )
    variables = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env=variables)
    assert not list(tmp_path.rglob("*.arrow"))
    assert not (tmp_path / "evaluate" / "metrics").exists()


def of_texts(**options: Any) -> Any:
    metrics: Any = [BLEU(**options), ChrF(**options)]
    return evaluate.combine(metrics)


ENTITIES = [["cat", "dog"], ["Ann Lee", "Bergen"], ["Nothing"]]
RANKED = {"predictions": [["a", "b", "c"], ["c", "a"], ["b"]], "references": [["b"], ["b", "c"], ["b"]]}
METRICS: dict[str, tuple[Any, dict[str, Any]]] = {
    "teacher": (against_a_teacher, predictions()),
    "translations": (of_texts, {"predictions": TEXTS, "references": TRANSLATIONS}),
    "entities": (
        lambda **options: EntityRecall(training_counts={"cat": 20, "Bergen": 1}, **options),
        {"predictions": TEXTS, "references": ENTITIES},
    ),
    "rankings": (lambda **options: Ranking(("ndcg@10", "mrr@10", "recall@2"), **options), RANKED),
}


def compute_shares(folder: str, process: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Add every second row in one of two processes, of two rows and one."""
    found = {}
    for name in names:
        make, inputs = METRICS[name]
        metric = make(num_process=2, process_id=process, experiment_id=name, cache_dir=folder, timeout=60)
        found[name] = metric.compute(**{key: value[process::2] for key, value in inputs.items()})
    return found


@needs_ir_measures
@needs_sacrebleu
def test_the_first_of_two_processes_computes_over_the_shares_of_both(tmp_path: Path) -> None:
    line = [sys.executable, __file__, str(tmp_path)]
    others = [
        subprocess.Popen([*line, str(process), *METRICS], stdout=subprocess.PIPE, text=True) for process in (0, 1)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in others)
    assert [process.returncode for process in others] == [0, 0]
    assert second == {name: {} for name in METRICS}
    for name, (make, inputs) in METRICS.items():
        alone = make().compute(**inputs)
        assert first[name].keys() == alone.keys()
        for key, value in alone.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-6, nan_ok=True)
            assert first[name][key] == expected, (name, key)


if __name__ == "__main__":
    print(json.dumps(compute_shares(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
