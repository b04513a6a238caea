"""Every script of examples/ runs with --tiny, in a folder of its own, without a network."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked_runs
import pytest

if importlib.util.find_spec("sentence_transformers") is None:
    pytest.skip("sentence-transformers is not installed", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "tiny_inputs.py")
MAX_LINES = 80

# What is tested: scripts that need TRL only where it is installed.
RUNNABLE = [name for name in SCRIPTS if name not in ("dpo.py", "sft.py") or importlib.util.find_spec("trl") is not None]

# What each script leaves behind, and what it prints at its end.
LOSS = r"held-out loss: (?P<before>\d+\.\d+) -> (?P<after>\d+\.\d+)\n"
EXPECTED: dict[str, tuple[str, str]] = {
    "convert_and_serve.py": (
        "runs/served/transformers/model.safetensors",
        r"difference of the logits: \d\.\de-0[6-9]\n",
    ),
    "distil_your_transformer.py": (
        "runs/distilled/student/model.safetensors",
        r"teacher +held-out loss \d+\.\d+\n(.*\n)*logit_distillation +held-out loss \d+\.\d+\n",
    ),
    "embedder.py": ("runs/embedder/model/model.safetensors", r"query: Robert .*\nfound: \w+.*\n"),
    "native_mamba_cpu.py": ("runs/native-mamba/model/model.safetensors", LOSS),
    "lora.py": ("runs/lora/adapter/adapter_model.safetensors", LOSS),
    "dpo.py": ("runs/dpo/model/model.safetensors", LOSS),
    "sft.py": ("runs/sft/model/model.safetensors", LOSS),
    "reranker.py": ("runs/reranker/reranker/model.safetensors", r"(0\.\d{3}  .*\n){3}"),
    "train_from_scratch.py": ("runs/from-scratch/model/model.safetensors", LOSS),
}


def test_every_script_is_tested_listed_and_short() -> None:
    assert EXPECTED.keys() == set(SCRIPTS)
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES, path.name
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[`(\w+\.py)`\]", index, re.MULTILINE)) == SCRIPTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of each script the folder that it ran in, its exit status and its output."""
    folder = tmp_path_factory.mktemp("examples")
    plan = []
    for name in RUNNABLE:
        (folder / name).mkdir()
        script = {"kind": "script", "text": str(EXAMPLES / name), "arguments": ["--tiny"]}
        plan.append({**script, "folder": str(folder / name)})
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", forked_runs.__file__, "plan.json", "results.json"]
    subprocess.run(command, env=environment, cwd=folder, check=True)
    results = json.loads((folder / "results.json").read_text())
    return {name: (folder / name, result) for name, result in zip(RUNNABLE, results, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_at_tiny_size(name: str, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    if name not in RUNNABLE:
        pytest.skip("trl is not installed")
    folder, result = runs[name]
    assert result["status"] == 0, result["output"]
    written, printed = EXPECTED[name]
    assert (folder / written).is_file()
    match = re.search(printed, result["output"])
    assert match, result["output"]
    if "before" in match.groupdict():
        assert float(match["after"]) < float(match["before"])
