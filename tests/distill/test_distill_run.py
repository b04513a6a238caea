"""Whole distillation runs: what they leave, that they can be repeated and killed, and what they refuse."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from teachers import make_teacher, save_teacher, small_text, small_tokenizer, trained_teacher
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from ssm_zoo.conversion.export import verify_export
from ssm_zoo.distill import inputs, run
from ssm_zoo.distill.data import TokenWindows, tokenize
from ssm_zoo.distill.distiller import schedule_factor
from ssm_zoo.distill.recipe import parse_recipe
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.run import distill, read_report
from ssm_zoo.evaluation.language_modeling import evaluate_language_model
from ssm_zoo.modeling import ZooHybridForCausalLM
from ssm_zoo.reports.distillation_report import parse_report

TESTS = Path(__file__).parent
DEATHS = 7
STAGES = [
    {
        "name": "matrices",
        "objective": "matrix_orientation",
        "tokens": 1000,
        "batch_size": 4,
        "learning_rate": 1e-3,
    },
    {
        "name": "outputs",
        "objective": "hidden_state_alignment",
        "tokens": 1280,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "refit": "ridge",
    },
    {
        "name": "logits",
        "objective": "logit_distillation",
        "train": "all",
        "tokens": 1536,
        "batch_size": 4,
        "learning_rate": 3e-4,
        "other_learning_rate": 3e-5,
        "schedule": "wsd",
        "ce_weight": 0.1,
    },
]
STEPS = [8, 10, 12]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained teacher and two texts."""
    folder = tmp_path_factory.mktemp("distill")
    save_teacher(folder / "teacher", trained_teacher())
    (folder / "train.txt").write_text(small_text(600, seed=1), encoding="utf-8")
    (folder / "heldout.txt").write_text(small_text(80, seed=9), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_values(folder)), encoding="utf-8")
    return folder


def recipe_values(folder: Path) -> dict[str, Any]:
    return {
        "teacher": str(folder / "teacher"),
        "student": {"layers": "all", "calibration": "ridge", "calibration_tokens": 512},
        "data": {
            "train": str(folder / "train.txt"),
            "heldout": [str(folder / "heldout.txt")],
            "sequence_length": 32,
        },
        "stages": copy.deepcopy(STAGES),
        "evaluation": {"tokens": 640, "prompts": ["Ada sees the"], "max_new_tokens": 8, "final": False},
        "checkpoint_every": 2,
    }


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The folder of a run of the whole recipe, with nothing in its way."""
    distill(load_recipe(place / "recipe.yaml"), place / "finished", command="ssm-zoo distill recipe.yaml finished")
    return place / "finished"


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "student" / "model.safetensors")


def losses(report: dict[str, Any]) -> dict[str, list[float]]:
    return {stage["name"]: [point["loss"] for point in stage["history"]] for stage in report["stages"]}


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what differs from one start to the next: times, memory, the command."""

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            dropped = ("seconds", "preparation", "created", "command", "peak_memory_bytes")
            return {key: stripped(item) for key, item in value.items() if key not in dropped}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    return stripped(report)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that ends well, with one thread a process."""
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_a_run_leaves_a_student_a_report_and_no_litter(finished: Path) -> None:
    entries = {path.name for path in finished.iterdir()}
    assert entries == {"run.json", "recipe.yaml", "checkpoints", "student", "report.json", "report.md", "plots"}
    plots = {path.name for path in (finished / "plots").iterdir()}
    assert plots == {"losses.png", "heldout.png", "layers.png", "heads.png"}
    student = {path.name for path in (finished / "student").iterdir()}
    assert student >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_hybrid.py", "plots"}
    assert load_recipe(finished / "recipe.yaml") == load_recipe(finished.parent / "recipe.yaml")
    checkpoints = {path.name for path in (finished / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-2-12", "checkpoint-3-0"}


def test_the_report_tells_the_whole_run(finished: Path) -> None:
    report = read_report(finished)
    parse_report(report)
    assert [(row["name"], row["kind"]) for row in report["evaluations"]] == [
        ("teacher", "teacher"),
        ("mixers zeroed", "zeroed"),
        ("window + sinks", "control"),
        ("step 0", "start"),
        ("matrices", "stage"),
        ("outputs", "stage"),
        ("logits", "stage"),
    ]
    assert [row["trained_tokens"] for row in report["evaluations"]] == [0, 0, 0, 0, 1024, 2304, 3840]
    stages = load_recipe(finished / "recipe.yaml").stages
    for row, stage, steps in zip(report["stages"], stages, STEPS, strict=True):
        assert (row["name"], row["objective"], row["steps"]) == (stage.name, stage.objective, steps)
        assert row["tokens"] == steps * 128
        assert [point["step"] for point in row["history"]] == list(range(1, steps + 1))
        assert row["seconds"] > 0
        rates = [stage.learning_rate * schedule_factor(stage, step) for step in range(steps)]
        assert [point["learning_rate"] for point in row["history"]] == pytest.approx(rates)
        assert all(point["gradient_norm"] > 0 for point in row["history"])
    assert report["processes"] == 1 and report["peak_memory_bytes"] > 2**20
    assert report["data"]["train_sources"] == ["train.txt"] and report["data"]["heldout_sources"] == ["heldout.txt"]
    assert report["student"]["layers"] == [0, 1, 2, 3]
    assert report["student"]["mixer_types"] == ["discrete_mamba2"] * 4
    assert report["command"] == "ssm-zoo distill recipe.yaml finished"
    for row in report["evaluations"]:
        assert [len(layer["matrix_error"]) for layer in row["layers"]] == (
            [6] * 4 if row["kind"] in ("start", "stage") else []
        )
        assert [sample["prompt"] for sample in row["samples"]] == ([] if row["kind"] == "zeroed" else ["Ada sees the"])


def test_training_brings_the_student_to_its_teacher(finished: Path) -> None:
    rows = {row["name"]: row for row in read_report(finished)["evaluations"]}
    assert rows["mixers zeroed"]["loss"] > 1.5 * rows["teacher"]["loss"]
    assert rows["step 0"]["loss"] < 1.2 * rows["teacher"]["loss"]
    assert rows["logits"]["loss"] < 1.05 * rows["teacher"]["loss"]
    assert rows["logits"]["kl"] < 0.5 * rows["step 0"]["kl"] < 0.1 * rows["mixers zeroed"]["kl"]
    before, after = ([layer["output_error"] for layer in rows[name]["layers"]] for name in ("step 0", "outputs"))
    assert sum(after) < 0.9 * sum(before)


def test_the_students_folder_loads_anywhere_and_is_what_was_measured(finished: Path) -> None:
    proof = verify_export(finished / "student")
    assert proof["auto_class"] == "AutoModelForCausalLM" and proof["bit_equal"]
    student = ZooHybridForCausalLM.from_pretrained(finished / "student")
    text = (finished.parent / "heldout.txt").read_text(encoding="utf-8")
    windows = TokenWindows(tokenize([text], small_tokenizer(), progress=False)).windows(32)[:20]
    row = read_report(finished)["evaluations"][-1]
    scored = evaluate_language_model(student, windows, teacher=trained_teacher(), batch_size=4, progress=False)
    assert scored["loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert scored["kl"] == pytest.approx(row["kl"], rel=1e-4)
    card = (finished / "student" / "README.md").read_text(encoding="utf-8")
    assert f"{row['loss']:.3f}" in card


def test_a_stage_of_all_weights_moves_them_and_others_do_not(finished: Path, place: Path) -> None:
    values = recipe_values(place)
    values["stages"] = STAGES[1:2]
    values["student"]["layers"] = [1, 3]
    values["evaluation"]["prompts"] = []
    distill(parse_recipe(values), place / "mixers alone")
    teacher, after, alone = trained_teacher().state_dict(), weights(finished), weights(place / "mixers alone")
    for name in ("embed_tokens", "layers.2.mlp.down_proj", "layers.1.input_layernorm", "layers.0.self_attn.o_proj"):
        theirs = f"model.{name}.weight"
        ours = "backbone." + name.replace("embed_tokens", "embeddings").replace("self_attn", "mixer") + ".weight"
        assert torch.equal(alone[ours], teacher[theirs]), name
        if "self_attn" not in name:
            assert not torch.equal(after[ours], teacher[theirs]), name


@pytest.mark.slow
def test_a_killed_run_ends_as_if_nothing_had_happened(finished: Path, place: Path, tmp_path: Path) -> None:
    done = python(TESTS / "kill_distillations.py", place / "recipe.yaml", tmp_path, str(DEATHS))
    starts = json.loads(done.stdout.splitlines()[-1])
    # Killed before the first step, in different stages, and after the last step.
    assert len(starts) == DEATHS + 1
    assert starts[0] is None and starts[2:4] == [[0], [0, 0]] and starts[-1] == [3, 0]
    assert len({tuple(start) for start in starts[1:] if start and start > [0, 0]}) >= 3
    for other in ("whole", "killed"):
        assert_same_weights(finished, tmp_path / other)
        assert measured(read_report(finished)) == measured(read_report(tmp_path / other)), other
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {path.name for path in finished.iterdir()}
    names = [{path.name for path in (tmp_path / run / "student").iterdir()} for run in ("whole", "killed")]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_a_batch(processes: int, finished: Path, place: Path, tmp_path: Path) -> None:
    # accelerate starts several CPU processes only as if they were for GPUs; it takes the device from the variable.
    several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    one = ["--cpu", "--num_processes", "1"]
    python(
        *("-m", "accelerate.commands.launch", *(several if processes > 1 else one), "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "ssm_zoo.cli.main", "distill", place / "recipe.yaml", tmp_path / "run"),
        ACCELERATE_USE_CPU="true",
    )
    report, plain = read_report(tmp_path / "run"), read_report(finished)
    assert report["processes"] == processes
    for name, values in losses(plain).items():
        assert losses(report)[name] == pytest.approx(values, rel=1e-5), name
    for row, expected in zip(report["evaluations"], plain["evaluations"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), row["name"]


def test_a_stage_starts_with_texts_that_none_before_it_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe_values(place)
    sizes = [{"tokens": 256}, {"tokens": 150, "batch_size": 3, "sequence_length": 16}, {"tokens": 128}]
    values["stages"] = [{**stage, **size} for stage, size in zip(STAGES, sizes, strict=True)]
    values["evaluation"]["prompts"] = []
    read: list[tuple[int, ...]] = []
    window = TokenWindows.window
    monkeypatch.setattr(TokenWindows, "window", lambda *arguments: read.append(arguments[1:]) or window(*arguments))
    distill(parse_recipe(values), place / "order")
    # Position, length, seed; the calibration and the refit read windows of another seed.
    trained = [arguments for arguments in read if arguments[2] == 0]
    assert {arguments[2] for arguments in read} == {0, 1}
    # 2 steps of 128 tokens are 5.3 steps of 48; those and 4 of 48 are 3.5 of 128.
    first, second, third = range(8), range(18, 30), range(16, 20)
    expected = [(at, 32, 0) for at in first] + [(at, 16, 0) for at in second] + [(at, 32, 0) for at in third]
    assert trained == expected


def test_another_seed_is_another_run(finished: Path, place: Path) -> None:
    values = recipe_values(place)
    values["stages"] = STAGES[:1]
    first, second = (distill(parse_recipe({**values, "seed": seed}), place / f"seed {seed}") for seed in (0, 1))
    assert losses(first)["matrices"] == losses(read_report(finished))["matrices"]
    assert losses(first)["matrices"] != losses(second)["matrices"]


def test_a_finished_run_is_not_trained_again(finished: Path, place: Path) -> None:
    shutil.copytree(finished, place / "again")
    shutil.rmtree(place / "again" / "student")
    report = distill(load_recipe(place / "recipe.yaml"), place / "again")
    assert measured(report) == measured(read_report(finished))
    assert_same_weights(finished, place / "again")


def test_bfloat16_computes_near_float32_and_trains_float32(finished: Path, place: Path) -> None:
    exact = read_report(finished)
    rounded = distill(parse_recipe({**recipe_values(place), "dtype": "bfloat16"}), place / "bfloat16")
    assert {tensor.dtype for tensor in weights(place / "bfloat16").values()} == {torch.float32}
    for name, values in losses(rounded).items():
        assert values != losses(exact)[name]
        assert values == pytest.approx(losses(exact)[name], rel=0.1), name
    last, expected = rounded["evaluations"][-1], exact["evaluations"][-1]
    assert last["loss"] == pytest.approx(expected["loss"], rel=0.01)
    # Weights in bfloat16 would lose these steps of 3e-5: its numbers near 1 are 0.004 apart.
    norm, before = weights(place / "bfloat16")["backbone.norm_f.weight"], trained_teacher().model.norm.weight
    assert 0 < (norm - before).abs().max() < 1e-3


OTHERS: list[tuple[dict[str, Any], int]] = [
    ({"mixer": "mamba2", "half_life": [2, 32]}, 1),
    ({"mixer": "sliding_attention"}, 2),
    ({"mixer": "masked_mixing", "positions": 40, "calibration": "ridge"}, 0),
    ({"mixer": "bounded_attention", "window": 4, "chunk_size": 2, "sinks": 1, "rows": 12}, 2),
    ({"mixer": "retention", "calibration": "head_scale"}, 0),
    ({"mixer": "linear_attention", "sliding_window": 4, "calibration": "ridge"}, 0),
]


@pytest.mark.parametrize(("student", "first"), OTHERS)
def test_other_mixers_run_too(student: dict[str, Any], first: int, place: Path) -> None:
    values = recipe_values(place)
    values |= {"student": {"layers": "odd", **student}, "stages": STAGES[first:]}
    report = distill(parse_recipe(values), place / student["mixer"])
    rows = {row["name"]: row for row in report["evaluations"]}
    assert rows["logits"]["loss"] < rows["mixers zeroed"]["loss"]
    assert report["student"]["mixer_types"] == ["full_attention", student["mixer"]] * 2
    assert (place / student["mixer"] / "student" / "model.safetensors").is_file()
    assert student["mixer"] != "masked_mixing" or rows["step 0"]["loss"] < rows["mixers zeroed"]["loss"]


def test_a_loss_that_is_not_finite_ends_the_run(place: Path) -> None:
    values = recipe_values(place)
    values["stages"] = [{**STAGES[2], "learning_rate": 1e18, "other_learning_rate": 1e18, "max_grad_norm": 1e18}]
    with pytest.raises(ValueError, match=r"stages\.logits: the loss is \w+ at step \d+. Lower learning_rate"):
        distill(parse_recipe(values), place / "diverged")
    assert not (place / "diverged" / "student").exists() and not (place / "diverged" / "report.json").exists()
    with pytest.raises(ValueError, match=r"has no report\.json"):
        read_report(place / "diverged")


def bloom_folder(folder: Path) -> Path:
    BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=320)).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def text_file(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


WRONG = [
    pytest.param(
        lambda values, _: values["student"].update(mixr="mamba2"),
        r"`student\.mixr` is unknown \(got 'mamba2'\); did you mean 'mixer'\?",
        id="unknown key",
    ),
    pytest.param(
        lambda values, _: values["student"].update(layers=[1, 4]),
        r"`layers` must be from 0 to 3, got \[1, 4\]",
        id="layer",
    ),
    pytest.param(
        lambda values, folder: values.update(teacher=str(bloom_folder(folder / "bloom"))),
        r"teacher must be a model of type .*llama.*, got 'bloom'",
        id="family of the teacher",
    ),
    pytest.param(
        lambda values, folder: values.update(teacher=str(folder)),
        r"teacher: the folder .* has no config\.json",
        id="no teacher",
    ),
    pytest.param(
        lambda values, folder: values["data"].update(train=text_file(folder / "empty.txt", "")),
        r"data\.train: '.*empty\.txt' has no text",
        id="empty text",
    ),
    pytest.param(
        lambda values, folder: values["data"].update(heldout=str(folder / "missing.txt")),
        r"data\.heldout: there is no file '.*missing\.txt'",
        id="no text",
    ),
    pytest.param(
        lambda values, folder: values["data"].update(train=text_file(folder / "short.txt", "Ada sees it.")),
        r"data\.train: the text has \d+ tokens, fewer than one window of sequence_length = 32",
        id="short training text",
    ),
    pytest.param(
        lambda values, folder: values["data"].update(heldout=text_file(folder / "short.txt", "Ada sees it.")),
        r"data\.heldout: the text has \d+ tokens, fewer than one window of sequence_length = 32",
        id="short held-out text",
    ),
    pytest.param(
        lambda values, _: (
            values["data"].update(sequence_length=50_000),
            values["evaluation"].update(sequence_length=32),
            [stage.update(sequence_length=32) for stage in values["stages"]],
        ),
        r"data\.train: the text has \d+ tokens, fewer than one window of sequence_length = 50000",
        id="text too short for calibration",
    ),
    pytest.param(
        lambda values, folder: values.update(teacher=str(save_teacher(folder / "small", make_teacher(vocab_size=300)))),
        r"tokenizer: the token '.*' has id 319, but the model's vocab_size is 300",
        id="tokenizer of another model",
    ),
    pytest.param(
        lambda values, folder: (
            values.update(teacher=str(save_teacher(folder / "narrow", make_teacher(hidden_size=36)))),
            values["student"].update(mixer="mamba2"),
        ),
        r"`student\.mixer` must be .*, got 'mamba2', which needs heads \* head_dim \(48\) to be a multiple",
        id="width for Mamba-2",
    ),
    pytest.param(
        lambda values, _: values["student"].update(normalize=True),
        r"`student\.normalize` must be False with feature_map 'identity'",
        id="normaliser without positive features",
    ),
    pytest.param(
        lambda values, _: values.update(student={"mixer": "sliding_attention"}),
        r"`stages\.0\.objective` must be .* for the mixer 'sliding_attention', .*, got 'matrix_orientation'",
        id="matrices of attention",
    ),
    pytest.param(
        lambda values, _: values["evaluation"].update(prompts=["Ada", ""]),
        r"`evaluation\.prompts\.1` must be a text of at least one token, got ''",
        id="empty prompt",
    ),
    pytest.param(
        lambda values, _: (
            values.update(student={"mixer": "masked_mixing", "positions": 32}),
            values["evaluation"].update(max_new_tokens=31),
        ),
        r"`evaluation\.prompts\.0` must have at most 1 tokens \(the student's [0-9]+ positions minus eval",
        id="prompt without room",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(
    change: Callable[[dict[str, Any], Path], Any], message: str, place: Path, tmp_path: Path
) -> None:
    values, output = recipe_values(place), tmp_path / "runs" / "output"
    change(values, tmp_path)
    with pytest.raises(ValueError, match=message):
        distill(parse_recipe(values), output)
    assert not output.parent.exists()


def test_processes_that_do_not_fit_are_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "processes", lambda: SimpleNamespace(num_processes=3, is_main_process=True))
    with pytest.raises(ValueError, match=r"`stages\.0\.batch_size` must be a multiple of the 3 processes, got 4"):
        distill(parse_recipe(recipe_values(place)), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_checkpoints_of_an_earlier_version_are_refused(finished: Path, place: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    (output / "checkpoints" / "checkpoint-3-0" / "state.json").write_text("{}", encoding="utf-8")
    for remedy in (r"The run has finished: use .*student, or give another folder", "Finish the run with that version"):
        before = files_of(output)
        with pytest.raises(ValueError, match=rf"by an earlier version of ssm-zoo.*{remedy}"):
            distill(load_recipe(place / "recipe.yaml"), output)
        assert files_of(output) == before
        (output / "report.json").unlink(missing_ok=True)


def test_a_folder_that_holds_something_else_is_left_alone(finished: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"output folder: .* is not empty and holds no run\.json"):
        distill(parse_recipe(recipe_values(place)), tmp_path)
    assert files_of(tmp_path) == {"thesis.txt": b"years of work"}
    before = files_of(finished)
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(seed: 0 there, 1 here\)"):
        distill(parse_recipe({**recipe_values(place), "seed": 1}), finished)
    assert files_of(finished) == before


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_run_does_not_go_on_with_other_texts(
    split: str, finished: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    shutil.copytree(finished, output)
    read = inputs.read_texts
    monkeypatch.setattr(
        inputs, "read_texts", lambda sources, part: ["An addition. " * (part == split) + read(sources, part)[0]]
    )
    before = files_of(output)
    with pytest.raises(ValueError, match=rf"data\.{split}: the texts have changed since .*checkpoint-3-0 was saved"):
        distill(load_recipe(place / "recipe.yaml"), output)
    assert files_of(output) == before
