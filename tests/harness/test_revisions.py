"""Revisions of Hub repositories: a branch or tag becomes a commit, of which every file is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from huggingface_hub import HfApi
from teachers import make_teacher, save_teacher
from transformers import Mamba2Config, Mamba2ForCausalLM
from typer.testing import CliRunner

from hub_stand_in import HubStandIn
from ssm_zoo.cli.main import app
from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.formats.state_spaces import byte_tokenizer
from ssm_zoo.distill.fetch import teacher_commit
from ssm_zoo.distill.recipe import as_mapping
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.teacher import load_teacher
from ssm_zoo.training.new_model import configuration_commit

# What a user's process finds on the Hub, by the revision "first", a tag of the first commit.
USER = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
from ssm_zoo.conversion.formats.state_spaces import byte_tokenizer
from ssm_zoo.cli.main import app
from ssm_zoo.conversion.convert import convert
from ssm_zoo.distill.fetch import teacher_commit
from ssm_zoo.distill.teacher import load_teacher
from ssm_zoo.training.new_model import configuration_commit, resolve_configuration
folder, found = Path(sys.argv[1]), {}
for revision in ("first", None):
    name = str(revision)
    report = convert("tester/shards", folder / name, revision=revision, allow_pickle=True)
    found[f"{name} notes"] = report.notes
    found[f"{name} norm"] = load_file(folder / name / "model.safetensors")["backbone.norm_f.weight"][0].item()
    commit = teacher_commit("tester/teacher", revision, folder / "run")
    found[f"{name} teacher"] = load_teacher("tester/teacher", revision=commit).model.model.norm.weight[0].item()
    commit = configuration_commit("tester/zoo", revision, folder / "run")
    config = resolve_configuration("tester/zoo", [], byte_tokenizer(), revision=commit)
    found[f"{name} layers"] = [commit, config.num_hidden_layers]
try:
    convert("tester/shards", folder / "x", revision="none")
except OSError as error:
    found["unknown"] = type(error).__name__
print(json.dumps(found))
"""


def commits(api: HfApi, repo: str, folder: Path, change: Any) -> list[str]:
    """Push a folder, tag it "first", and push it again with a change."""
    api.create_repo(repo)
    first = api.upload_folder(repo_id=repo, folder_path=folder).oid
    api.create_tag(repo, tag="first", revision=first)
    change()
    return [first, api.upload_folder(repo_id=repo, folder_path=folder).oid]


def test_every_command_reads_the_revision_that_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4}
    theirs = Mamba2ForCausalLM(Mamba2Config(**sizes, head_dim=8, n_groups=1))
    teacher = make_teacher()

    def save_shards(value: float) -> None:
        """Save two pickles with an index, as `save_pretrained` once did."""
        state = theirs.state_dict() | {"backbone.norm_f.weight": torch.full((16,), value)}
        names = {key: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, key in enumerate(state)}
        for name in set(names.values()):
            torch.save({key: state[key] for key in state if names[key] == name}, tmp_path / "shards" / name)
        index = {"metadata": {}, "weight_map": names}
        (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    def save_teachers(value: float) -> None:
        teacher.model.norm.weight.data.fill_(value)
        save_teacher(tmp_path / "teacher", teacher)

    def save_zoo(layers: int) -> None:
        make_model("mamba2", num_hidden_layers=layers, vocab_size=256).save_pretrained(tmp_path / "zoo")

    (tmp_path / "shards").mkdir()
    theirs.config.save_pretrained(tmp_path / "shards")
    save_shards(1.5)
    save_teachers(1.5)
    save_zoo(1)
    byte_tokenizer().save_pretrained(tmp_path / "zoo")
    with HubStandIn() as hub:
        api = HfApi(endpoint=hub.endpoint, token="hub-stand-in")
        shards = commits(api, "tester/shards", tmp_path / "shards", lambda: save_shards(2.5))
        commits(api, "tester/teacher", tmp_path / "teacher", lambda: save_teachers(2.5))
        zoo = commits(api, "tester/zoo", tmp_path / "zoo", lambda: save_zoo(2))
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", USER, str(tmp_path / "out")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("unknown") == "RevisionNotFoundError"
    for name, number in (("first", 0), ("None", 1)):
        assert found[f"{name} notes"] == [f"source: tester/shards at commit {shards[number]}"]
        assert found[f"{name} norm"] == found[f"{name} teacher"] == 1.5 + number
        assert found[f"{name} layers"] == [zoo[number], 1 + number]


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    make_model("mamba2").save_pretrained(tmp_path / "zoo")
    with pytest.raises(ValueError, match=r"--revision must be left out for a folder such as .*, got 'v1'"):
        convert(tmp_path / "zoo", tmp_path / "out", revision="v1")
    for commit in (teacher_commit, configuration_commit):
        assert commit(str(tmp_path / "zoo"), None, tmp_path) is None
        with pytest.raises(ValueError, match=r"revision must be left out .*, got 'v1'"):
            commit(str(tmp_path / "zoo"), "v1", tmp_path)
    with pytest.raises(ValueError, match=r"revision must be left out .*, got 'v1'"):
        configuration_commit("mamba-130m", "v1", tmp_path)


def test_a_recipe_names_the_revision_only_where_there_is_one() -> None:
    """Runs that were begun before there was such a key go on."""
    given = ["teacher=tester/teacher", "data.train=a", "data.heldout=b"]
    assert "teacher_revision" not in as_mapping(load_recipe("mohawk", given))
    assert as_mapping(load_recipe("mohawk", [*given, "teacher_revision=v1"]))["teacher_revision"] == "v1"


def test_a_quantised_teacher_is_refused_with_its_method(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", make_teacher())
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"`quantization_config` says that the weights are quantised \(gptq\)"):
        load_teacher(tmp_path / "teacher")


@pytest.mark.parametrize(
    "line",
    [
        "generate zoo abc",
        "show zoo abc",
        "export zoo out",
        "convert zoo out",
        "evaluate length zoo text.txt",
        "evaluate inversion zoo text.txt",
        "evaluate lm-eval zoo --tasks arc_easy",
        "evaluate retrieval zoo beir",
        "evaluate rerank zoo beir",
        "evaluate translation zoo pairs.tsv",
    ],
)
def test_no_command_ignores_the_revision_of_a_folder(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model("mamba2").save_pretrained("zoo")
    done = CliRunner().invoke(app, [*line.split(), "--revision", "v1"])
    assert done.exit_code == 2
    assert done.stderr == "ssm-zoo: --revision must be left out for a folder such as zoo, got 'v1'.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]
