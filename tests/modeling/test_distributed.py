"""Two processes train on the CPU with DDP, FSDP1 and FSDP2.

With torch's and accelerate's functions (`train_distributed.py`), with transformers' Trainer, and with ours, which saves
checkpoints (`train_with_trainer.py`).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from save_together import TRAININGS
from sweeps import SWEEP
from tiny_trainings import weights
from train_distributed import PREPARED, WAYS
from train_with_trainer import cases

from ssm_zoo.harness.checkpoint_manifest import MANIFEST, damage

# Every family in every way takes many minutes: on request only.
EVERY = ("first", pytest.param("every", marks=[pytest.mark.slow, SWEEP]))


def run_pair(name: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a script of this folder in two processes; return what the first one prints as lines of JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name(name)
    path = os.pathsep.join([str(script.parent), str(script.parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        with ThreadPoolExecutor(2) as threads:  # a pipe that nobody reads fills up
            (output, errors), (_, others) = threads.map(lambda process: process.communicate(timeout=3600), processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors[-4000:] + others[-4000:]
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"')]


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], dict[str, Any]]:
    """What both processes found, by family and way."""
    return {(found["name"], found["way"]): found for found in run_pair("train_distributed.py")}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS + PREPARED)
def test_two_processes_train_every_family_as_one_does(results: dict[tuple[str, str], Any], way: str) -> None:
    if way in ("ddp", "fsdp1", "fsdp2"):
        losses, weights = 1e-5, 1e-6
    else:  # one bfloat16 spacing of a loss that comes back rounded, two of a weight; adapters are in float32
        losses, weights = 2**-7, 2**-9 if way.endswith("lora") else 2**-6
    for name in FAMILIES:
        found = results[name, way]
        assert found["losses"] == pytest.approx(found["alone"], rel=losses), (name, found)
        assert found["worst"] < weights, (name, found)
        assert found["moved"] > 0.002, (name, found)


@pytest.fixture(scope="module", params=EVERY)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Which models, the folder with the runs that were saved, and what the Trainer's processes found."""
    folder = tmp_path_factory.mktemp("saved")
    saved = ["train"] if request.param == "first" else ["train", "lm"]
    return request.param, folder, run_pair("train_with_trainer.py", request.param, str(folder), *saved)


def test_two_processes_of_the_trainer_train_every_kind_of_model_as_one_does(trained: tuple[str, Path, Any]) -> None:
    which, _, results = trained
    assert [(found["model"], found["way"]) for found in results] == cases(every=which == "every")
    for found in results:
        if found["way"].endswith("float32"):
            losses, weights, frozen = 1e-5, 1e-6, 1e-6
        elif found["way"].endswith("-lora"):  # where they are frozen in float32 in one process, rounded to bfloat16
            losses, weights, frozen = 2**-7, 2**-7 if "bf16" in found["way"] else 2**-9, 2**-7
        else:  # one bfloat16 spacing of a loss that comes back rounded, two of a weight
            losses, weights, frozen = 2**-7, 2**-6, 2**-6
        assert found["losses"] == pytest.approx(found["alone"], rel=losses), found
        assert found["worst"] <= weights, found
        assert found["frozen"] <= frozen, found
        assert found["moved"] > 0.002, found


def test_both_processes_checkpoints_are_whole_and_go_on_to_the_same_weights(trained: tuple[str, Path, Any]) -> None:
    for folder in trained[1].iterdir():
        training = TRAININGS[folder.name]
        whole = weights(str(folder / "whole"), training)
        for run in ("run", "flipped"):
            ours = weights(str(folder / run), training)
            assert ours.keys() == whole.keys() != set()
            assert all(ours[key].equal(whole[key]) for key in whole), run
        checkpoints = list((folder / "run" / "checkpoints").iterdir())
        assert {path.name for path in checkpoints} == {"checkpoint-4", "checkpoint-6"}
        for path in checkpoints:
            listed = json.loads((path / MANIFEST).read_text())
            assert {"rng_state_0.pth", "rng_state_1.pth", training.saved} <= set(json.dumps(listed).split('"'))
            assert damage(path) is None


def test_a_flipped_byte_in_a_checkpoint_of_two_processes_is_noticed(trained: tuple[str, Path, Any]) -> None:
    for folder in trained[1].iterdir():
        assert (folder / "said.txt").read_text().count("checkpoint-4 is damaged") == 1


def test_one_process_goes_on_from_a_checkpoint_of_two(
    trained: tuple[str, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in trained[1].iterdir():
        work = shutil.copytree(folder, tmp_path / folder.name)
        (work / "run").rename(work / "together")
        (work / "one").rename(work / "run")
        monkeypatch.chdir(work)
        alone = TRAININGS[folder.name].start()
        together = json.loads((work / "whole" / "report.json").read_text())
        assert alone["processes"] == 1 and together["processes"] == 2
        assert [point["step"] for point in alone["history"]] == [1, 2, 3, 4, 5, 6]
        assert [p["loss"] for p in alone["history"][:4]] == [p["loss"] for p in together["history"][:4]]
        # Half the rows of a step, of texts that all are alike.
        losses = [[point["loss"] for point in report["history"][4:]] for report in (alone, together)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert damage(work / "run" / "checkpoints" / "checkpoint-6") is None
