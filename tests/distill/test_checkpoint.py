"""Checkpoints: resuming is exact, damage is seen, and no kill leaves a run without one."""

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssm_zoo.distill.checkpoint import load_latest, restore, save_checkpoint
from ssm_zoo.harness.run_folder import claim_output_folder, write_json

RECIPE = {"teacher": "t", "seed": 0, "stages": [{"name": "a", "tokens": 8}], "student": {"layers": [0, 1]}}


class Run:
    """A small training run with everything that has state: dropout, two groups, a schedule, an idle parameter."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3)).to(device)
        self.model.register_parameter("idle", nn.Parameter(torch.randn(2, device=device)))
        self.device = device
        first, second = list(self.model[0].parameters()), list(self.model[2].parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": first, "lr": 1e-2, "weight_decay": 0.1},
                {"params": [*second, self.model.idle], "lr": 3e-3, "betas": (0.8, 0.9), "peak": 3e-3},
            ],
        )
        self.names = ["0.weight", "0.bias", "2.weight", "2.bias", "idle"]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            data = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * (0.9 + 0.01 * step)
            loss = self.model(data).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, stage: int = 0, step: int = 1, **options: Any) -> Path:
        arguments = {"parameters": self.parameters, "optimizer": self.optimizer, "named": self.names, "extra": {}}
        return save_checkpoint(folder, stage=stage, step=step, **{**arguments, **options})

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"parameters": self.parameters, "optimizer": self.optimizer.state_dict()})


def assert_bits_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.equal(a.detach().view(-1).view(torch.uint8), b.detach().view(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_bits_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_bits_equal(x, y)
    else:
        assert a == b and type(a) is type(b)


def load_quietly(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_latest(folder)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("saved_at", [0, 1, 4, 9])
def test_resuming_is_exact_to_the_bit(tmp_path: Path, saved_at: int, device: str) -> None:
    straight = Run(seed=0, device=device)
    losses = straight.train(0, 9)

    before = Run(seed=0, device=device)
    before.train(0, saved_at)
    extra = {"history": [{"loss": 0.1, "step": 3}], "data": "abc", "best": None, "tiny": 5e-324}
    before.save(tmp_path, stage=2, step=saved_at, extra=extra)

    after = Run(seed=99, device=device)  # other weights, other random numbers
    after.train(0, 3)
    checkpoint = load_quietly(tmp_path)
    restore(checkpoint, after.optimizer, parameters=after.parameters, named=after.names)
    assert (checkpoint.stage, checkpoint.step, checkpoint.extra) == (2, saved_at, extra)
    assert_bits_equal(after.state(), before.state())
    assert after.train(saved_at, 9) == losses[saved_at:]
    assert_bits_equal(after.state(), straight.state())


def test_hyperparameters_come_back(tmp_path: Path) -> None:
    run = Run(seed=0)
    run.train(0, 2)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    run.save(tmp_path)
    fresh = Run(seed=1)
    restore(load_quietly(tmp_path), fresh.optimizer, parameters=fresh.parameters, named=fresh.names)
    groups = fresh.optimizer.param_groups
    assert [group["lr"] for group in groups] == rates
    assert [group["betas"] for group in groups] == [(0.9, 0.999), (0.8, 0.9)]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.01]
    assert groups[1]["peak"] == 3e-3


def test_a_checkpoint_can_be_restored_twice(tmp_path: Path) -> None:
    run = Run(seed=0)
    run.train(0, 3)
    run.save(tmp_path)
    checkpoint = load_quietly(tmp_path)
    losses = []
    for _ in range(2):
        restore(checkpoint, run.optimizer, parameters=run.parameters, named=run.names)
        losses.append(run.train(3, 6))
    assert losses[0] == losses[1]


def test_the_next_stage_takes_parameters_alone(tmp_path: Path) -> None:
    run = Run(seed=0)
    run.train(0, 3)
    run.save(tmp_path)
    fresh = Run(seed=1)
    before = fresh.state()
    restore(load_quietly(tmp_path), None, parameters=fresh.parameters)
    assert_bits_equal(fresh.state()["parameters"], run.state()["parameters"])
    assert_bits_equal(fresh.state()["optimizer"], before["optimizer"])


def test_files_are_safetensors_and_json_alone(tmp_path: Path) -> None:
    run = Run(seed=0)
    run.train(0, 1)
    path = run.save(tmp_path, stage=1, step=7)
    assert path == tmp_path / "checkpoint-1-7"
    assert sorted(entry.name for entry in path.iterdir()) == ["state.json", "state.safetensors"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-1-7"]
    state = json.loads((path / "state.json").read_text())
    assert (state["stage"], state["step"]) == (1, 7)
    assert state["groups"][0]["params"] == ["0.weight", "0.bias"]
    keys = load_quietly(tmp_path).tensors.keys()
    assert {"parameter.idle", "optimizer.exp_avg.0.weight", "optimizer.step.2.bias", "rng.cpu"} <= keys
    assert "optimizer.exp_avg.idle" not in keys


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path, keep: int) -> None:
    run = Run(seed=0)
    places = [(0, 8), (0, 9), (0, 10), (0, 100), (1, 2), (1, 11), (10, 0)]
    for count, (stage, step) in enumerate(places, start=1):
        run.save(tmp_path, stage, step, keep=keep)
        kept = {f"checkpoint-{a}-{b}" for a, b in places[max(count - keep, 0) : count]}
        assert {entry.name for entry in tmp_path.iterdir()} == kept
        found = load_quietly(tmp_path)
        assert (found.stage, found.step) == (stage, step)


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "state.safetensors").write_bytes(content)


def cut_short(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-7])  # type: ignore[return-value]


def drop_checksum(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    (path / "state.json").write_text(json.dumps(state))


DAMAGES = [
    pytest.param(flip_a_bit, id="flipped-bit"),
    pytest.param(cut_short("state.safetensors"), id="short-tensors"),
    pytest.param(cut_short("state.json"), id="short-json"),
    pytest.param(lambda path: (path / "state.safetensors").unlink(), id="no-tensors"),
    pytest.param(lambda path: (path / "state.json").unlink(), id="no-json"),
    pytest.param(lambda path: (path / "state.json").write_text("[]"), id="other-json"),
    pytest.param(lambda path: (path / "state.json").write_bytes(b"\xff\xfe"), id="not-text"),
    pytest.param(drop_checksum, id="no-checksum"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    run = Run(seed=0)
    run.save(tmp_path, step=1)
    newest = run.save(tmp_path, step=2)
    damage(newest)
    with pytest.warns(RuntimeWarning, match=r"checkpoint-0-2 is damaged"):
        found = load_latest(tmp_path)
    assert found is not None and found.step == 1
    # Going on from there writes over the damaged one, and what is kept is whole.
    run.save(tmp_path, step=2, extra={"again": True})
    assert load_quietly(tmp_path).extra == {"again": True}
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-0-1", "checkpoint-0-2"}
    damage(tmp_path / "checkpoint-0-1")
    damage(tmp_path / "checkpoint-0-2")
    # A run that has lost what it had done does not start again unasked.
    with pytest.raises(
        ValueError, match=r"no checkpoint is whole \(checkpoint-0-2: .*; checkpoint-0-1: .*\)\. Restore"
    ):
        load_latest(tmp_path)


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    run = Run(seed=0)
    run.save(tmp_path, step=1, keep=3)
    flip_a_bit(run.save(tmp_path, step=2, keep=3))
    run.save(tmp_path, step=3, keep=2)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-0-1", "checkpoint-0-3"}


def test_there_may_be_none(tmp_path: Path) -> None:
    assert load_quietly(tmp_path / "missing") is None
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / ".tmp-checkpoint-0-5").mkdir()
    (tmp_path / ".tmp-checkpoint-0-5" / "state.safetensors").write_bytes(b"half")
    assert load_quietly(tmp_path) is None
    Run(seed=0).save(tmp_path, step=4)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-0-4", "checkpoint-final"}


def test_an_earlier_step_than_what_is_there_is_refused(tmp_path: Path) -> None:
    run = Run(seed=0)
    later = run.save(tmp_path, stage=1, step=5)
    with pytest.raises(ValueError, match=r"got stage 0, step 9, but .*checkpoint-1-5 is later"):
        run.save(tmp_path, stage=0, step=9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1-5"]
    flip_a_bit(later)
    run.save(tmp_path, stage=0, step=9)
    assert load_quietly(tmp_path).step == 9


def test_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    path = Run(seed=0).save(tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(ValueError, match="format: got 2; accepted: 1"):
        load_latest(tmp_path)


def tie(run: Run) -> dict[str, Any]:
    return {"parameters": {**run.parameters, "tied": run.parameters["0.weight"]}}


def sgd(run: Run) -> dict[str, Any]:
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    optimizer.state[run.model.idle]["momentum_buffer"] = None
    return {"optimizer": optimizer, "named": list(run.parameters)}


def tensor_rate(run: Run) -> dict[str, Any]:
    run.optimizer.param_groups[1]["lr"] = torch.tensor(0.1)
    return {}


def other_dtype(run: Run) -> dict[str, Any]:
    run.optimizer.state[run.model.idle]["exp_avg"] = torch.zeros(2, dtype=torch.float64)
    return {}


REFUSED = [
    pytest.param(lambda run: {"stage": -1}, "stage: got -1; accepted: a whole number of 0 or more", id="stage"),
    pytest.param(lambda run: {"step": 1.0}, "step: got 1.0", id="step"),
    pytest.param(lambda run: {"keep": 0}, "keep: got 0; accepted: a whole number of 1 or more", id="keep"),
    pytest.param(lambda run: {"extra": {"x": {1, 2}}}, "extra: .*set.*; accepted: numbers, texts", id="extra"),
    pytest.param(lambda run: {"named": run.names[:-1]}, "named: got 4 distinct names for 5", id="too-few-names"),
    pytest.param(lambda run: {"named": ["0.bias"] * 5}, "named: got 1 distinct names for 5", id="one-name"),
    pytest.param(lambda run: {"named": [*run.names[:-1], "x"]}, "named: 'x' is not among", id="unknown-name"),
    pytest.param(lambda run: {"named": run.names[::-1]}, r"named: 'idle' has shape \(2,\)", id="other-order"),
    pytest.param(tie, "parameters: '0.weight' and 'tied' share memory", id="tied"),
    pytest.param(sgd, "optimizer: its state 'momentum_buffer' of 'idle' is None", id="not-a-tensor"),
    pytest.param(tensor_rate, r"optimizer\.param_groups\.1\.lr: .*Tensor", id="tensor-as-rate"),
    pytest.param(other_dtype, "'exp_avg' of 'idle' is torch.float64; .* torch.float32", id="moment-dtype"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_saved_is_named(tmp_path: Path, change: Callable[[Run], Any], message: str) -> None:
    run = Run(seed=0)
    with pytest.raises(ValueError, match=message):
        run.save(tmp_path / "run", **change(run))
    assert not (tmp_path / "run").exists()


def other_shape(run: Run) -> dict[str, Any]:
    return {"parameters": {**run.parameters, "idle": torch.zeros(3)}}


def half(run: Run) -> dict[str, Any]:
    return {"parameters": {**run.parameters, "idle": torch.zeros(2, dtype=torch.bfloat16)}}


def one_group(run: Run) -> dict[str, Any]:
    return {"optimizer": torch.optim.AdamW(run.model.parameters()), "named": list(run.parameters)}


MISMATCHES = [
    pytest.param(
        lambda run: {"parameters": {"new": torch.zeros(1), **run.parameters}},
        r"missing there: \['new'\]",
        id="unknown-parameter",
    ),
    pytest.param(
        lambda run: {"parameters": {"0.bias": run.parameters["0.bias"]}},
        r"only there: \['0.weight', ",
        id="fewer-parameters",
    ),
    pytest.param(other_shape, r"idle: \(2,\) of torch.float32 there, \(3,\)", id="shape"),
    pytest.param(half, r"idle: .* there, \(2,\) of torch.bfloat16 here", id="dtype"),
    pytest.param(one_group, "named: the optimizer's groups hold", id="groups"),
]


@pytest.mark.parametrize(("change", "message"), MISMATCHES)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, change: Callable[[Run], Any], message: str) -> None:
    run = Run(seed=0)
    run.train(0, 2)
    run.save(tmp_path)
    other = Run(seed=1)
    before, random = other.state(), torch.get_rng_state()
    arguments = {
        "optimizer": other.optimizer,
        "parameters": other.parameters,
        "named": other.names,
        **change(other),
    }
    with pytest.raises(ValueError, match=message):
        restore(load_quietly(tmp_path), **arguments)
    assert_bits_equal(other.state(), before)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
def test_no_kill_leaves_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_savers.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    deaths = json.loads(finished.stdout)
    # A folder made, two files written, each flushed, one renamed; and later an old one renamed and removed.
    assert deaths["first"] > 6
    assert min(deaths["pruning"], deaths["replacing"]) > deaths["first"] + 3
    assert deaths["saved_between_random_deaths"] > 0


def test_a_new_folder_is_claimed_once_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    assert claim_output_folder(folder, RECIPE) is None
    assert [entry.name for entry in folder.iterdir()] == ["run.json"]
    (folder / "report.md").write_text("x")
    found = claim_output_folder(folder, copy.deepcopy(RECIPE))
    assert found is not None
    assert (found["kind"], found["recipe"]) == ("ssm-zoo distillation run", RECIPE)
    assert json.loads((folder / "run.json").read_text()) == found


def test_an_empty_folder_may_be_claimed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-ssm-zoo-0123456789abcdef").write_text("{")  # of a start that was killed
    assert claim_output_folder(str(tmp_path), {"half_life": (1.0, 2.0)}) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    assert claim_output_folder(tmp_path, {"half_life": [1.0, 2.0]}) is not None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("thesis.tex", "text", id="somebodys-file"),
        pytest.param(".hidden", "", id="hidden-file"),
        pytest.param("run.json", '{"kind": "something else", "format": 1, "recipe": {}}', id="another-tools-marker"),
        pytest.param("run.json", '{"kind": "ssm-zoo distillation run", "format": 9}', id="another-format"),
        pytest.param("run.json", "not JSON", id="not-a-marker"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"output folder: .*(holds no run.json|is not the marker)"):
        claim_output_folder(tmp_path, RECIPE)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [(name, content)]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="is a file; accepted: a new or empty folder"):
        claim_output_folder(tmp_path / "file", RECIPE)
    assert (tmp_path / "file").read_text() == "text"


def test_another_recipe_is_refused_by_its_differences(tmp_path: Path) -> None:
    claim_output_folder(tmp_path, RECIPE)
    before = (tmp_path / "run.json").read_bytes()
    changed = copy.deepcopy(RECIPE) | {"seed": 1, "dtype": "float32"}
    changed["stages"][0]["tokens"] = 16
    changed["student"]["layers"] = [0]
    with pytest.raises(ValueError) as caught:
        claim_output_folder(tmp_path, changed)
    text = str(caught.value)
    assert "seed: 0 there, 1 here" in text
    assert "stages.0.tokens: 8 there, 16 here" in text
    assert "student.layers: [0, 1] there, [0] here" in text
    assert "dtype: 'absent' there, 'float32' here" in text
    assert "teacher" not in text and "name" not in text
    assert (tmp_path / "run.json").read_bytes() == before


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"loss": [1.5, None]})
    assert json.loads(path.read_text()) == {"loss": [1.5, None]}
    with pytest.raises(ValueError, match=r"report\.json: .*accepted: numbers"):
        write_json(path, {"loss": object()})
    assert json.loads(path.read_text()) == {"loss": [1.5, None]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
