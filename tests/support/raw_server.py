"""A server of the Hub's protocol that can write any bytes, with no HTTP library.

A handler gets the kind of a request (as in `hub_server`), its path, its headers and the socket. It writes an answer,
or returns `HONEST` for the correct one.
"""

import functools
import json
import socket
import socketserver
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import unquote

from .hub_server import COMMIT, REPO

HONEST = object()
Answer = Callable[[str, socket.socket], object]


@dataclass(frozen=True)
class Asked:
    kind: str
    path: str
    headers: Mapping[str, str]


@dataclass
class RawServer:
    """Serves files as `org/model`.

    Attributes:
        answers: the handlers by kind.
        headers: more headers for correct answers about files.
        siblings: the files that the API lists; those that are served by default.
    """

    files: Mapping[str, bytes]
    answers: dict[str, Answer] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    siblings: list[str] | None = None
    requests: list[Asked] = field(default_factory=list)
    url: str = ""

    def of_kind(self, kind: str) -> list[Asked]:
        return [request for request in self.requests if request.kind == kind]

    def answer(self, method: str, path: str, headers: Mapping[str, str], sock: socket.socket) -> None:
        wanted = headers.get("range")
        kind = (
            "api"
            if path.startswith("/api/")
            else "head"
            if method == "HEAD"
            else "whole"
            if wanted is None
            else "probe"
            if wanted.startswith("bytes=0-")
            else "data"
        )
        self.requests.append(Asked(kind, path, headers))
        if kind in self.answers and self.answers[kind](path, sock) is not HONEST:
            return
        if kind == "api":
            names = [{"rfilename": name} for name in (self.siblings or self.files)]
            return send(sock, 200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": names}).encode())
        name = unquote(path.split("?")[0].partition("/resolve/")[2].partition("/")[2])
        if name not in self.files:
            return send(sock, 404, headers={"X-Error-Code": "EntryNotFound"})
        data = self.files[name]
        known = {"X-Repo-Commit": COMMIT, "ETag": f'"{zlib.crc32(name.encode()):08x}"'} | self.headers
        if kind == "head":
            return send(sock, 200, headers={**known, "Content-Length": str(len(data))})
        if wanted is None:
            return send(sock, 200, data, known)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(data))
        return send(sock, 206, data[start:stop], {**known, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def send(sock: socket.socket, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
    """Write an answer, with its length unless that or a transfer encoding is given."""
    known = dict(headers or {})
    if not {"content-length", "transfer-encoding"} & {name.lower() for name in known}:
        known["Content-Length"] = str(len(body))
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in known.items()), "", ""]
    sock.sendall("\r\n".join(lines).encode("latin-1") + body)


def redirect(to: str) -> Answer:
    """Redirect, with the headers that the Hub sends about a file."""
    headers = {"Location": to, "X-Repo-Commit": COMMIT, "ETag": '"ab"', "X-Linked-Etag": '"ab"'}
    return lambda _, sock: send(sock, 302, headers=headers)


@functools.cache
def bomb(nbytes: int) -> bytes:
    """Compress spaces, which takes a second for 256 MB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    chunk = b" " * (1 << 20)
    return b"".join([*(packer.compress(chunk) for _ in range(nbytes >> 20)), packer.flush()])


@contextmanager
def serving(server: RawServer) -> Iterator[RawServer]:
    """Run a server on loopback."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            received = b""
            with suppress(OSError, ValueError):
                while True:
                    while b"\r\n\r\n" not in received:
                        if not (more := self.request.recv(65536)):
                            return
                        received += more
                    head, received = received.split(b"\r\n\r\n", 1)
                    first, *lines = head.decode("latin-1").split("\r\n")
                    method, path, _ = first.split(" ", 2)
                    pairs = (line.partition(":") for line in lines)
                    server.answer(method, path, {k.lower(): v.strip() for k, _, v in pairs}, self.request)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
