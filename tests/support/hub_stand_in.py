"""A stand-in for the Hugging Face Hub: its HTTP API on 127.0.0.1, for the real `huggingface_hub` client.

Covers models, datasets and spaces: whoami; creating, listing and deleting repositories; commits of regular and LFS
files, with deletions and pull-request branches; branches, tags, and every revision by name or hash; repository
information with the card's metadata, trees and histories; downloads with ranges; the Hub's error codes. Any bearer
token that is not empty may write, and may read private repositories.

Does not cover: xet (never offered, and regular uploads keep clients from asking for it), organisations and rights,
gating, discussions, `.gitignore` filters, `expand`ed listings, moving or re-configuring a repository, git itself,
and what the Hub demands of a card beyond being YAML.

In a test:     with HubStandIn() as hub: HfApi(endpoint=hub.endpoint, token="any")
As a process:  python tests/support/hub_stand_in.py --port 0 --ready-file endpoint.txt --storage hub/
"""

import argparse
import contextlib
import json
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repositories import CHUNK, RefusedError, Repositories, write_atomically
from hub_routes import ROUTES, Call, Reply, Settings, put_lfs


@dataclass(frozen=True)
class Request:
    """What a client asked and with which status it was answered."""

    method: str
    path: str
    range: str
    status: int


class HubStandIn:
    """The server: `with HubStandIn() as hub:` serves at `hub.endpoint` until the block ends.

    Args:
        storage: folder that keeps everything between runs; None keeps it in memory.
        port: TCP port on 127.0.0.1; 0 takes a free one.
        lfs: ask for LFS uploads where the Hub would, by suffix and size; clients then need HF_HUB_DISABLE_XET=1.
            If False, all files are uploaded as regular ones, which works for every client, but not for
            `datasets.Dataset.push_to_hub`: that relies on Parquet going to LFS.
        page_size: most entries on one page of a listing.
        user: whose token every token is.

    Attributes:
        endpoint: address of the server, for `HfApi(endpoint=...)` and HF_ENDPOINT.
        requests: every request so far, oldest first, for tests that count traffic.
        cut_next_download: if set, the next download breaks off after that many bytes, as on a bad line.

    Raises:
        ValueError: if `port` or `page_size` is out of range, or `storage` is not a folder.
    """

    def __init__(
        self,
        storage: str | Path | None = None,
        *,
        port: int = 0,
        lfs: bool = False,
        page_size: int = 1000,
        user: str = "tester",
    ) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be in 0..65535, got {port}")
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        if storage is not None and Path(storage).exists() and not Path(storage).is_dir():
            raise ValueError(f"storage must be a folder, got the file {str(storage)!r}")
        self.requests: list[Request] = []
        self.cut_next_download: int | None = None
        self.lock = threading.Lock()
        self.repositories = Repositories(None if storage is None else Path(storage))
        self._server = _Server(self, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.settings = Settings(self.endpoint, user, lfs, page_size, secrets.token_bytes(32))

    def __enter__(self) -> "HubStandIn":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Variables that point a Python process at this server, to be set before it imports huggingface_hub.

        Args:
            home: HF_HOME of the process, for its cache.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": "hub-stand-in",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a snapshot download opens many connections at once

    def __init__(self, hub: HubStandIn, port: int) -> None:
        self.hub = hub
        self._connections: set[Any] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may drop the connections they kept
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Close the port, and the connections that clients keep open for later."""
        self.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # its client may have closed it just now
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, has the first route that matches answer it, sends the reply."""

    server: _Server
    protocol_version = "HTTP/1.1"
    # Head and body are sent one after the other; the body must not wait until the head is acknowledged.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = self._read_body()
        try:
            reply = self._answer(body)
            for _ in body:  # what a refusal left unread would be taken for the next request
                pass
            sent = Request(self.command, urlsplit(self.path).path, self.headers.get("Range", ""), reply.status)
            self.server.hub.requests.append(sent)
            self._send(reply)
        except ConnectionError:  # the client left; there is nobody to tell
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the names that http.server looks for

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: `HubStandIn.requests` is the log."""

    def _answer(self, body: Iterator[bytes]) -> Reply:
        hub, url = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(hub.repositories, hub.settings, url.path, parse_qs(url.query), headers, body)
        try:
            for methods, pattern, needs_token, route in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match is None or self.command not in methods:
                    continue
                if needs_token and not call.has_token:
                    raise RefusedError(401, "Invalid username or password.")
                arguments = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if route is put_lfs:  # of any size and of no repository: neither gathered nor locked
                    return route(call, **arguments)
                call.content = b"".join(body)
                with hub.lock:
                    return route(call, **arguments)
            raise RefusedError(404, f"the stand-in has no route {self.command} {url.path}")
        except RefusedError as refused:
            return Reply({"error": str(refused)}, refused.status, refused.headers)

    def _read_body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            chunk = self.rfile.read(min(left, CHUNK))
            if not chunk:
                raise ConnectionError("the client left in the middle of its request")
            left -= len(chunk)
            yield chunk

    def _send(self, reply: Reply) -> None:
        # Dates in the metadata of cards are the only values that JSON does not know.
        content = b"" if reply.payload is None else json.dumps(reply.payload, default=str).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **reply.headers}
        self.send_response(reply.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            if reply.digest:
                self._send_file(reply)

    def _send_file(self, reply: Reply) -> None:
        hub, left = self.server.hub, reply.length
        if hub.cut_next_download is not None:
            left, hub.cut_next_download = min(left, hub.cut_next_download), None
            self.close_connection = True
        with hub.repositories.blobs.open(reply.digest) as stream:
            stream.seek(reply.start)
            while left:
                chunk = stream.read(min(left, CHUNK))
                self.wfile.write(chunk)
                left -= len(chunk)


def main() -> None:
    """Serve as a process until it is interrupted or terminated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="TCP port; 0 takes a free one")
    parser.add_argument("--ready-file", type=Path, required=True, help="file to write the endpoint to once it serves")
    parser.add_argument("--storage", type=Path, help="folder to keep everything in; without, memory")
    parser.add_argument("--lfs", action="store_true", help="ask for LFS uploads where the Hub would")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if not options.ready_file.parent.is_dir():
        parser.error(f"--ready-file must lie in an existing folder, got {str(options.ready_file)!r}")
    try:
        hub = HubStandIn(options.storage, port=options.port, lfs=options.lfs)
    except ValueError as error:
        parser.error(str(error))
    with hub:
        write_atomically(options.ready_file, [hub.endpoint.encode()])
        stop.wait()


if __name__ == "__main__":
    main()
