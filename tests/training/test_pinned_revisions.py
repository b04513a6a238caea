"""A run whose model is on the Hub goes on with the commit that it was started with, wherever the branch has moved."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_pairs import write_pairs
from families import make_model
from huggingface_hub import HfApi
from resume_from_the_hub import COMMANDS, STEPS
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_llama, save_tokenizer

from hub_stand_in import HubStandIn

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

SCRIPT = Path(__file__).parents[1] / "support" / "resume_from_the_hub.py"
RECIPE = f"""\
teacher: tester/llama
student: {{layers: odd, half_life: [1, 8]}}
data: {{train: text.txt, heldout: text.txt, sequence_length: 16}}
stages:
- {{name: align, objective: hidden_state_alignment, tokens: {STEPS * 32}, batch_size: 2, learning_rate: 1.0e-3}}
evaluation: {{tokens: 64, prompts: [], final: false}}
checkpoint_every: 2
"""


def swap_letters(folder: Path) -> None:
    """Let a tokenizer give "a" the id of "b", and the other way round."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the runs, and for each what it said, with the "commits" of the two repositories."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "text.txt").write_text("abc def ghi " * 20)
    write_pairs(folder / "pairs.jsonl", 9)
    (folder / "recipe.yaml").write_text(RECIPE)

    def stage(name: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), name],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    commits: dict[str, list[str]] = {"zoo": [], "llama": []}
    with HubStandIn() as hub:
        api = HfApi(endpoint=hub.endpoint, token="hub-stand-in")

        def push(licence: str) -> None:
            for name, oids in commits.items():
                (folder / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
                api.create_repo(f"tester/{name}", exist_ok=True)
                oids.append(api.upload_folder(repo_id=f"tester/{name}", folder_path=folder / name).oid)

        environment = {**os.environ, **hub.environment(folder / "home"), "OMP_NUM_THREADS": "1"}
        make_model("mamba2-full").save_pretrained(folder / "zoo")
        save_tokenizer(folder / "zoo")
        save_llama(folder / "llama")
        push("mit")
        stage("start")
        # Other weights, sizes, tokens and licences, under the same names.
        make_model("mamba2-full", seed=1, intermediate_size=40).save_pretrained(folder / "zoo")
        save_llama(folder / "llama")
        tensors = load_file(folder / "llama" / "model.safetensors")
        moved = {key: tensor + 0.01 for key, tensor in tensors.items()}
        save_file(moved, folder / "llama" / "model.safetensors", metadata={"format": "pt"})
        for name in commits:
            swap_letters(folder / name)
        push("apache-2.0")
        return folder, stage("resume") | {"commits": commits}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's results; its checkpoints apart."""
    files = [path for path in sorted(run.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    return {f"{path.relative_to(run)} {key}": tensor for path in files for key, tensor in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_goes_on_with_its_commit_after_the_branch_has_moved(
    resumed: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, found = resumed
    ours, theirs = weights(folder / name), weights(folder / f"{name}-whole")
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    source = "llama" if name == "distill" else "zoo"
    first, second = found["commits"][source]
    assert first != second
    refused = " ".join(found[name]["refused"].split())
    assert f"was started from commit {first} of tester/{source}, got {second}" in refused
    assert "resuming from checkpoint-" in found[name]["said"]
    report = found[name]["report"]
    base = report["base"] if "base" in report else report.get("teacher", {})
    assert base.get("revision", first) == first
    assert base.get("licence", "mit") == "mit"
    assert {"base", "teacher"} & report.keys() or name.startswith("train")
    sources = json.loads((folder / name / "run.json").read_text())["recipe"]["sources"]
    assert {entry["commit"] for entry in sources.values()} == {first}
