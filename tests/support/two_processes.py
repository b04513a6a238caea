"""Programs in two processes on the CPU, as `accelerate launch` starts them."""

import os
import subprocess
import sys
from pathlib import Path

# accelerate starts several CPU processes only as if they were for GPUs; it takes the device from the variable.
_PLAIN = ("--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def launch(*program: object, config: Path | None = None, **environment: str) -> str:
    """Run a program in two processes; return what they print.

    Args:
        *program: a script, or "-m" and a module, with its arguments.
        config: a launch file; None: whole weights in each process.
        **environment: further variables.
    """
    how = _PLAIN if config is None else ("--config_file", config)
    arguments = ["--num_processes", "2", "--main_process_port", "0", *how, *program]
    fixed = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "accelerate.commands.launch", *map(str, arguments)],
        env={**os.environ, **fixed, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
