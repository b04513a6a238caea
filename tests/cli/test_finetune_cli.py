"""`ssm-zoo finetune lm`: every option arrives, a mistake is one line, and what it pushes loads without the package."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import typer
from families import make_model
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from tiny_checkpoints import save_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from hub_stand_in import HubStandIn
from ssm_zoo.cli.main import app
from ssm_zoo.training.settings import LanguageModelSettings

TEXT = "\n\n".join(" ".join("abcdefghij"[i : i + 4] for i in range(k, k + 5)) for k in range(5)) + "\n"
BASIC = ["--train", "text.txt", "--heldout", "text.txt", "--row-tokens", "32", "--steps", "2", "--rank", "2"]


@pytest.fixture
def ssm_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process, in a folder with a model and a text, without a token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["finetune", "lm", *map(str, arguments)])


def write_inputs(folder: Path) -> None:
    make_model("mamba2-full").save_pretrained(folder / "zoo")
    save_tokenizer(folder / "zoo")
    (folder / "text.txt").write_text(TEXT)


def test_help_explains_every_option() -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands["finetune"].commands["lm"]
    text = " ".join(CliRunner().invoke(app, ["finetune", "lm", "--help"]).stdout.split())
    for parameter in command.params:
        assert parameter.help, parameter.name
        assert " ".join(parameter.help.split()) in text
    names = {parameter.name for parameter in command.params}
    assert names >= LanguageModelSettings.model_fields.keys()


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from ssm_zoo.cli.main import app;"
        "assert CliRunner().invoke(app, ['finetune', 'lm', '--help']).exit_code == 0;"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_option_arrives(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "separator": "\n\n",
        "text_field": "body",
        "rank": 3,
        "alpha": 5.5,
        "dropout": 0.25,
        "dora": True,
        "target_modules": ["in_proj", "o_proj"],
        "packing": False,
        "row_tokens": 24,
        "batch_size": 3,
        "gradient_accumulation": 2,
        "epochs": 0.5,
        "learning_rate": 0.002,
        "schedule": "linear",
        "warmup": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "seed": 7,
        "checkpoint_every": 11,
    }
    line = ["zoo", "out", "--train", "text.txt", "--heldout", "text.txt", "--merge"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            line.append(option if value else f"--no-{name}")
        else:
            line += [option, ",".join(value) if isinstance(value, list) else str(value).replace("\n", "\\n")]
    result = ssm_zoo(*line)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    recipe = json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]
    assert recipe.items() >= options.items()
    untouched = {"method", "load_in_4bit", "revision", "steps", "model", "train", "heldout", "trust_remote_code"}
    untouched |= {"streaming", "examples", "report_to"}
    assert set(LanguageModelSettings.model_fields) == options.keys() | untouched
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = (f"{evaluation['loss']:.4f}" for evaluation in report["evaluations"])
    assert f"held-out loss: {before} before, {after} after\nreport: out/report.json   model: out/model" in result.stdout
    # Another command takes the run's folder for its model.
    text = CliRunner().invoke(app, ["generate", "out", "ab", "--max-new-tokens", "2"])
    assert text.exit_code == 0 and text.stdout.startswith("ab"), text.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--rank", "0"], "`rank` must be at least 1, got 0", id="rank"),
        pytest.param(
            ["--rank", "0", "--warmup", "2"],
            "`rank` must be at least 1, got 0; `warmup` must be at most 0.5, got 2",
            id="two",
        ),
        pytest.param(
            ["--method", "full", "--rank", "3"], "`rank` has no effect with method 'full', .*, got 3", id="full"
        ),
        pytest.param(["--method", "full", "--merge"], "`merge` must be False with method 'full'", id="merge-full"),
        pytest.param(["--train", "nope.txt"], "train: there is no file 'nope.txt'", id="text"),
        pytest.param(["--private"], "--private has no effect without --push-to-hub", id="private"),
        pytest.param(["--push-to-hub", "me/model", "--merge"], "there is no Hugging Face token", id="token"),
        pytest.param(["--push-to-hub", "a b", "--merge"], "Repo id must use alphanumeric", id="repository"),
        pytest.param(["--revision", "v1"], "`revision` must be left out for the folder zoo, got 'v1'", id="revision"),
        pytest.param(["--load-in-4bit"], "`load_in_4bit` needs", id="4-bit"),
    ],
)
def test_a_mistake_ends_in_one_line(
    ssm_zoo: Callable[..., Result], tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = ["--train", "text.txt", "--heldout", "text.txt", "--row-tokens", "32", "--steps", "2"]
    result = ssm_zoo("zoo", "out", *given, *arguments)
    assert result.exit_code == 2, result.stdout
    assert re.search(rf"^ssm-zoo: .*{message}[^\n]*\n\Z", result.stderr, re.MULTILINE), result.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_folder_is_not_pushed(
    ssm_zoo: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base would be found on this machine alone."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    result = ssm_zoo("zoo", "out", *BASIC, "--push-to-hub", "tester/adapter")
    assert result.exit_code == 2
    assert "--push-to-hub: the adapter's base is the folder zoo, which others do not have" in result.stderr
    assert not (tmp_path / "out").exists()


# The Hub

PUSH = """
import sys
import ssm_zoo.modeling
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from ssm_zoo.cli.main import app

AutoModelForCausalLM.from_pretrained("zoo").push_to_hub("tester/base")
AutoTokenizer.from_pretrained("zoo").push_to_hub("tester/base")
for arguments in (["--push-to-hub", "tester/adapter"], ["--push-to-hub", "tester/merged", "--merge", "--private"]):
    result = CliRunner().invoke(app, ["finetune", "lm", "tester/base", "out", *sys.argv[1:], *arguments])
    assert result.exit_code == 0, (result.stderr, result.exception)
    print(result.stdout.splitlines()[-1])
"""

# Where neither the package nor its folder can be found: what the cards tell their readers to do, and peft's Auto class.
LOAD = """
import sys
sys.modules["ssm_zoo"] = None
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
base = AutoModelForCausalLM.from_pretrained("tester/base", trust_remote_code=True)
models = {
    "adapter": PeftModel.from_pretrained(base, "tester/adapter", revision=sys.argv[1]),
    "auto": AutoPeftModelForCausalLM.from_pretrained("tester/adapter", trust_remote_code=True),
    "merged": AutoModelForCausalLM.from_pretrained("tester/merged", trust_remote_code=True, revision=sys.argv[2]),
}
assert type(base).__module__.startswith("transformers_modules")
ids = AutoTokenizer.from_pretrained("tester/merged")("the cat sat", return_tensors="pt").input_ids
with torch.no_grad():
    tensors = {name: model.eval()(input_ids=ids).logits for name, model in models.items()}
tokens = models["adapter"].generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
save_file({**tensors, "ids": ids, "tokens": tokens}, "logits.safetensors")
"""


@dataclass
class Pushed:
    folder: Path
    api: HfApi
    tensors: dict[str, torch.Tensor]


def execute(folder: Path, hub: HubStandIn, *command: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    environment |= hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base model on a Hub, finetuned; the adapter and the merged model pushed, and loaded by another process."""
    folder = tmp_path_factory.mktemp("pushed")
    write_inputs(folder)
    with HubStandIn() as hub:
        printed = execute(folder, hub, PUSH, *BASIC, "--learning-rate", "0.05")
        commits = re.findall(r"to pin it: revision=(\w+)", printed)
        execute(folder, hub, LOAD, *commits)
        api = HfApi(endpoint=hub.endpoint, token="hub-stand-in")
        yield Pushed(folder, api, load_file(folder / "logits.safetensors"))


def test_what_was_pushed_computes_the_same_without_the_package(pushed: Pushed) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(pushed.folder / "zoo").eval()
    ids = pushed.tensors["ids"]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted: Any = PeftModel.from_pretrained(base, str(pushed.folder / "out" / "adapter")).eval()
        expected = adapted(input_ids=ids).logits
    for name in ("adapter", "auto", "merged"):
        torch.testing.assert_close(pushed.tensors[name], expected, rtol=0, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
    tokens = adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(pushed.tensors["tokens"], tokens)


def test_what_was_pushed_is_complete_and_names_no_machine(pushed: Pushed) -> None:
    card = {"README.md", "plots/loss.png", "tokenizer.json", "tokenizer_config.json"}
    files = {name: set(pushed.api.list_repo_files(f"tester/{name}")) for name in ("adapter", "merged")}
    assert files["adapter"] - {".gitattributes", ".ssm-zoo.json"} == card | {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert files["merged"] >= card | {"config.json", "model.safetensors", "modeling_hybrid.py", "ssd.py", "LICENSE"}
    assert pushed.api.model_info("tester/merged").private
    for name, found in files.items():
        for file in found - {"plots/loss.png"}:
            content = Path(pushed.api.hf_hub_download(f"tester/{name}", file, cache_dir=pushed.folder / "cache"))
            assert str(pushed.folder).encode() not in content.read_bytes(), file


def test_the_adapter_is_tied_to_the_commit_of_its_base(pushed: Pushed) -> None:
    commit = pushed.api.model_info("tester/base").sha
    path = pushed.api.hf_hub_download("tester/adapter", "adapter_config.json", cache_dir=pushed.folder / "cache")
    config = json.loads(Path(path).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tester/base", commit)


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_cards_name_the_base_and_the_repository(pushed: Pushed, name: str) -> None:
    path = pushed.api.hf_hub_download(f"tester/{name}", "README.md", cache_dir=pushed.folder / "cache")
    card = ModelCard.load(path)
    data = card.data.to_dict()
    relation = "adapter" if name == "adapter" else "finetune"
    assert (data["base_model"], data["base_model_relation"]) == ("tester/base", relation)
    assert f'"tester/{name}", "main"' in card.text
    assert "[tester/base](https://huggingface.co/tester/base)" in card.text
    report = json.loads((pushed.folder / "out" / "report.json").read_text())
    assert all(f"{evaluation['loss']:,.4f}" in card.text for evaluation in report["evaluations"])
