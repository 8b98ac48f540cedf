"""A server with the part of the Hub's protocol that a scan needs, which misbehaves on demand.

`checkpoint/test_peers.py` tests real servers. This one is for faults that real servers cannot be made to have.
Requests are of five kinds, and a script has the faults for the next ones of a kind:

    api     the revision                 head    HEAD of a file
    probe   a range from byte 0          data    any other range          whole    a file without a range
"""

import json
import math
import socket
import struct
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np

from spectrum_stream.checkpoint import ranges

if TYPE_CHECKING:
    # The benchmarks use this server too, and do not need these.
    import pytest

    from spectrum_stream import ScanResult

REPO = "org/model"
COMMIT = "c0ffee" + "0" * 34
_CHUNK_NBYTES = 1 << 16


def use(url: str, monkeypatch: "pytest.MonkeyPatch", tmp_path: Path) -> None:
    """Make this process use the server as the Hub, with an empty cache and short waits."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    # huggingface_hub read this from HF_HOME when it was imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ranges, "_FIRST_WAIT_S", 0.01)


def values(result: "ScanResult") -> dict[str, tuple[object, bytes]]:
    """Return the values that must be equal, bit for bit, in two scans of the same weights."""
    return {r.module: (r.score, r.singular_values.tobytes()) for r in result.records}


class Blob(Protocol):
    """The content of a file."""

    @property
    def nbytes(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        return self.data[start:stop]


class Fabricated:
    """A shard of any size that is not stored: a real header, and weights that are a function of their position.

    The weights are a megabyte of bfloat16 noise, turned by a different amount in every megabyte of the file.
    """

    _TILE_NBYTES = 1 << 20

    def __init__(self, tensors: Mapping[str, tuple[int, ...]], seed: int = 0) -> None:
        entries, offset = {}, 0
        for name, shape in tensors.items():
            nbytes = 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._head = struct.pack("<Q", len(header)) + header
        self._seed = seed
        self.nbytes = len(self._head) + offset
        noise = np.random.default_rng(0).standard_normal(self._TILE_NBYTES // 2).astype(np.float32) * 0.02
        # The upper half of a float32 is a bfloat16.
        self._tiles = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes() * 2

    def read(self, start: int, stop: int) -> bytes:
        parts = [self._head[start:stop]]
        position, end = max(start, len(self._head)) - len(self._head), stop - len(self._head)
        while position < end:
            tile, within = divmod(position, self._TILE_NBYTES)
            turn = (tile * 7919 + self._seed * 104729) % (self._TILE_NBYTES // 2) * 2
            size = min(self._TILE_NBYTES - within, end - position)
            at = (within + turn) % self._TILE_NBYTES
            parts.append(self._tiles[at : at + size])
            position += size
        return b"".join(parts)


@dataclass(frozen=True)
class Request:
    kind: str
    method: str
    path: str
    headers: Mapping[str, str]
    range: tuple[int, int] | None


@dataclass
class Turn:
    """A request that waits for its answer; a fault answers it instead of the server."""

    handler: BaseHTTPRequestHandler
    blob: Blob
    start: int
    stop: int

    def answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        self.handler.wfile.write(body)

    def partial(self, **changed: str) -> dict[str, str]:
        """Return the headers of a correct 206, with changes: `content_range="bytes 0-1/2"`."""
        headers = {
            "Content-Range": f"bytes {self.start}-{self.stop - 1}/{self.blob.nbytes}",
            "Content-Length": str(self.stop - self.start),
            "X-Repo-Commit": COMMIT,
        }
        return headers | {name.replace("_", "-").title(): value for name, value in changed.items()}

    def body(self) -> bytes:
        return self.blob.read(self.start, self.stop)


Fault = Callable[[Turn], None]


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    def fault(turn: Turn) -> None:
        named = {name.replace("_", "-").title(): value for name, value in headers.items()}
        turn.answer(code, {"Content-Length": str(len(body))} | named, body)

    return fault


def honest(turn: Turn) -> None:
    """Answer correctly."""
    turn.answer(206, turn.partial(), turn.body())


def cut(after: int) -> Fault:
    """Send the correct headers and some bytes, and close the connection."""

    def fault(turn: Turn) -> None:
        turn.answer(206, turn.partial(), turn.body()[:after])
        turn.handler.close_connection = True

    return fault


def reset(turn: Turn) -> None:
    """End the connection with RST."""
    turn.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    turn.handler.connection.close()
    turn.handler.close_connection = True


def short_range(turn: Turn) -> None:
    """Send a shorter range than requested, with its correct headers."""
    stop = turn.stop - 10
    headers = turn.partial(
        content_range=f"bytes {turn.start}-{stop - 1}/{turn.blob.nbytes}", content_length=str(stop - turn.start)
    )
    turn.answer(206, headers, turn.body()[:-10])


def lying_range(turn: Turn) -> None:
    """Send another range than requested, with its correct Content-Range."""
    length = turn.stop - turn.start
    headers = turn.partial(content_range=f"bytes 0-{length - 1}/{turn.blob.nbytes}")
    turn.answer(206, headers, turn.blob.read(0, length))


def no_content_range(turn: Turn) -> None:
    headers = turn.partial()
    del headers["Content-Range"]
    turn.answer(206, headers, turn.body())


def resized(turn: Turn) -> None:
    """Answer as if the file had grown."""
    headers = turn.partial(content_range=f"bytes {turn.start}-{turn.stop - 1}/{turn.blob.nbytes + 2}")
    turn.answer(206, headers, turn.body())


def compressed(turn: Turn) -> None:
    turn.answer(206, turn.partial(content_encoding="gzip"), turn.body())


def other_commit(turn: Turn) -> None:
    turn.answer(206, turn.partial(x_repo_commit="d" * 40), turn.body())


def whole(turn: Turn) -> None:
    """Answer a range with 200 and the whole file."""
    turn.answer(200, {"Content-Length": str(turn.blob.nbytes), "X-Repo-Commit": COMMIT})
    try:
        for start in range(0, turn.blob.nbytes, _CHUNK_NBYTES):
            turn.handler.wfile.write(turn.blob.read(start, min(start + _CHUNK_NBYTES, turn.blob.nbytes)))
    except OSError:
        # The client closed the connection at once, as it should.
        turn.handler.close_connection = True


def endless(sent: list[int]) -> Fault:
    """Answer a range with 200 and an endless file; `sent` counts the bytes."""

    def fault(turn: Turn) -> None:
        turn.answer(200, {"X-Repo-Commit": COMMIT, "Connection": "close"})
        turn.handler.close_connection = True
        sent.append(0)
        mine = len(sent) - 1
        try:
            while sent[mine] < 1_000_000_000:
                turn.handler.wfile.write(bytes(_CHUNK_NBYTES))
                sent[mine] += _CHUNK_NBYTES
        except OSError:
            pass

    return fault


def page(turn: Turn) -> None:
    """Answer with the page of a network that needs a login."""
    turn.answer(200, {"Content-Type": "text/html", "Content-Length": "36"}, b"<!DOCTYPE html><html>log in!</html>\n")


def redirect(to: str) -> Fault:
    return status(302, location=to)


class HubServer:
    """Serves repos on loopback while its context lasts.

    Args:
        repos: files by name, by repo id; a folder stands for its files.
        ranges: whether the server supports ranges.
        rate_nbytes_s: the rate of all connections together.
        elsewhere: a function from the name of a shard to its address on another server, for a redirect.
    """

    def __init__(
        self,
        repos: Mapping[str, Mapping[str, Blob] | Path],
        *,
        ranges: bool = True,
        rate_nbytes_s: float | None = None,
        elsewhere: Callable[[str], str] | None = None,
        names_commit: bool = True,
    ) -> None:
        self.repos = {id: _files(content) if isinstance(content, Path) else content for id, content in repos.items()}
        self.ranges = ranges
        self.elsewhere = elsewhere
        # Some mirrors do not name the commit of a file.
        self.names_commit = names_commit
        # The commits by revision; a test may move a branch.
        self.commits = {"main": COMMIT, COMMIT: COMMIT}
        self.requests: list[Request] = []
        self.sent_nbytes = 0
        self._rate = rate_nbytes_s
        self._free_at = 0.0
        self._script: dict[str, deque[Fault]] = defaultdict(deque)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def script(self, kind: str, *faults: Fault) -> None:
        """Set the faults for the next requests of a kind, one each."""
        self._script[kind].extend(faults)

    def recover(self) -> None:
        """Remove all faults."""
        self._script.clear()

    def of_kind(self, kind: str) -> list[Request]:
        return [request for request in self.requests if request.kind == kind]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            faults = self._script[request.kind]
            return faults.popleft() if faults else None

    def pace(self, nbytes: int) -> None:
        with self._lock:
            self.sent_nbytes += nbytes
            if self._rate is None:
                return
            self._free_at = max(self._free_at, time.monotonic()) + nbytes / self._rate
            wait = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait))


def _files(folder: Path) -> dict[str, Blob]:
    return {p.relative_to(folder).as_posix(): Bytes(p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            wanted = self._range()
            kind = (
                "api"
                if path.startswith("/api/")
                else "head"
                if self.command == "HEAD"
                else "whole"
                if wanted is None
                else "probe"
                if wanted[0] == 0
                else "data"
            )
            fault = server.next_fault(Request(kind, self.command, path, dict(self.headers), wanted))
            if kind == "api":
                self._answer_api(path, fault)
            else:
                self._answer_file(path, wanted, fault)

        def _range(self) -> tuple[int, int] | None:
            value = self.headers.get("Range")
            if value is None:
                return None
            first, _, last = value.removeprefix("bytes=").partition("-")
            return int(first), int(last) + 1

        def _answer_api(self, path: str, fault: Fault | None) -> None:
            if fault is not None:
                return fault(Turn(self, Bytes(b""), 0, 0))
            id, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            files = server.repos.get(id)
            if files is None:
                return self._refuse(404, "RepoNotFound")
            if revision not in server.commits:
                return self._refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": id, "sha": server.commits[revision], "siblings": siblings}).encode()
            self._send(200, {"Content-Type": "application/json"}, [body], len(body))

        def _answer_file(self, path: str, wanted: tuple[int, int] | None, fault: Fault | None) -> None:
            id, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            commit = server.commits.get(revision, revision)
            blob = server.repos.get(id, {}).get(name)
            if blob is None:
                return self._refuse(404, "EntryNotFound")
            if fault is not None:
                start, stop = wanted or (0, blob.nbytes)
                return fault(Turn(self, blob, start, min(stop, blob.nbytes)))
            headers = {
                "ETag": f'"{zlib.crc32(f"{id}/{name}".encode()):08x}"',
                "Accept-Ranges": "bytes",
            } | ({"X-Repo-Commit": commit} if server.names_commit else {})
            if server.elsewhere is not None and name.endswith(".safetensors"):
                # The Hub does this for large files.
                headers |= {"X-Linked-Size": str(blob.nbytes), "X-Linked-Etag": headers.pop("ETag")}
                return self._send(302, headers | {"Location": server.elsewhere(name)}, [], 0)
            start, stop, code = 0, blob.nbytes, 200
            if wanted is not None and server.ranges:
                start, stop, code = wanted[0], min(wanted[1], blob.nbytes), 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.nbytes}"
            chunks = (blob.read(at, min(at + _CHUNK_NBYTES, stop)) for at in range(start, stop, _CHUNK_NBYTES))
            self._send(code, headers, chunks, stop - start)

        def _refuse(self, code: int, error: str) -> None:
            self._send(code, {"X-Error-Code": error}, [], 0)

        def _send(self, code: int, headers: Mapping[str, str], body: Iterable[bytes], nbytes: int) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(nbytes))
            self.end_headers()
            if self.command == "HEAD":
                return
            try:
                for chunk in body:
                    server.pace(len(chunk))
                    self.wfile.write(chunk)
            except OSError:
                # The client closed the connection.
                self.close_connection = True

    return Handler


def llama3_70b() -> dict[str, Blob]:
    """Make Llama-3-70B by its published shapes and names, in 30 shards, with its index."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 8192)}
    for i in range(80):
        layer = f"model.layers.{i}."
        tensors |= {
            f"{layer}input_layernorm.weight": (8192,),
            f"{layer}mlp.down_proj.weight": (8192, 28672),
            f"{layer}mlp.gate_proj.weight": (28672, 8192),
            f"{layer}mlp.up_proj.weight": (28672, 8192),
            f"{layer}post_attention_layernorm.weight": (8192,),
            f"{layer}self_attn.k_proj.weight": (1024, 8192),
            f"{layer}self_attn.o_proj.weight": (8192, 8192),
            f"{layer}self_attn.q_proj.weight": (8192, 8192),
            f"{layer}self_attn.v_proj.weight": (1024, 8192),
        }
    tensors |= {"model.norm.weight": (8192,), "lm_head.weight": (128256, 8192)}
    return sharded(tensors, 30)


def deepseek_671b() -> dict[str, Blob]:
    """Make a 671B mixture of experts by DeepSeek-V3's shapes, in 163 shards: 58 layers of 256 experts.

    The weights are bfloat16, without the scales of the published float8 weights.
    """
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (129280, 7168)}
    for i in range(61):
        layer = f"model.layers.{i}."
        tensors |= {
            f"{layer}self_attn.q_a_proj.weight": (1536, 7168),
            f"{layer}self_attn.q_b_proj.weight": (24576, 1536),
            f"{layer}self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
            f"{layer}self_attn.kv_b_proj.weight": (32768, 512),
            f"{layer}self_attn.o_proj.weight": (7168, 16384),
        }
        experts = [f"experts.{e}." for e in range(256)] + ["shared_experts."] if i >= 3 else [""]
        width = 2048 if i >= 3 else 18432
        for expert in experts:
            tensors |= {
                f"{layer}mlp.{expert}gate_proj.weight": (width, 7168),
                f"{layer}mlp.{expert}up_proj.weight": (width, 7168),
                f"{layer}mlp.{expert}down_proj.weight": (7168, width),
            }
    tensors["lm_head.weight"] = (129280, 7168)
    return sharded(tensors, 163)


def sharded(tensors: Mapping[str, tuple[int, ...]], count: int) -> dict[str, Blob]:
    """Make shards of about equal size, filled in order, and their index."""
    total = sum(math.prod(shape) for shape in tensors.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    before = 0
    for name, shape in tensors.items():
        shards[min(before * count // total, count - 1)][name] = shape
        before += math.prod(shape)
    files: dict[str, Blob] = {}
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        files[file] = Fabricated(shard, seed=i)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    return files | {"model.safetensors.index.json": Bytes(json.dumps(index).encode())}
