"""What a new mixer and a new family cost: their own files, a row of a table, a tiny configuration.

The package is copied, a toy mixer and a toy family are added to the copy, and another process uses them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADDITIONS = Path(__file__).with_name("additions")
PACKAGE = ("modeling", "kernels", "harness", "conversion", "reports", "evaluation", "training", "distill")
ROW = '    "masked_mixing": MASKED_MIXING,\n'


@pytest.mark.slow
def test_a_mixer_is_a_file_and_a_row_and_a_family_two_files(tmp_path: Path) -> None:
    package = tmp_path / "with_toys" / "ssm_zoo"
    for folder in PACKAGE:
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("leaky.py", "configuration_leaky.py", "modeling_leaky.py"):
        shutil.copy(ADDITIONS / name, package / "modeling" / name)
    table = package / "modeling" / "token_mixers.py"
    text = table.read_text()
    assert text.count(ROW) == 1
    text = text.replace(ROW, f'{ROW}    "leaky": LEAKY,\n')
    table.write_text(text.replace("from .masked_mixing", "from .leaky import LEAKY\nfrom .masked_mixing", 1))
    command = [sys.executable, "-P", str(ADDITIONS / "use_leaky.py"), str(package.parent), str(ROOT / "tests")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert " passed" in done.stdout
