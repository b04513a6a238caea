"""The `ssm-zoo` command at work: distilling, cards, generating, exporting and pushing tiny models."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from families import make_model
from huggingface_hub import HfApi
from tiny_checkpoints import CARD, save_llama, save_tokenizer, save_zoo_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hub_stand_in import HubStandIn
from ssm_zoo.cli.main import app
from ssm_zoo.conversion.export import export, verify_export
from ssm_zoo.modeling import ZooHybridForCausalLM

REPO = "tester/model"
TOKEN = "a-token-of-the-hub"
_RESOLVE = "{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a zoo model and a Llama."""
    folder = tmp_path_factory.mktemp("models")
    save_zoo_checkpoint(folder / "zoo")
    save_llama(folder / "llama")
    return folder


def ssm_zoo(*arguments: object, status: int = 0) -> str:
    """Run a command line in this process; its stdout, or with another status its stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result.stdout if status == 0 else result.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Distilling, and what takes the folder of a run

RECIPE = """
teacher: llama
student: {layers: odd, half_life: [1, 8]}
data: {train: text.txt, heldout: text.txt, sequence_length: 16}
stages:
- {name: align, objective: hidden_state_alignment, tokens: 64, batch_size: 2, learning_rate: 1.0e-3}
evaluation: {tokens: 64, prompts: [abc], max_new_tokens: 4, final: false}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished distillation, and what the command printed beside it."""
    folder = tmp_path_factory.mktemp("run")
    save_llama(folder / "llama")
    letters = random.Random(0)
    (folder / "text.txt").write_text(" ".join("".join(letters.choices("abcdefgh", k=5)) for _ in range(200)))
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "printed.txt").write_text(ssm_zoo("distill", "recipe.yaml", "out", "--set", "seed=3"))
    return folder / "out"


def test_distill_carries_out_the_recipe_and_prints_the_evaluation(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["recipe"]["seed"] == 3
    assert report["command"] == "ssm-zoo distill recipe.yaml out --set seed=3"
    printed = (run.parent / "printed.txt").read_text()
    for evaluation in report["evaluations"]:
        assert f"{evaluation['loss']:.4f}" in printed
    assert "report: out/report.md   student: out/student\n" in printed


def test_distill_given_again_has_nothing_left_to_do(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    before = files(run / "student")
    printed = ssm_zoo("distill", "recipe.yaml", "out", "--set", "seed=3")
    assert "student: out/student\n" in printed
    assert files(run / "student")["model.safetensors"] == before["model.safetensors"]
    assert "seed: 3 there, 4 here" in ssm_zoo("distill", "recipe.yaml", "out", "--set", "seed=4", status=2)


def test_card_is_written_anew(run: Path) -> None:
    card = run / "student" / "README.md"
    card.unlink()
    assert ssm_zoo("card", run, "--repo-id", "me/my-student") == f"{card}\n"
    assert 'repository, revision = "me/my-student"' in card.read_text()
    written = card.read_text()
    assert "repo_id must be a Hub id ORGANISATION/NAME, got 'me/my student'" in ssm_zoo(
        "card", run, "--repo-id", "me/my student", status=2
    )
    assert card.read_text() == written


def test_folder_of_a_run_means_its_student(run: Path, tmp_path: Path) -> None:
    assert ssm_zoo("generate", run, "abc", "--max-new-tokens", 2).startswith("abc")
    ssm_zoo("export", run, tmp_path / "out", "--no-verify")
    ours, theirs = files(tmp_path / "out"), files(run / "student")
    assert ours == theirs
    assert "plots/losses.png" in ours


# Generating


def continuation(folder: Path, prompt: str, tokens: int) -> str:
    """A prompt and the likeliest text after it, up to the end token, by a loop without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["zoo", "llama"])
def test_generate_takes_the_likeliest_tokens(models: Path, name: str) -> None:
    expected = [continuation(models / name, prompt, 6) for prompt in ("abc", "hello world")]
    printed = ssm_zoo("generate", models / name, "abc", "hello world", "--max-new-tokens", 6)
    assert printed == f"{expected[0]}\n\n{expected[1]}\n"


def test_generate_draws_by_seed(models: Path) -> None:
    def draw(*options: object) -> str:
        return ssm_zoo("generate", models / "llama", "abc", "--max-new-tokens", 20, *options)

    first = draw("--temperature", 1.5, "--seed", 1)
    assert first == draw("--temperature", 1.5, "--seed", 1)
    assert first != draw("--temperature", 1.5, "--seed", 2)
    # So little probability is held by the likeliest token alone, and so low a temperature leaves no choice.
    likeliest = draw()
    assert first != likeliest
    assert likeliest == draw("--temperature", 1.5, "--seed", 1, "--top-p", 1e-6)
    assert likeliest == draw("--temperature", 1e-4, "--seed", 1)


def test_generate_puts_a_question_into_the_chat_template(models: Path) -> None:
    prompt = "q why a "
    expected = continuation(models / "zoo", prompt, 6).removeprefix(prompt)
    assert expected not in ("", continuation(models / "zoo", "why", 6).removeprefix("why"))
    assert ssm_zoo("generate", models / "zoo", "why", "--chat", "--max-new-tokens", 6) == f"{expected}\n"


def test_generate_reads_a_prompt_in_both_directions_when_told(models: Path, tmp_path: Path) -> None:
    model: Any = make_model("prefix-mamba2")
    model.save_pretrained(tmp_path / "prefix")
    save_tokenizer(tmp_path / "prefix")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "prefix")
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    printed = []
    for options, inputs in (([], {}), (["--prefix"], {"prefix_mask": torch.ones_like(ids)})):
        written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=0, **inputs)
        expected = tokenizer.decode(written[0], skip_special_tokens=True)
        printed.append(ssm_zoo("generate", tmp_path / "prefix", "hello world", "--max-new-tokens", 8, *options))
        assert printed[-1] == f"{expected}\n"
    assert printed[0] != printed[1]
    message = ssm_zoo("generate", models / "zoo", "abc", "--prefix", status=2)
    assert "is made with prefix_bidirectional=False and reads prompts causally" in message


@pytest.mark.parametrize("options", [(), ("--chat",)], ids=["text", "chat"])
def test_generate_leaves_out_the_segments_of_a_tokenizer(
    models: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    folder = shutil.copytree(models / "zoo", tmp_path / "segments")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"model_input_names": names}))
    assert "token_type_ids" in AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("abc")
    line = ("abc", "--max-new-tokens", 4, *options)
    assert ssm_zoo("generate", folder, *line) == ssm_zoo("generate", models / "zoo", *line)


@pytest.mark.parametrize("command", ["generate", "show"])
def test_a_token_without_an_embedding_is_named(models: Path, tmp_path: Path, command: str) -> None:
    folder = shutil.copytree(models / "zoo", tmp_path / "zoo")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    message = ssm_zoo(command, folder, "a zebra", status=2)
    assert re.search(
        r"MODEL: the tokenizer's ids must be below 61, .* got 61\. Use the tokenizer that belongs", message
    )


def test_generate_loads_in_the_dtype(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    generate = ZooHybridForCausalLM.generate

    def spy(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(self.lm_head.weight.dtype)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(ZooHybridForCausalLM, "generate", spy)
    for dtype in ("auto", "bfloat16"):
        ssm_zoo("generate", models / "zoo", "abc", "--max-new-tokens", 2, "--dtype", dtype)
    assert seen == [torch.float32, torch.bfloat16]


def test_generate_ignores_the_code_of_a_zoo_checkpoint(models: Path, tmp_path: Path) -> None:
    """The package has that code itself, trusted or not."""
    folder = shutil.copytree(models / "zoo", tmp_path / "zoo")
    (folder / "modeling_hybrid.py").write_text("raise RuntimeError('was run')")
    (folder / "configuration_hybrid.py").write_text("raise RuntimeError('was run')")
    for options in ([], ["--trust-remote-code"]):
        assert ssm_zoo("generate", folder, "abc", "--max-new-tokens", 2, *options).startswith("abc")


def test_generate_runs_code_of_others_when_told(models: Path, tmp_path: Path, modules_cache: Path) -> None:
    folder = shutil.copytree(models / "llama", tmp_path / "other")
    (folder / "configuration_other.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OtherConfig(LlamaConfig):\n    model_type = 'other_llama'\n"
    )
    (folder / "modeling_other.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_other import OtherConfig\n\n\n"
        "class OtherForCausalLM(LlamaForCausalLM):\n    config_class = OtherConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "other_llama"
    config["auto_map"] = {
        "AutoConfig": "configuration_other.OtherConfig",
        "AutoModelForCausalLM": "modeling_other.OtherForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["generate", folder, "abc", "--max-new-tokens", 6]
    assert "brings code of its own" in ssm_zoo(*arguments, status=2)
    assert not modules_cache.exists()
    assert ssm_zoo(*arguments, "--trust-remote-code") == ssm_zoo("generate", models / "llama", *arguments[2:])


# Exporting


def test_export_keeps_what_is_not_code(models: Path, tmp_path: Path) -> None:
    """From a folder whose code is not to be run, whose config names no code, and which holds other things."""
    folder = shutil.copytree(models / "zoo", tmp_path / "zoo")
    for path in folder.glob("*.py"):
        path.write_text("raise RuntimeError('was run')")
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training_args.bin").write_bytes(b"\x80")
    (tmp_path / "empty" / "out").mkdir(parents=True)
    out = tmp_path / "empty" / "out"
    assert re.fullmatch(
        rf"{out}: not verified; code: \d+ files, \d,\d{{3}} lines\n", ssm_zoo("export", folder, out, "--no-verify")
    )
    assert list((tmp_path / "empty").iterdir()) == [out]
    assert files(out) == files(models / "zoo")
    assert out.stat().st_mode & 0o777 == (tmp_path / "empty").stat().st_mode & 0o777


def test_verified_export_of_a_model_without_a_head(tmp_path: Path) -> None:
    make_model("mamba2-groups").backbone.to(torch.bfloat16).save_pretrained(tmp_path / "backbone")
    assert export(tmp_path / "backbone", tmp_path / "out", verify=False) == tmp_path / "out"
    proof = verify_export(tmp_path / "out")
    assert proof.pop("seconds") > 0
    assert proof == {"auto_class": "AutoModel", "dtype": "bfloat16", "shape": [1, 16, 16], "bit_equal": True}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        pytest.param(
            "zoo_model.py",
            "import os\n",
            "import os\nimport ssm_zoo.modeling\n",
            "does not load without ssm-zoo: ModuleNotFoundError: an exported folder must not need ssm_zoo",
            id="needs-the-package",
        ),
        pytest.param(
            "zoo_model.py",
            "logits = self.scale_logits(",
            "logits = 1.0000001 * self.scale_logits(",
            r"gives other logits: \(1, 16, 61\) of torch.float32, here .* apart",
            id="computes-something-else",
        ),
    ],
)
def test_export_that_is_not_the_package_is_found_out(
    models: Path, tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    folder = shutil.copytree(models / "zoo", tmp_path / "zoo")
    text = (folder / file).read_text()
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        verify_export(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=f"code that is not of this version of ssm-zoo: {file}. Export it again"):
        verify_export(folder)


# Pushing


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A Hub that this process' client talks to."""
    with HubStandIn() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{_RESOLVE}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


def pushed(output: str) -> str:
    """The commit that a push says to pin."""
    return output.rpartition("to pin it: revision=")[2].strip()


def test_pushed_model_is_exported_again_from_its_revision(models: Path, tmp_path: Path) -> None:
    """In processes as a user starts them, of a branch that has moved on since."""

    def process(*arguments: object) -> str:
        command = [sys.executable, "-m", "ssm_zoo.cli.main", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert environment["HF_TOKEN"] not in done.stdout + done.stderr
        return done.stdout

    with HubStandIn() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        output = process("push", models / "zoo", REPO, "--message", "First")
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        revision = api.model_info(REPO).sha
        assert pushed(output) == revision
        assert f"commit: {hub.endpoint}/{REPO}/commit/{revision}\n" in output
        assert api.list_repo_commits(REPO)[0].title == "First"
        api.delete_file("model.safetensors", REPO)
        printed = process("export", REPO, "out", "--revision", revision)
        assert "out: loads without ssm-zoo and gives the same logits, bit for bit; code: " in printed
    assert files(tmp_path / "out") == files(models / "zoo")


def test_push_replaces_card_and_weights_and_leaves_the_rest(models: Path, tmp_path: Path, api: HfApi) -> None:
    folder = shutil.copytree(models / "zoo", tmp_path / "zoo")
    ssm_zoo("push", folder, REPO)
    for name in ("notes.txt", "onnx/model.safetensors", "old.py"):
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo=name, repo_id=REPO)
    ZooHybridForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "README.md").write_text(CARD.replace("My", "Another"))
    revision = pushed(ssm_zoo("push", folder, REPO))
    kept = {".gitattributes", ".ssm-zoo.json", "notes.txt", "onnx/model.safetensors", "old.py"}
    names = set(api.list_repo_files(REPO, revision=revision))
    assert names == set(files(folder)) | kept
    assert "model.safetensors.index.json" in names
    card = api.hf_hub_download(REPO, "README.md", revision=revision, cache_dir=tmp_path / "cards")
    assert Path(card).read_text() == CARD.replace("My", "Another")


def test_push_by_a_bare_name_goes_to_the_user(models: Path, api: HfApi) -> None:
    ssm_zoo("push", models / "zoo", "model", "--private")
    assert api.model_info(REPO).private


def test_push_does_not_make_a_private_model_public(models: Path, api: HfApi) -> None:
    api.create_repo(REPO)
    before = api.model_info(REPO).sha
    message = ssm_zoo("push", models / "zoo", REPO, "--private", status=2)
    assert message == f"ssm-zoo: --private: {REPO} is public; make it private on the Hub, or choose another name\n"
    assert api.model_info(REPO).sha == before


def test_push_to_a_branch_and_as_a_pull_request(models: Path, api: HfApi, hub: HubStandIn) -> None:
    revision = pushed(ssm_zoo("push", models / "zoo", REPO, "--revision", "next"))
    assert api.model_info(REPO, revision="next").sha == revision
    assert api.list_repo_files(REPO) == [".gitattributes"]
    output = ssm_zoo("push", models / "zoo", REPO, "--create-pr")
    assert f"pull request: {hub.endpoint}/{REPO}/discussions/1\n" in output
    assert api.model_info(REPO, revision="refs/pr/1").sha == pushed(output)
    assert api.list_repo_files(REPO) == [".gitattributes"]


def test_push_that_the_hub_refuses_ends_in_one_line(models: Path, hub: HubStandIn) -> None:
    message = ssm_zoo("push", models / "zoo", "--", "a--b/model", status=2)
    assert message.startswith("ssm-zoo: ")
    assert message.count("\n") == 1
    assert not any(request.method == "POST" for request in hub.requests)
