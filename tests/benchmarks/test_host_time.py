"""The host's time for a Mamba-2 token, measured once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from with_triton import NEEDS_TRITON

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "host_time.py"


@NEEDS_TRITON
def test_one_launch_has_fewer_arguments_than_two(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, SCRIPT, "--rounds", "1", "--output", output]
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    one, two = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert one["way"] == "mamba2_step" and (one["launches"], two["launches"]) == (1, 2)
    assert 0 < one["arguments"] < two["arguments"]
    assert one["microseconds"] >= one["fastest"] > 0
