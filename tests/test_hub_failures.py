"""A Hub that refuses, breaks off or never answers: one line, status 2, soon, and no token in it."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from tiny_checkpoints import save_zoo_checkpoint
from typer.testing import CliRunner

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
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone, or a connection that was cut on purpose."""


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
    constants, endpoint = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SSM_ZOO_HUB_TIMEOUT", "0.5")
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
