"""A Hub that refuses, breaks off or never answers: one line, status 2, soon, and no token in it."""

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from embedding_pairs import write_pairs
from tiny_checkpoints import save_zoo_checkpoint
from typer.testing import CliRunner, Result

from hub_stand_in import HubStandIn
from ssm_zoo.cli.demo import app as demo
from ssm_zoo.cli.errors import reported
from ssm_zoo.cli.main import app

TOKEN = "hf_" + "y" * 20


class _Handler(BaseHTTPRequestHandler):
    answer: int | str = 500

    def respond(self) -> None:
        if self.answer == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            return
        if self.answer == "silence":
            time.sleep(5)
            return
        # A server that sends back what it was given.
        body = f"no: {self.headers.get('Authorization')}".encode()
        self.send_response(int(self.answer))
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-HF-Warning", f"token; you sent {self.headers.get('Authorization')}")  # logged by the client
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone, or a connection that was cut on purpose."""


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of this process talk to a server, with a token."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SSM_ZOO_HUB_TIMEOUT", "0.5")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "zoo"
    save_zoo_checkpoint(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    methods = {f"do_{method}": _Handler.respond for method in ("GET", "HEAD", "POST", "PUT")}
    handler = type("Handler", (_Handler,), {"answer": request.param, **methods})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("hub", [401, 403, 404, 409, 418, "reset", "silence"], indirect=True)
@pytest.mark.usefixtures("hub")
def test_a_push_that_fails_ends_soon_in_one_line_without_the_token(zoo: Path) -> None:
    started = time.monotonic()
    result = CliRunner().invoke(app, ["push", str(zoo), "tester/model"])
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert re.fullmatch(r"ssm-zoo: [^\n]+\n", result.stderr), result.stderr
    assert TOKEN not in result.stderr
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("hub", [401, 500, "reset"], indirect=True)
@pytest.mark.usefixtures("hub")
def test_a_download_that_fails_ends_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", "tester/nothing", "out"])
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert re.search(r"^ssm-zoo: [^\n]+\n\Z", result.stderr, re.MULTILINE), result.stderr
    assert TOKEN not in result.stderr and list(tmp_path.iterdir()) == []


def say(how: str, text: str) -> None:
    if how == "log":
        logging.getLogger("some.library").warning("sent %s", text)
    elif how == "log-of-an-error":
        try:
            raise RuntimeError(f"sent {text}")
        except RuntimeError:
            logging.getLogger("some.library").exception("it failed")
    else:
        warnings.warn(f"sent {text}", UserWarning, stacklevel=1)


@pytest.mark.parametrize("how", ["log", "log-of-an-error", "warning"])
def test_what_other_libraries_say_holds_no_token(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a process, where nobody but the command listens to logs and warnings."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    stream = logging.StreamHandler(sys.stderr)
    logging.getLogger("some.library").addHandler(stream)
    factory = logging.getLogRecordFactory()
    with warnings.catch_warnings(record=True) as shown:
        usual = warnings.showwarning
        try:
            with reported(lambda: "push", lambda: False):
                say(how, TOKEN)
        finally:
            logging.getLogger("some.library").removeHandler(stream)
        assert warnings.showwarning is usual and logging.getLogRecordFactory() is factory
    told = capsys.readouterr().err + "".join(str(warning.message) for warning in shown)
    assert "sent ***" in told and TOKEN not in told


@pytest.mark.parametrize("hub", [404], indirect=True)
@pytest.mark.usefixtures("hub")
def test_a_server_that_echoes_the_token_in_a_header_has_it_blotted_out(zoo: Path, tmp_path: Path) -> None:
    """In a process of its own: its client logs the header."""
    environment = {**os.environ, "HF_ENDPOINT": huggingface_hub.constants.ENDPOINT, "HF_HOME": str(tmp_path)}
    line = [sys.executable, "-P", "-m", "ssm_zoo.cli.main", "push", str(zoo), "tester/model"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "you sent Bearer ***" in done.stderr and TOKEN not in done.stdout + done.stderr


# What a training asks before it begins


TEXTS = ["--train", "text.txt", "--heldout", "text.txt", "--row-tokens", "32", "--steps", "1"]
PAIRS = ["--train", "pairs.jsonl", "--heldout", "pairs.jsonl", "--batch-size", "3", "--steps", "1"]
TRAININGS = {
    "train": ["train", "zoo", "out", *TEXTS, "--tokenizer", "zoo"],
    "lm": ["finetune", "lm", "zoo", "out", *TEXTS, "--rank", "2", "--merge"],
    "embed": ["finetune", "embed", "zoo", "out", *PAIRS, "--rank", "2"],
}


def whoami(**changes: Any) -> dict[str, Any]:
    return {"name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}, **changes}


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "read-only": (
        whoami(auth={"accessToken": {"role": "read"}}),
        ["tester/new"],
        "--push-to-hub: the token of tester may only read",
    ),
    "a-stranger": (whoami(), ["somebody/new"], "--push-to-hub: tester may not write to repositories of somebody"),
    "a-reader-of-an-organisation": (
        whoami(orgs=[{"name": "lab", "roleInOrg": "read"}]),
        ["lab/new"],
        "--push-to-hub: tester may not write to repositories of lab",
    ),
    "public": (whoami(), ["tester/public", "--private"], "--private: tester/public is public"),
}


@pytest.fixture
def work(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(zoo, "zoo")
    Path("text.txt").write_text("abc def ghi " * 20)
    write_pairs(Path("pairs.jsonl"), 9)
    return tmp_path


def begun(arguments: list[str], program: Any = app) -> Result:
    """The result of a command that must not have begun anything."""
    result = CliRunner().invoke(program, arguments)
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert not Path("out").exists() and TOKEN not in result.stderr
    return result


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.usefixtures("work")
def test_a_training_that_could_not_push_does_not_begin(
    training: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, target, message = REFUSED[why]
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda *_arguments, **_options: user)
    with HubStandIn() as hub:
        point_to(hub.endpoint, monkeypatch)
        huggingface_hub.HfApi(endpoint=hub.endpoint, token=TOKEN).create_repo("tester/public")
        assert message in begun([*TRAININGS[training], "--push-to-hub", *target]).stderr


@pytest.mark.parametrize("hub", [401, 500, "reset"], indirect=True)
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.usefixtures("hub", "work")
def test_a_training_does_not_begin_where_the_hub_refuses(training: str, hub: object) -> None:
    result = begun([*TRAININGS[training], "--push-to-hub", "tester/model"])
    assert re.fullmatch(r"ssm-zoo: [^\n]+\n", result.stderr), result.stderr


@pytest.mark.parametrize("command", [*TRAININGS, "push"])
@pytest.mark.usefixtures("work")
def test_nothing_begins_in_offline_mode_that_would_end_in_a_push(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubStandIn() as hub:
        point_to(hub.endpoint, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        pushes = command == "push"
        result = begun(["push", "zoo", "a/b"] if pushes else [*TRAININGS[command], "--push-to-hub", "tester/model"])
        field = "REPO" if pushes else "--push-to-hub"
        message = f"ssm-zoo: {field}: nothing can be pushed in offline mode; unset HF_HUB_OFFLINE"
        assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr
        assert not hub.requests


def test_the_demo_does_not_begin_in_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "ssm-zoo: --repo: nothing can be pushed in offline mode" in begun([], demo).stderr
    assert not list(tmp_path.iterdir())


def test_the_variable_of_the_environment_is_offline_mode(zoo: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-P", "-m", "ssm_zoo.cli.main", "push", str(zoo), "tester/model"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("ssm-zoo: REPO: nothing can be pushed in offline mode")


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.usefixtures("work")
def test_what_is_not_finite_is_not_pushed(training: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the last step has spoiled: nothing is on the Hub, not even a repository."""
    inner = torch.optim.AdamW.step

    def overflowing(self: Any, *arguments: Any, **options: Any) -> Any:
        result = inner(self, *arguments, **options)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with HubStandIn() as hub:
        point_to(hub.endpoint, monkeypatch)
        result = CliRunner().invoke(app, [*TRAININGS[training], "--push-to-hub", "tester/model"])
        assert result.exit_code == 2, (result.stderr, result.exception)
        assert "not finite" in result.stderr
        assert {request.method for request in hub.requests} == {"GET"}
    assert not Path("out", "report.json").exists() and not Path("out", "model").exists()
