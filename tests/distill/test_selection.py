"""Layers and heads are chosen by what their attention is worth, and an interrupted selection goes on."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from teachers import make_any_teacher, make_teacher, save_teacher, small_text, text_windows, trained_teacher
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.distill import selection
from ssm_zoo.distill.recipe import StudentSpec, resolve_layers
from ssm_zoo.distill.selection import Selector, attention_to_copies, exact, restored, zeroed
from ssm_zoo.distill.selection_run import select
from ssm_zoo.distill.selection_settings import parse_selection
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.evaluation.language_modeling import repeated_texts
from ssm_zoo.harness.yaml_values import read_yaml

SIZES = {"tokens": 96, "sequence_length": 48, "distance": 24, "window": 4, "sinks": 1}
IDS = text_windows(60, 1)[:, 0][:400]


def selector_of(model: Any, **values: Any) -> Selector:
    settings = parse_selection({"teacher": "x", "data": ["x"], **SIZES, **values})
    return Selector(Teacher(model), IDS, settings, progress=False)


def without_attention(model: Any, layer: int) -> Any:
    """A copy whose attention in a layer adds nothing."""
    changed = copy.deepcopy(model)
    changed.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    return changed


@torch.no_grad()
def divergence(model: Any, teacher: Any) -> float:
    ids = IDS[:96].view(2, 48)
    ours, theirs = (each(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for each in (model, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_the_harm_of_an_ablation_is_that_of_a_teacher_without_the_attention() -> None:
    teacher = make_teacher()
    found = selector_of(teacher, methods=["ablation"]).rank_layers("ablation")
    for row in found["rows"]:
        changed = without_attention(teacher, row["layer"])
        assert row["kl"] == pytest.approx(divergence(changed, teacher), rel=1e-4)
        assert row["score"] == pytest.approx(row["kl"] + 0.3 * row["repeat_loss"])
    assert found["layers"] == sorted(sorted(range(4), key=lambda layer: found["rows"][layer]["score"])[:2])
    assert divergence(teacher, teacher) == 0  # nothing is left of the ablations


@pytest.mark.parametrize("method", ["ablation", "restore"])
def test_a_layer_whose_attention_adds_nothing_is_worth_nothing(method: str) -> None:
    selector = selector_of(without_attention(trained_teacher(), 2), layers=1, recall=0)
    rows = selector.rank_layers(method)["rows"]
    assert [abs(row["score"]) < 1e-6 for row in rows] == [False, False, True, False]
    if method == "ablation":  # a divergence is not negative
        assert selector.rank_layers(method)["layers"] == [2]


def test_restoring_every_layer_gives_the_teacher() -> None:
    selector = selector_of(trained_teacher())
    before = divergence(selector.student, selector.teacher.model)
    with exact(selector.student, 0, [0, 1]), exact(selector.student, 1, [0, 1]):
        between = divergence(selector.student, selector.teacher.model)
        with exact(selector.student, 2, [0, 1]), exact(selector.student, 3, [0, 1]):
            assert divergence(selector.student, selector.teacher.model) == pytest.approx(0.0, abs=1e-6)
    assert 0 < between < before
    assert divergence(selector.student, selector.teacher.model) == before


def test_a_restored_head_is_the_exact_head_of_a_recipe() -> None:
    selector = selector_of(trained_teacher(), heads=1, head_method="restore")
    rows = {(row["layer"], row["head"]): row for row in selector.rank_heads([1, 2])}
    assert list(rows) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    spec = StudentSpec(
        mixer="bounded_attention", window=4, sinks=1, rows=5, slots="equal", chunk_size=4, exact_heads=[(2, 1)]
    )
    built = build_student(selector.teacher, spec, range(4))
    before = divergence(selector.student, selector.teacher.model)
    gain = before - divergence(built, selector.teacher.model)
    assert rows[2, 1]["kl"] == pytest.approx(gain, rel=1e-4, abs=1e-6)


def test_a_restored_layer_has_the_teachers_window() -> None:
    """With a window no wider than the teacher's, nothing is gained or lost but what the untrained one leaves out."""
    teacher = make_any_teacher("mistral", sliding_window=6)
    selector = selector_of(teacher, layers=1, recall=0, window=6, sinks=0)
    before = divergence(selector.student, teacher)
    mixers = [block.mixer for block in selector.student.backbone.layers]
    with contextlib.ExitStack() as stack:
        for layer in range(4):
            stack.enter_context(restored(selector.student, selector.teacher, layer))
        assert divergence(selector.student, teacher) < 1e-9 < before
    assert [block.mixer for block in selector.student.backbone.layers] == mixers
    assert divergence(selector.student, teacher) == before


@pytest.mark.parametrize(("values", "field"), [({"distance": 30}, "distance"), ({"distance": 5}, "sequence_length")])
def test_a_teacher_with_few_positions_reads_no_longer_texts(values: dict[str, Any], field: str) -> None:
    positions = 210 if field == "distance" else 47
    with pytest.raises(ValueError, match=rf"`{field}` must be smaller: the teacher has {positions} positions"):
        selector_of(make_any_teacher("gpt2", max_position_embeddings=positions), **values)


def test_the_attention_to_a_copy_is_at_the_token_to_be_copied() -> None:
    teacher = make_teacher(num_key_value_heads=2)
    teacher.set_attn_implementation("eager")
    texts = repeated_texts(IDS, 24, texts=2)
    weights = teacher(input_ids=texts, output_attentions=True).attentions
    found = torch.tensor(attention_to_copies(Teacher(teacher), texts, progress=False))
    assert found.shape == (4, 2)
    for layer in range(4):
        # Place 120 + t repeats place t; where it is read, the next token is that of place t + 1.
        places = torch.arange(7, 95)
        heads = weights[layer][:, :, 120 + places, places + 1].mean((0, 2))
        assert found[layer].tolist() == pytest.approx(heads.view(2, 3).amax(1).tolist(), rel=1e-4)


def test_even_distances_are_those_of_a_recipe() -> None:
    assert selector_of(make_teacher(), layers=3).rank_layers("uniform")["layers"] == resolve_layers("interleave:3/4", 4)


def test_zeros_take_the_place_of_an_output_that_is_not_finite() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight.data.fill_(torch.inf)
    with zeroed(layer):
        assert layer(torch.ones(1, 2)).equal(torch.zeros(1, 2))
    assert not layer(torch.ones(1, 2)).isfinite().any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 5}, r"`layers` must be at most the teacher's 4, got 5"),
        ({"heads": 5}, r"`heads` must be at most 4, the key-value heads of 2 converted layers, got 5"),
        ({"distance": 500}, r"`data` must have at least 596 tokens .*, got 400"),
        ({"tokens": 20}, r"`tokens` must be at least sequence_length = 48, one window, got 20"),
        ({"window": 47}, r"`window` must be below sequence_length - sinks = 47, .*, got 47"),
        ({"window": 99, "methods": ["uniform"], "heads": 1, "head_method": "restore"}, "`window` must be below"),
        ({"methods": ["restore", "restore"]}, r"`method` must name each method once"),
        ({"methods": []}, r"`methods` must be a list of at least 1 item"),
        ({"head_method": "restore"}, r"`head_method` has no effect without --heads"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selector_of(make_teacher(), **values)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "teacher", trained_teacher())
    (tmp_path / "text.txt").write_text(small_text(60), encoding="utf-8")
    return tmp_path


def test_the_command_writes_a_part_of_a_recipe_with_its_evidence(inputs: Path) -> None:
    words = ["select", "teacher", "--data", "text.txt", "--output", "out", "--method", "restore,retrieval,uniform"]
    words += ["--heads", "1", "--layers", "3", *(f"--{name.replace('_', '-')}={SIZES[name]}" for name in SIZES)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    assert {path.name for path in Path("out").iterdir()} == {
        "run.json", "selection.json", "selection.png", "selection.yaml",
    }  # fmt: skip
    evidence = json.loads(Path("out/selection.json").read_text())
    student = read_yaml(Path("out/selection.yaml").read_text(), "fragment")["student"]
    assert student == {"layers": evidence["layers"], "exact_heads": evidence["exact_heads"]}
    assert evidence["layers"] == evidence["methods"]["restore"]["layers"] and len(evidence["layers"]) == 3
    best = max(evidence["heads"], key=lambda row: row["score"])
    assert evidence["exact_heads"] == [[best["layer"], best["head"]]] and best["layer"] in evidence["layers"]
    assert StudentSpec(mixer="bounded_attention", **student).layers == evidence["layers"]
    assert f"--set student.layers={json.dumps(evidence['layers']).replace(' ', '')}\n" in result.stdout
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "out contains a finished selection" in again.stderr


def test_an_interrupted_selection_goes_on_where_it_stopped(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse_selection({"teacher": "teacher", "data": ["text.txt"], "methods": ["ablation"], **SIZES})
    whole = select(settings, "whole", progress=False)
    measure, left = Selector._ablated, [2]

    def interrupted(self: Selector, layer: int) -> dict[str, float]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(self, layer)

    monkeypatch.setattr(selection.Selector, "_ablated", interrupted)
    with pytest.raises(KeyboardInterrupt):
        select(settings, "part", progress=False)
    path = Path("part/measured.json")
    measured = json.loads(path.read_text())
    assert len(measured["values"]) == 3  # the teacher and two layers
    other = settings.model_copy(update={"window": 5})
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(window: 4 there, 5 here\)"):
        select(other, "part", progress=False)
    for edited in ({**measured, "values": {**measured["values"], "teacher": 0.5}}, {}, {"values": 1, "sha256": "a"}):
        path.write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=r"measured.json is damaged or was edited. Remove it, so that"):
            select(settings, "part", progress=False)
    path.write_text(json.dumps(measured))
    left[0] = 2
    found = select(settings, "part", progress=False)
    assert left[0] == 0
    assert found["methods"] == whole["methods"] and not Path("part/measured.json").exists()


@pytest.mark.parametrize("method", ["ablation", "restore", "retrieval"])
def test_a_teacher_that_computes_no_numbers_chooses_nothing(method: str, inputs: Path) -> None:
    teacher = trained_teacher()
    teacher.model.layers[0].mlp.down_proj.weight.data.fill_(3e38)
    save_teacher(inputs / "teacher", teacher)
    settings = parse_selection({"teacher": "teacher", "data": ["text.txt"], "methods": [method], **SIZES})
    with pytest.raises(ValueError, match=r"^teacher: the measurement '\w+' is not finite. Choose another teacher\.$"):
        select(settings, "out", progress=False)
    assert {path.name for path in Path("out").iterdir()} == {"run.json"}
