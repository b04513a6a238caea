"""Stored logits: what is stored, losses of them, runs that read them, interruption, and folders that are refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import draw_ids, make_any_teacher, make_teacher, save_teacher, small_text
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.distill import distiller, precompute, stored_logits
from ssm_zoo.distill.logit_losses import logit_loss, stored_logit_loss
from ssm_zoo.distill.precompute import precompute_logits
from ssm_zoo.distill.recipe import as_mapping, parse_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.stored_logits import likeliest
from ssm_zoo.reports.distillation_tables import public_recipe

WORDS, K = 11, 4
PREDICTIONS = [
    pytest.param({}, id="forward"),
    pytest.param({"kl": "reverse", "temperature": 2.5}, id="reverse, temperature"),
    pytest.param({"kl": "mixed", "reverse_weight": 0.2, "ce_weight": 0.3}, id="mixed, cross-entropy"),
    pytest.param({"kl": "jsd", "jsd_beta": 0.3, "temperature": 0.5}, id="jsd, temperature"),
]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stored_logits, "_WINDOWS", 3)


def make_inputs() -> None:
    save_teacher(Path("teacher"))
    Path("text.txt").write_text(small_text(60), encoding="utf-8")


def recipe(stage: dict[str, Any] | None = None, **changes: Any) -> Any:
    basis = {"name": "a", "objective": "logit_distillation", "tokens": 128, "batch_size": 2, "learning_rate": 1e-3}
    return parse_recipe(
        {
            "teacher": "teacher",
            "student": {"layers": [1], "half_life": [1, 8]},
            "data": {"train": "text.txt", "heldout": "text.txt", "sequence_length": 16},
            "stages": [{**basis, **(stage or {})}],
            "evaluation": {"tokens": 32, "prompts": [], "final": False},
            **changes,
        }
    )


def grouped(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities of the given tokens, and of all others together."""
    probabilities = (logits.double() / temperature).softmax(-1)
    chosen = probabilities.gather(-1, ids)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("options", PREDICTIONS)
def test_the_loss_is_that_of_the_tokens_and_of_all_others_together(options: dict[str, Any]) -> None:
    student, teacher = 2 * draw(6, WORDS, seed=0), 2 * draw(6, WORDS, seed=1)
    targets = torch.tensor([3, 0, -100, 10, 3, -100])
    temperature = options.get("temperature", 1.0)
    ids = teacher.topk(K, dim=-1).indices
    stored = grouped(teacher, ids, temperature).log().float()
    loss = stored_logit_loss(student, ids, stored, targets, **options)
    # As logits of K + 1 words: the logarithm of the probabilities, times the temperature that divides them again.
    plain = {name: value for name, value in options.items() if name != "ce_weight"}
    few = [temperature * grouped(logits, ids, temperature).log().float() for logits in (student, teacher)]
    weight = options.get("ce_weight", 0.0)
    surprise = torch.nn.functional.cross_entropy(student, targets, ignore_index=-100, reduction="sum")
    expected = (1 - weight) * logit_loss(*few, torch.zeros(6, dtype=torch.long), **plain) + weight * surprise
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert loss <= logit_loss(student, teacher, targets, **options) + 1e-4


def test_all_words_but_one_lose_nothing() -> None:
    student, teacher = draw(5, WORDS, seed=0).requires_grad_(), draw(5, WORDS, seed=1)
    targets = torch.zeros(5, dtype=torch.long)
    ids = teacher.topk(WORDS - 1, dim=-1).indices
    log_probs = grouped(teacher, ids, 1.0).log().float()
    losses = [
        stored_logit_loss(student, ids, log_probs, targets),
        logit_loss(student, teacher, targets),
    ]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 1000], ids=lambda rows: f"{rows} tokens at a time")
def test_the_likeliest_tokens_are_those_of_the_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, ids = make_teacher(), draw_ids(2, 9)
    head = teacher.lm_head
    monkeypatch.setattr("ssm_zoo.distill.logit_losses._LOGITS_BYTES", 4 * head.out_features * rows)
    hidden = teacher.model(ids).last_hidden_state
    top, log_probs = likeliest(hidden, head, 2.0, K)
    probabilities = (teacher(ids).logits / 2.0).softmax(-1)
    expected = probabilities.topk(K, dim=-1)
    assert torch.equal(top.long(), expected.indices) and top.dtype == torch.int32
    torch.testing.assert_close(log_probs[..., :-1].exp(), expected.values)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 9))


def test_a_run_reads_them_and_runs_no_teacher_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs()
    options = {"repeats": 0.5, "temperature": 2.0}
    plain = distill(recipe(options), "plain")
    precompute_logits(recipe(options), "logits", top_k=319)  # all but one of 320 words: nothing is lost
    ran: list[bool] = []
    inner = type(make_teacher().model).forward

    def noting(self: Any, *arguments: Any, **given: Any) -> Any:
        ran.append(True)
        return inner(self, *arguments, **given)

    before = distiller.Distiller.compute_loss

    def watched(self: Any, *arguments: Any, **given: Any) -> Any:
        ran.clear()
        loss = before(self, *arguments, **given)
        assert not ran
        return loss

    monkeypatch.setattr(type(make_teacher().model), "forward", noting)
    monkeypatch.setattr(distiller.Distiller, "compute_loss", watched)
    stored = distill(recipe(options, stored_logits="logits"), "stored")
    assert stored["recipe"]["stored_logits"] == "logits"
    losses = [[point["loss"] for point in report["stages"][0]["history"]] for report in (plain, stored)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    few = parse_recipe({**as_mapping(recipe(options)), "stored_logits": "few"})
    precompute_logits(recipe(options), "few", top_k=8)
    bounded = [point["loss"] for point in distill(few, "bounded")["stages"][0]["history"]]
    assert 0 < bounded[0] < losses[0][0]


def test_an_interrupted_computation_goes_on_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs()
    precompute_logits(recipe(), "whole", top_k=K)
    calls: list[int] = []

    def failing(*arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return likeliest(*arguments)

    monkeypatch.setattr(precompute, "likeliest", failing)
    with pytest.raises(KeyboardInterrupt):
        precompute_logits(recipe(), "parts", top_k=K)
    there = sorted(path.name for path in Path("parts").glob("stage-*"))
    assert 0 < len(there) < len(list(Path("whole").glob("stage-*")))
    with pytest.raises(ValueError, match=r"stage-0-0.*\.safetensors is missing\. Run the command .* again"):
        distill(recipe(stored_logits="parts"), "run")
    assert not Path("run").exists()
    first = Path("parts", there[0]).stat().st_mtime_ns
    precompute_logits(recipe(), "parts", top_k=K)
    assert Path("parts", there[0]).stat().st_mtime_ns == first
    names = sorted(path.name for path in Path("whole").iterdir() if not path.name.startswith("."))
    assert names == sorted(path.name for path in Path("parts").iterdir() if not path.name.startswith("."))
    for name in names:
        if name.endswith(".safetensors"):
            tensors = [load_file(Path(folder, name)) for folder in ("whole", "parts")]
            assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in ("ids", "log_probs"))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        pytest.param({"temperature": 2.0}, {}, r"`stages\.0\.temperature` = 1\.0, got 2\.0", id="temperature"),
        pytest.param({"tokens": 64}, {}, r"`stages\.0\.steps` = 4, got 2", id="tokens"),
        pytest.param({"repeats": 0.5}, {}, r"`stages\.0\.repeats` = 0\.0, got 0\.5", id="repeats"),
        pytest.param({}, {"seed": 1}, "`seed` = 0, got 1", id="seed"),
        pytest.param({}, {"dtype": "bfloat16"}, "`dtype` = 'float32', got 'bfloat16'", id="dtype"),
        pytest.param({}, {"teacher": "other"}, "another teacher: its weights differ", id="teacher"),
        pytest.param(
            {},
            {"data": {"train": "other.txt", "heldout": "text.txt", "sequence_length": 16}},
            "other training tokens",
            id="data",
        ),
    ],
)
def test_logits_of_something_else_are_refused(stage: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    make_inputs()
    save_teacher(Path("other"), make_teacher(seed=1))
    Path("other.txt").write_text(small_text(60, seed=5), encoding="utf-8")
    precompute_logits(recipe(), "logits", top_k=K)
    with pytest.raises(ValueError, match=rf"^`stored_logits`: logits was computed with {message}\.$"):
        distill(recipe(stage, stored_logits="logits", **changes), "run")
    assert not Path("run").exists()


def change(name: str, place: tuple[int, ...], value: float) -> Callable[[Path], object]:
    """Return a function that changes a number in the last file of a folder."""

    def changed(folder: Path) -> None:
        path = folder / "stage-0-000002.safetensors"
        tensors = load_file(path)
        tensors[name][place] = value
        save_file(tensors, path)

    return changed


def cut(folder: Path) -> None:
    path = folder / "stage-0-000002.safetensors"
    save_file({name: tensor[..., 1:].clone() for name, tensor in load_file(path).items()}, path)


DAMAGES = [
    pytest.param(change("log_probs", (1, 15, K), math.nan), "has log-probabilities that are not finite", id="nan"),
    pytest.param(change("log_probs", (0, 0, 0), -30.0), "has probabilities that do not sum to 1", id="sum"),
    pytest.param(change("ids", (1, 2, 0), 320), "has ids that are repeated, or not from 0 to 319", id="too-large"),
    pytest.param(change("ids", (1, 2, 0), -1), "has ids that are repeated, or not from 0 to 319", id="negative"),
    pytest.param(cut, r"must have .*\(2, 16, 4\).*, got .*\(2, 16, 3\)", id="shape"),
    pytest.param(
        lambda folder: (folder / "stage-0-000002.safetensors").write_bytes(b"x" * 100), "cannot be read: ", id="no file"
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_logits_end_a_run_and_are_computed_again(damage: Callable[[Path], object], message: str) -> None:
    make_inputs()
    precompute_logits(recipe(), "logits", top_k=K)
    whole = {path.name: path.read_bytes() for path in Path("logits").glob("stage-*")}
    damage(Path("logits"))
    with pytest.raises(ValueError, match=rf"^`stored_logits`: logits.stage-0-000002\.safetensors {message}.*again"):
        distill(recipe(stored_logits="logits"), "run")
    assert not Path("run", "student").exists() and not Path("run", "report.json").exists()
    precompute_logits(recipe(), "logits", top_k=K)
    assert {path.name: path.read_bytes() for path in Path("logits").glob("stage-*")} == whole


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({}, "`recipe` must be an object, got null"),
        ({"recipe": [1]}, "`recipe` must be an object, got a list"),
        ({"recipe": {"top_k": "4"}}, r"`recipe.top_k` must be an integer, got a string \('4'\)"),
    ],
)
def test_a_marker_that_was_edited_is_refused(recorded: dict[str, Any], message: str) -> None:
    make_inputs()
    precompute_logits(recipe(), "logits", top_k=K)
    path = Path("logits", "run.json")
    marker = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(recorded.get("recipe"), dict):
        recorded = {"recipe": marker["recipe"] | recorded["recipe"]}
    path.write_text(json.dumps({"kind": marker["kind"], **recorded}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        distill(recipe(stored_logits="logits"), "run")
    assert not Path("run").exists()


def test_a_teacher_that_computes_no_numbers_stores_none() -> None:
    make_inputs()
    teacher = make_teacher()
    teacher.model.norm.weight.data.fill_(3e38)
    save_teacher(Path("teacher"), teacher)
    with pytest.raises(ValueError, match=r"^teacher: its predictions for windows 0 to 2 of stage 0 are not finite\."):
        precompute_logits(recipe(), "logits", top_k=K)
    assert not list(Path("logits").glob("stage-*"))
    with pytest.raises(ValueError, match=r"loss of the teacher is nan\. Choose dtype float32, or another teacher"):
        distill(recipe(), "run")
    assert not Path("run", "student").exists()


def test_a_moved_teacher_is_the_same_and_a_run_does_not_go_on_with_other_logits() -> None:
    make_inputs()
    precompute_logits(recipe(), "logits", top_k=K)
    shutil.copytree("teacher", "moved")
    report = distill(recipe(teacher="moved", stored_logits="logits"), "run")
    assert report["stages"]
    shutil.rmtree("logits")
    precompute_logits(recipe(), "logits", top_k=K + 1)
    with pytest.raises(ValueError, match="stored_logits: config of logits changed since the run"):
        distill(recipe(teacher="moved", stored_logits="logits"), "run")


def test_a_report_does_not_name_the_folder_of_a_machine() -> None:
    published = public_recipe(as_mapping(recipe(stored_logits=str(Path.cwd() / "logits"))))
    assert published["stored_logits"] == "logits"


def test_what_cannot_be_computed_or_read_is_refused_before_anything_is_written() -> None:
    make_inputs()
    aligned = recipe({"objective": "hidden_state_alignment"})
    for wrong, options, message in (
        (aligned, {}, "`stages` must have one with objective 'logit_distillation'"),
        (recipe(stored_logits="logits"), {}, "`stored_logits` must be left out"),
        (recipe(), {"top_k": 320}, "--top-k must be from 1 to 319"),
        (recipe(), {"top_k": 0}, "--top-k must be from 1 to 319"),
        (recipe({"sequence_length": 100_000}), {}, "fewer than one window"),
    ):
        with pytest.raises(ValueError, match=message):
            precompute_logits(wrong, "out", **options)
        assert not Path("out").exists()
    save_teacher(Path("few"), make_any_teacher("gpt2", max_position_embeddings=8, vocab_size=320))
    with pytest.raises(ValueError, match=r"sequence_length` must be at most 8, the number of positions that have wei"):
        precompute_logits(recipe(teacher="few"), "out")
    assert not Path("out").exists()
    with pytest.raises(ValueError, match=r"`stored_logits` must be a folder that .* wrote, got 'nowhere'"):
        distill(recipe(stored_logits="nowhere"), "out")
    with pytest.raises(ValueError, match="`stored_logits` must be left out, since it has no effect"):
        recipe({"objective": "hidden_state_alignment"}, stored_logits="logits")
    assert "stored_logits" not in as_mapping(recipe())
    Path("recipe.yaml").write_text(json.dumps(as_mapping(recipe())), encoding="utf-8")
    command = ["distill", "recipe.yaml", "out", "--top-k", "3"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0 and "--top-k has no effect without --precompute-logits" in refused.output
    assert not Path("out").exists()
    assert CliRunner().invoke(app, [*command, "--precompute-logits"]).exit_code == 0
    assert json.loads(Path("out", "run.json").read_text(encoding="utf-8"))["recipe"]["top_k"] == 3
