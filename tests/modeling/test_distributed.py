"""Two processes train every family with DDP, FSDP1 and FSDP2 on the CPU (`train_distributed.py`)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from train_distributed import PREPARED, WAYS


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], dict[str, Any]]:
    """What both processes found, by family and way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("train_distributed.py")
    path = os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output, errors = processes[0].communicate(timeout=600)
        _, others = processes[1].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors + others
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {(one["name"], one["way"]): one for one in found}


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
