"""`ssm-zoo train`: every option arrives, a mistake is one line, and what it pushes loads without the package."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
import typer
from families import make_model
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from tiny_checkpoints import save_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from hub_stand_in import HubStandIn
from ssm_zoo.cli.main import app
from ssm_zoo.training.from_scratch_settings import RECIPES, FromScratchSettings

TEXT = "\n\n".join(" ".join("abcdefghij"[i : i + 4] for i in range(k, k + 5)) for k in range(5)) + "\n"
CONFIG = "model_type: zoo_mamba2\nhidden_size: 16\nnum_hidden_layers: 1\nhead_dim: 8\nstate_size: 8\n"
BASIC = ["--train", "text.txt", "--heldout", "text.txt", "--row-tokens", "32", "--steps", "2"]


@pytest.fixture
def ssm_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process, in a folder with a configuration and a text, without a token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["train", *map(str, arguments)])


def write_inputs(folder: Path) -> None:
    (folder / "model.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text(TEXT)


def test_help_explains_every_option() -> None:
    group: Any = typer.main.get_command(app)
    text = " ".join(CliRunner().invoke(app, ["train", "--help"]).stdout.split())
    for parameter in group.commands["train"].params:
        assert parameter.help, parameter.name
        assert " ".join(parameter.help.split()) in text
    names = {parameter.name for parameter in group.commands["train"].params}
    assert names >= FromScratchSettings.model_fields.keys()
    assert set(get_args(FromScratchSettings.model_fields["recipe"].annotation)) == RECIPES.keys()


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from ssm_zoo.cli.main import app;"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0;"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_option_arrives(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "train_tokenizer": 270,
        "recipe": "taipan",
        "learning_rate": 0.002,
        "final_learning_rate": 0.001,
        "warmup": 1,
        "betas": [0.8, 0.99],
        "weight_decay": 0.02,
        "max_grad_norm": 0.5,
        "separator": "\n\n",
        "text_field": "body",
        "packing": False,
        "row_tokens": 24,
        "batch_size": 1,
        "gradient_accumulation": 2,
        "epochs": 1.5,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "seed": 7,
        "evaluate_every": 2,
        "checkpoint_every": 11,
    }
    line = ["model.yaml", "out", "--train", "text.txt", "--heldout", "text.txt"]
    line += ["--set", "hidden_size=32", "--set", "time_step_limit=[0.01, 1.0]"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            line.append(option if value else f"--no-{name}")
        else:
            given = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            line += [option, given.replace("\n", "\\n")]
    result = ssm_zoo(*line)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    recipe = json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]
    assert recipe.items() >= options.items()
    assert recipe["config"].items() >= {"hidden_size": 32, "state_size": 8, "time_step_limit": [0.01, 1.0]}.items()
    untouched = {"steps", "train", "heldout", "tokenizer", "config", "revision", "overrides", "trust_remote_code"}
    untouched |= {"streaming", "report_to", "objectives"}  # objectives need rows that are packed
    assert set(FromScratchSettings.model_fields) == options.keys() | untouched
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = (f"{report['evaluations'][index]['loss']:.4f}" for index in (0, -1))
    assert f"held-out loss: {before} before, {after} after\nreport: out/report.json   model: out/model" in result.stdout
    # Other commands take the run's folder for its model, and so does this one.
    text = CliRunner().invoke(app, ["generate", "out", "ab", "--max-new-tokens", "2"])
    assert text.exit_code == 0 and text.stdout.startswith("ab"), text.stderr
    again = ssm_zoo("out", "again", *BASIC, "--tokenizer", "out")
    assert again.exit_code == 0, f"{again.stderr}\n{again.exception!r}"
    configs = [json.loads((tmp_path / run / "run.json").read_text())["recipe"]["config"] for run in ("out", "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("warmup", ["0.25", "1"])
def test_a_warmup_is_steps_or_a_share(ssm_zoo: Callable[..., Result], tmp_path: Path, warmup: str) -> None:
    result = ssm_zoo("model.yaml", "out", *BASIC, "--tokenizer", "bytes", "--warmup", warmup)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]["warmup"] == float(warmup)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--warmup", "long"], "`warmup` must be a whole number of steps, .*, got 'long'", id="warmup"),
        pytest.param(["--warmup", "5"], "`warmup` must be shorter than the run, got 5 steps in a run of 2", id="long"),
        pytest.param(["--betas", "0.9"], "`betas` must be a list of at least 2 items, got \\[0.9\\]", id="betas"),
        pytest.param(["--betas", "0.9,x"], "`betas.1` must be a number, got 'x'", id="beta"),
        pytest.param(
            ["--seed", "-1", "--batch-size", "0"],
            "`batch_size` must be at least 1, got 0; `seed` must be at least 0, got -1",
            id="two",
        ),
        pytest.param(
            ["--set", "states=3"], "config: zoo_mamba2 has no key 'states'. Did you mean .*state_size", id="key"
        ),
        pytest.param(
            ["--set", "vocab_size=8"], "config: `vocab_size` must be at least 256, .*, got 8", id="vocabulary"
        ),
        pytest.param(
            ["--train-tokenizer", "300"], "`tokenizer` or .* and not both, got 'bytes' and 300", id="tokenizers"
        ),
        pytest.param(["--tokenizer", "no/such/place"], "there is no folder 'no/such/place'", id="tokenizer"),
        pytest.param(["--train", "nope.txt"], "train: there is no file 'nope.txt'", id="text"),
        pytest.param(["--private"], "--private has no effect without --push-to-hub", id="private"),
        pytest.param(["--push-to-hub", "me/model"], "there is no Hugging Face token", id="token"),
        pytest.param(["--push-to-hub", "a b"], "Repo id must use alphanumeric", id="repository"),
    ],
)
def test_a_mistake_ends_in_one_line(
    ssm_zoo: Callable[..., Result], tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = ssm_zoo("model.yaml", "out", *BASIC, "--tokenizer", "bytes", *arguments)
    assert result.exit_code == 2, result.stdout
    assert re.search(rf"^ssm-zoo: .*{message}[^\n]*\n\Z", result.stderr, re.MULTILINE), result.stderr
    assert not (tmp_path / "out").exists()


def test_processes_that_know_nothing_of_each_other_are_refused(
    ssm_zoo: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssm_zoo.training import trainer as training

    class Alone:
        num_processes = 1

    monkeypatch.setattr(training, "PartialState", lambda cpu: Alone())
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = ssm_zoo("model.yaml", "out", *BASIC, "--tokenizer", "bytes")
    assert result.exit_code == 2
    assert "accelerate: 2 processes were started, but it sees 1" in result.stderr
    assert not (tmp_path / "out").exists()


# The Hub

PUSH = """
import sys
import ssm_zoo.modeling
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from ssm_zoo.cli.main import app

AutoModelForCausalLM.from_pretrained("zoo").push_to_hub("tester/sizes")
AutoTokenizer.from_pretrained("zoo").push_to_hub("tester/sizes")
arguments = ["--tokenizer", "tester/sizes", "--push-to-hub", "tester/new", "--private"]
result = CliRunner().invoke(app, ["train", "tester/sizes", "out", *sys.argv[1:], *arguments])
assert result.exit_code == 0, (result.stderr, result.exception)
print(result.stdout.splitlines()[-1])
"""

# Where neither the package nor its folder can be found.
LOAD = """
import sys
sys.modules["ssm_zoo"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
options = {"trust_remote_code": True, "revision": sys.argv[1]}
model = AutoModelForCausalLM.from_pretrained("tester/new", **options).eval()
assert type(model).__module__.startswith("transformers_modules")
ids = AutoTokenizer.from_pretrained("tester/new", revision=sys.argv[1])("the cat sat", return_tensors="pt").input_ids
with torch.no_grad():
    save_file({"logits": model(input_ids=ids).logits, "ids": ids}, "logits.safetensors")
"""


def execute(folder: Path, hub: HubStandIn, *command: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    environment |= hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_what_was_pushed_loads_without_the_package(tmp_path: Path) -> None:
    """Sizes and tokenizer of a model on the Hub, and the new model beside it."""
    write_inputs(tmp_path)
    make_model("mamba2").save_pretrained(tmp_path / "zoo")
    save_tokenizer(tmp_path / "zoo")
    with HubStandIn() as hub:
        commit = re.findall(r"to pin it: revision=(\w+)", execute(tmp_path, hub, PUSH, *BASIC))[-1]
        execute(tmp_path, hub, LOAD, commit)
        api = HfApi(endpoint=hub.endpoint, token="hub-stand-in")
        files = set(api.list_repo_files("tester/new"))
        assert api.model_info("tester/new").private
        card = ModelCard.load(api.hf_hub_download("tester/new", "README.md", cache_dir=tmp_path / "cache"))
    assert files >= {"README.md", "plots/loss.png", "tokenizer.json", "config.json", "model.safetensors", "ssd.py"}
    assert '"tester/new", "main"' in card.text
    assert "`tester/sizes`" in card.text and str(tmp_path) not in card.content
    tensors = load_file(tmp_path / "logits.safetensors")
    ours: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=tensors["ids"]).logits, tensors["logits"], rtol=0, atol=1e-5)
        sizes: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "zoo").eval()
        assert (sizes(input_ids=tensors["ids"]).logits - tensors["logits"]).abs().max() > 0.1
