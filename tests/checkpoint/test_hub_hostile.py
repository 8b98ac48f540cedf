"""Servers that try to take memory, time, files or secrets only cause one error."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils._http as hub_http
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectrum_stream import plan, scan
from spectrum_stream.checkpoint import client, hub, open_source, ranges
from spectrum_stream.checkpoint.redact import redact, remember_secret
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.files import FileKind

from ..support import hub_server
from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli
from ..support.hub_server import COMMIT, REPO, HubServer, use, values
from ..support.raw_server import HONEST, Answer, RawServer, bomb, redirect, send, serving

TOKEN = "hf_" + "Secret7" * 5
PASSWORD = "pa55word-of-mine"
SIGNATURE = "5ignature0fAnAddress"
MODEL_FILE = "model.safetensors"
# The window for the speed of an answer is 12 s by default.
WINDOW_S = 0.4


@pytest.fixture
def files(save: Save) -> dict[str, bytes]:
    folder = save(llama_tensors(1), config={"architectures": ["LlamaForCausalLM"]})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def raw(
    files: dict[str, bytes], working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[RawServer]:
    with serving(RawServer(files)) as server:
        use(server.url, monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(client, "_window_s", lambda: WINDOW_S)
        yield server


def refused(act: Callable[[], object] = lambda: plan(REPO), *, within_s: float = 8.0) -> SpectrumStreamError:
    started = time.monotonic()
    with pytest.raises(SpectrumStreamError) as error:
        act()
    assert time.monotonic() - started < within_s
    assert "\n" not in str(error.value)
    printed = "".join(traceback.format_exception(error.value)) + str(error.value.hint)
    assert not [secret for secret in (TOKEN, PASSWORD, SIGNATURE) if secret in printed]
    return error.value


def drip(head: bytes, each: bytes, pause_s: float = 0.05) -> Answer:
    """Send the beginning of an answer, and then a few bytes again and again."""

    def answer(_: str, sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(each)
            time.sleep(pause_s)

    return answer


def flood(head: bytes, each: bytes) -> Answer:
    return drip(head, each, 0.0)


CHUNKED = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"10000\r\n" + b" " * 65536 + b"\r\n"


@pytest.mark.parametrize("kind", ["api", "whole"])
def test_endless_body_is_cut(raw: RawServer, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_MAX_API_NBYTES", 1_000_000)
    monkeypatch.setattr(FileKind.CONFIG, "max_nbytes", 1_000_000)
    raw.answers[kind] = flood(CHUNKED % 200, CHUNK)
    assert refused().reason in ("file_too_large", "bad_response")


@pytest.mark.parametrize("kind", ["api", "probe", "whole"])
@pytest.mark.parametrize("status", [403, 404])
def test_endless_error_is_cut(raw: RawServer, kind: str, status: int) -> None:
    raw.answers[kind] = flood(CHUNKED % status, CHUNK)
    assert refused().reason in ("forbidden", "server_error", "no_such_file")


@pytest.mark.parametrize("kind", ["api", "probe", "whole"])
@pytest.mark.parametrize("status", [200, 403, 416, 500])
def test_compressed_body_is_never_expanded(
    raw: RawServer, kind: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = bomb(1 << 28)
    raw.answers[kind] = lambda _, sock: send(
        sock, status, packed, {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    )
    monkeypatch.setattr(ranges, "_FIRST_WAIT_S", 0.0)
    assert refused().reason in ("bad_response", "forbidden", "server_error", "header_too_short")


@pytest.mark.parametrize("text", [b"[" * 60_000, b'{"error":' * 6_000, b'{"error":[[1]]}', b"5", b'{"errors": 5}'])
@pytest.mark.parametrize("status", [200, 404, 401])
def test_odd_json_is_an_error_of_the_package(raw: RawServer, text: bytes, status: int) -> None:
    for kind in ("api", "probe"):
        raw.answers = {kind: lambda _, sock: send(sock, status, text, {"Content-Type": "application/json"})}
        assert refused().reason in ("bad_response", "server_error", "bad_token", "no_such_repo", "header_too_short",
                                    "header_past_end", "header_too_large")  # fmt: skip


HEAD = b"HTTP/1.1 200 X\r\n"
SLOW = {
    "slow headers": drip(HEAD + b"X-Long: ", b"a"),
    "slow body": drip(HEAD + b"Content-Length: 90000\r\n\r\n", b" "),
    "102 again and again": drip(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "slow chunks": drip(CHUNKED % 200, b"1\r\n \r\n"),
}
FAST = {
    "100 without end": flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "headers without end": flood(HEAD, b"X-A: " + b"a" * 1000 + b"\r\n"),
    "chunk extensions": flood(CHUNKED % 200, b"1;" + b"x" * 8000 + b"\r\n \r\n"),
    "a header of megabytes": flood(HEAD + b"X-A: ", b"a" * 10_000),
}


@pytest.mark.parametrize("kind", ["api", "probe", "whole"])
@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_slow_answer_is_given_up(raw: RawServer, kind: str, answer: Answer) -> None:
    raw.answers[kind] = answer
    error = refused()
    # If a body of spaces is not a range, its first 100,000 bytes are read.
    assert error.reason == "timeout"
    assert len(raw.of_kind(kind)) <= 2, "it is not requested again"


@pytest.mark.parametrize("kind", ["api", "probe"])
@pytest.mark.parametrize("answer", FAST.values(), ids=FAST)
def test_endless_frames_are_cut(raw: RawServer, kind: str, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_MAX_API_NBYTES", 1_000_000)
    monkeypatch.setattr(ranges, "_FIRST_WAIT_S", 0.0)
    assert ranges.TRIES <= 5
    raw.answers[kind] = answer
    assert refused(within_s=20).reason in ("bad_response", "unreachable", "timeout", "file_too_large")


@pytest.mark.parametrize("fetch", ["range", "download"])
def test_slow_weights_are_requested_once_more_and_given_up(raw: RawServer, fetch: str) -> None:
    a_plan = plan(REPO, fetch=fetch)
    length = len(raw.files[MODEL_FILE])
    head = f"HTTP/1.1 200 X\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: {length}\r\n\r\n".encode()
    partial = b"HTTP/1.1 206 X\r\nContent-Range: bytes %d-%d/%d\r\nContent-Length: %d\r\n\r\n"

    def slow_range(_: str, sock: socket.socket) -> None:
        first, last = map(int, raw.requests[-1].headers["range"].removeprefix("bytes=").split("-"))
        drip(partial % (first, last, length, last + 1 - first), b"x")("", sock)

    raw.answers = {"data": slow_range, "whole": drip(head, b"x"), "probe": slow_range}
    from spectrum_stream.pipeline import run

    assert refused(lambda: list(run(a_plan))).reason == "timeout"
    assert 1 <= len(raw.of_kind("data")) + len(raw.of_kind("whole")) <= 2 * 4


@pytest.mark.parametrize("fetch", ["download", "cache"])
def test_endless_answer_about_xet_is_cut(raw: RawServer, fetch: str) -> None:
    """huggingface_hub requests the token for Xet, and reads the answer as a whole."""
    pytest.importorskip("hf_xet")
    sent = 0

    def endless(path: str, sock: socket.socket) -> object:
        nonlocal sent
        if "xet-read-token" not in path:
            return HONEST
        sock.sendall(CHUNKED % 200)
        while sent < 100_000_000:
            sock.sendall(CHUNK)
            sent += len(CHUNK)
        return None

    a_plan = plan(REPO, fetch=fetch)
    token_url = f"{raw.url}/api/models/{REPO}/xet-read-token/{COMMIT}"
    raw.headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": token_url}
    raw.answers["api"] = endless
    from spectrum_stream.pipeline import run

    # A download without Xet may follow.
    with suppress(SpectrumStreamError):
        list(run(a_plan))
    assert 0 < sent < 60_000_000


def test_slow_correct_server_is_not_given_up(raw: RawServer, files: dict[str, bytes]) -> None:
    body = files["config.json"]

    def honest_but_slow(_: str, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n" % (len(body) + 4000))
        for part in (body, *[b" " * 100] * 40):
            sock.sendall(part)
            # 2 kB a second.
            time.sleep(0.05)

    raw.answers["whole"] = honest_but_slow
    assert plan(REPO).matrices


ADDRESSES = [
    "file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://127.0.0.1:1/x", "http://u:p@127.0.0.1/x",
    "http://", "::::", "http://127.0.0.1:99999/x", "http://127.0.0.1:0/x", "javascript:1", "http://exa mple/",
    "http://127.0.0.1:x/", "http://[::1/", "http://xn--/", "http://a..b/", "http://" + "a" * 300 + "/", "/" * 9000,
    "http://\xfc.example:99999/", "//user@127.0.0.1/x", "http:\\\\127.0.0.1\\x", "http://127.0.0.1:-1/",
]  # fmt: skip


# These host names are looked up, which takes as long as the name server needs.
def as_parameters(addresses: Sequence[str]) -> list[Any]:
    marks = {"http://xn--/": [pytest.mark.slow]}
    return [pytest.param(one, marks=marks.get(one, ()), id=str(i)) for i, one in enumerate(addresses)]


@pytest.mark.parametrize("address", as_parameters(ADDRESSES))
def test_bad_redirect_is_one_error(raw: RawServer, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_FIRST_WAIT_S", 0.0)
    for kind, act in (
        ("api", lambda: plan(REPO)),
        ("probe", lambda: plan(REPO)),
        ("data", lambda: scan(REPO, fetch="range")),
        ("head", lambda: scan(REPO, fetch="download")),
        ("head", lambda: scan(REPO, fetch="cache")),
    ):
        raw.answers = {kind: redirect(address)}
        # huggingface_hub tries to find the host for six seconds, three times.
        assert refused(act, within_s=28).reason in (
            "bad_redirect", "bad_response", "server_error", "unreachable", "redirect_loop",
        )  # fmt: skip


def test_redirect_does_not_leave_encryption() -> None:
    scope = client.Scope.of_request("x", httpx.URL("https://hub.example"), 1)
    for location, is_allowed in (("https://cdn.example/x", True), ("/x", True), ("http://cdn.example/x", False)):
        if is_allowed:
            assert client._check_redirect(httpx.URL("https://hub.example/a"), location, scope) == location
        else:
            with pytest.raises(SpectrumStreamError) as error:
                client._check_redirect(httpx.URL("https://hub.example/a"), location, scope)
            assert error.value.reason == "bad_redirect"


@pytest.mark.parametrize("kind", ["api", "probe", "whole", "data", "head"])
def test_token_and_cookies_stay_with_the_endpoint(raw: RawServer, files: dict[str, bytes], kind: str) -> None:
    with serving(RawServer(files)) as spy:
        raw.headers["Set-Cookie"] = "session=c00kie; Path=/"
        base = re.sub(r"[0-9.]+(:\d+)", r"127.0.0.1\1", spy.url)

        def elsewhere(path: str, sock: socket.socket) -> None:
            redirect(f"{base}{path}")(path, sock)

        raw.answers[kind] = elsewhere
        for fetch in ("range", "download", "cache"):
            scan(REPO, fetch=fetch, name=fetch)
        assert spy.requests or kind == "head"
        for request in spy.requests:
            assert not {"authorization", "cookie"} & set(request.headers)
        assert {r.headers.get("authorization") for r in raw.requests} == {f"Bearer {TOKEN}"}
        assert not any("cookie" in r.headers for r in raw.requests)


@pytest.mark.parametrize("fetch", ["download", "cache"])
@pytest.mark.parametrize("way", ["route", "link", "relative link", "same host", "user", "nonsense", "hash"])
def test_xet_token_stays_with_the_endpoint(
    raw: RawServer, files: dict[str, bytes], fetch: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    local = values(scan(REPO, fetch="range", name="local"))
    with serving(RawServer(files)) as spy:
        route = f"{spy.url}/api/models/{REPO}/xet-read-token/{COMMIT}"
        raw.headers["X-Xet-Hash"] = "0" * 64 if way != "hash" else "../../x"
        own = f"{raw.url}/api/models/{REPO}/xet-read-token/{COMMIT}"
        raw.headers |= {
            "route": {"X-Xet-Refresh-Route": route},
            "link": {"X-Xet-Refresh-Route": own, "Link": f'<{route}>; rel="xet-auth"'},
            "relative link": {"Link": f'<//127.0.0.1:{spy.url.rpartition(":")[2]}/api/x>; rel="xet-auth"'},
            "same host": {"X-Xet-Refresh-Route": route.replace("127.0.0.1", "localhost")},
            "user": {"X-Xet-Refresh-Route": own.replace("://", "://u:p@")},
            "nonsense": {"X-Xet-Refresh-Route": "http://[::1"},
            "hash": {"X-Xet-Refresh-Route": own},
        }[way]
        assert values(scan(REPO, fetch=fetch, name=fetch)) == local
        assert not spy.requests


def test_xet_that_fails_is_replaced_by_http(raw: RawServer) -> None:
    pytest.importorskip("hf_xet")
    local = values(scan(REPO, fetch="range", name="local"))
    own = f"{raw.url}/api/models/{REPO}/xet-read-token/{COMMIT}"
    raw.headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": own}

    def no_token(path: str, sock: socket.socket) -> object:
        if "xet-read-token" not in path:
            return HONEST
        send(sock, 200)
        return None

    raw.answers["api"] = no_token
    assert values(scan(REPO, fetch="download", name="download")) == local
    assert [r for r in raw.of_kind("api") if "xet-read-token" in r.path]


@pytest.mark.slow
def test_xet_storage_that_is_silent_is_replaced_by_http(raw: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(hub, "_XET_SILENCE_S", 2.0)
    local = values(scan(REPO, fetch="range", name="local"))
    own = f"{raw.url}/api/models/{REPO}/xet-read-token/{COMMIT}"
    raw.headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": own}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        known = {
            "X-Xet-Cas-Url": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "X-Xet-Access-Token": "x",
            "X-Xet-Token-Expiration": "9999999999",
        }

        def token(path: str, sock: socket.socket) -> object:
            if "xet-read-token" not in path:
                return HONEST
            send(sock, 200, headers=known)
            return None

        raw.answers["api"] = token
        started = time.monotonic()
        assert values(scan(REPO, fetch="download", name="download")) == local
        assert time.monotonic() - started < 30


ETAGS = ['"{out}/x"', '"../../../../../../../../..{out}/x"', 'W/"{out}/x"', '"a\\b"', '"../refs/main"', '""', '"..."',
         '"' + "a" * 5000 + '"', '"\x01"', '"a/b"', "nul", "W/../../x"]  # fmt: skip


@pytest.mark.parametrize("etag", ETAGS, ids=range(len(ETAGS)))
@pytest.mark.parametrize("fetch", ["download", "cache"])
@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
def test_etag_is_never_used_as_a_path(raw: RawServer, tmp_path: Path, etag: str, fetch: str, header: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    raw.headers[header] = etag.format(out=out)
    try:
        scan(REPO, fetch=fetch)
    except SpectrumStreamError as error:
        assert error.reason == "bad_response"
    assert list(out.iterdir()) == []
    written = [p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "cache")]
    assert {p.relative_to(tmp_path).parts[0] for p in written} <= {"work", "model", "out", "cache"}


@pytest.mark.parametrize(
    "etag", ["ab12", '"ab12"', 'W/"ab12"', f'"{"0f" * 32}"', f'"{"0f" * 16}-12"', '"65a1b2c3-1f4"']
)
def test_etag_of_the_hub_is_passed_on(raw: RawServer, tmp_path: Path, etag: str) -> None:
    raw.headers["ETag"] = etag
    scan(REPO, fetch="cache", groups=["lm_head"])
    plain = etag.removeprefix("W/").strip('"')
    assert [p.name for p in (tmp_path / "cache").rglob("blobs/*")] == [plain]


@pytest.mark.parametrize(
    "revision",
    ["../../x", "refs/../../x", "..", "/etc/x", "a//b", "/a", "a\nb", "a b", "a\\b", "C:x", "a/./b", ".a", "a.lock",
     "a~1", "a^", "@{u}", "a?x", "a" * 300, "\x1b[31m"],
)  # fmt: skip
def test_revision_is_never_used_as_a_path(raw: RawServer, tmp_path: Path, revision: str) -> None:
    for model in (f"{REPO}@{revision}", f"hf://{REPO}@{revision}"):
        error = refused(lambda model=model: scan(model, fetch="cache"))  # type: ignore[misc]
        assert error.reason in ("bad_revision", "bad_address", "no_such_path")
    assert not raw.requests
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("revision", ["main", "v1.0", "feature/x", "refs/pr/12", "release-2.0+cpu", "größe", "a@b"])
def test_revision_of_git_is_written_into_the_cache(raw: RawServer, tmp_path: Path, revision: str) -> None:
    model = f"hf://{REPO}@{revision}" if "/" not in revision else f"{REPO}@{revision}"
    scan(model, fetch="cache")
    assert (tmp_path / "cache/models--org--model/refs" / revision).read_text() == COMMIT


def test_reference_in_the_cache_is_not_written_through_a_link(raw: RawServer, tmp_path: Path) -> None:
    users = tmp_path / "thesis.txt"
    users.write_text("precious")
    refs = tmp_path / "cache/models--org--model/refs"
    refs.mkdir(parents=True)
    (refs / "main").symlink_to(users)
    scan(REPO, fetch="cache")
    assert users.read_text() == "precious"
    assert (refs / "main").read_text() == COMMIT


def test_answer_for_another_commit_is_an_error(raw: RawServer) -> None:
    assert refused(lambda: plan(f"{REPO}@{'a' * 40}")).reason == "bad_response"


@pytest.mark.parametrize(
    "headers",
    [{"X-Repo-Commit": "../../x"}, {"X-Repo-Commit": "d" * 40}, {"X-Linked-Size": "9" * 30},
     {"X-Linked-Size": "-5"}, {"X-Linked-Size": "\xb2"},
     pytest.param({"Content-Length": "\xb2"}, marks=pytest.mark.slow),
     {"Location": "file:///etc/passwd"}, {"X-Error-Message": "a\tb"}, {"Retry-After": "9" * 400},
     {"Content-Type": "text/plain; charset=hex"}],
    ids=range(10),
)  # fmt: skip
@pytest.mark.parametrize("fetch", ["download", "cache"])
def test_odd_headers_of_a_file_end_in_scores_or_one_error(
    raw: RawServer, tmp_path: Path, headers: dict[str, str], fetch: str
) -> None:
    a_plan = plan(REPO, fetch=fetch)
    raw.headers |= headers
    from spectrum_stream.pipeline import run

    try:
        list(run(a_plan))
    except SpectrumStreamError as error:
        assert error.reason in ("bad_response", "changed", "unreachable", "timeout")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("fetch", ["download", "cache"])
@pytest.mark.parametrize("wait", ["9" * 400, "3600", "999999999"])
def test_server_that_asks_huggingface_hub_to_wait_long_is_an_error(raw: RawServer, fetch: str, wait: str) -> None:
    a_plan = plan(REPO, fetch=fetch)
    from spectrum_stream.pipeline import run

    for kind in ("head", "whole"):
        raw.answers = {kind: lambda _, sock: send(sock, 429, headers={"Retry-After": wait})}
        if kind == "head" or len(wait) < 100:
            assert refused(lambda: list(run(a_plan))).reason == "rate_limited"


@pytest.mark.parametrize("fetch", ["download", "cache"])
def test_endless_file_does_not_fill_the_disk(raw: RawServer, fetch: str, tmp_path: Path) -> None:
    a_plan = plan(REPO, fetch=fetch)
    head = b"HTTP/1.1 200 X\r\nConnection: close\r\nX-Repo-Commit: " + COMMIT.encode() + b"\r\n\r\n"
    sent = 0

    def endless(_: str, sock: socket.socket) -> None:
        nonlocal sent
        sock.sendall(head)
        while sent < 200_000_000:
            sock.sendall(bytes(65536))
            sent += 65536

    raw.answers = {"whole": endless}
    from spectrum_stream.pipeline import run

    assert refused(lambda: list(run(a_plan)), within_s=20).reason in ("bad_response", "changed")
    assert sent < 60_000_000


def test_thousands_of_shards_are_rejected_at_the_first_bad_one(
    files: dict[str, bytes], working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = [f"model-{i:05}-of-03000.safetensors" for i in range(1, 3001)]
    index = {"weight_map": {f"layers.{i}.w": name for i, name in enumerate(names)}}
    for served in ({}, dict.fromkeys(names[:100], b"<html>" * 10)):
        files |= {"model.safetensors.index.json": json.dumps(index).encode()} | served
        with serving(RawServer(files, siblings=[*names, "model.safetensors.index.json"])) as server:
            use(server.url, monkeypatch, tmp_path)
            assert refused().reason in ("no_such_file", "header_too_large", "header_past_end")
            assert len(server.requests) < 100
    monkeypatch.setattr(hub, "_MAX_SHARDS", 2999)
    with serving(RawServer(files, siblings=[*names, "model.safetensors.index.json"])) as server:
        use(server.url, monkeypatch, tmp_path)
        assert refused().reason == "too_many_shards"
        assert not server.of_kind("probe")


def test_server_that_breaks_off_after_each_byte_is_given_up(raw: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_FIRST_WAIT_S", 0.0)
    length = len(raw.files[MODEL_FILE])

    def one_byte(_: str, sock: socket.socket) -> None:
        first, last = map(int, raw.requests[-1].headers["range"].removeprefix("bytes=").split("-"))
        last = min(last, length - 1)
        head = f"HTTP/1.1 206 X\r\nContent-Range: bytes {first}-{last}/{length}\r\nContent-Length: {last + 1 - first}"
        sock.sendall(head.encode() + b"\r\n\r\nx")
        sock.shutdown(socket.SHUT_RDWR)

    raw.answers["data"] = one_byte
    assert refused(lambda: scan(REPO, fetch="range")).reason == "unreachable"
    assert len(raw.of_kind("data")) < 50


@pytest.mark.parametrize(
    ("endpoint", "is_good"),
    [
        ("http://user:{password}@{host}", True),
        ("http://{host}/", True),
        ("{host}", False),
        ("user:{password}@{host}", False),
        ("ftp://user:{password}@{host}", False),
        ("http://user:{password}@{host}?x={password}", False),
        ("http://user:{password}@{host}:99999", False),
        ("http://user:{password}@{host}/\n", True),
        ("http://user:{password}@{host}/a b", False),
        ("http://user:{password}@ho st", False),
        ("http://{password}@", False),
        ("http://user:{password}@[::1", False),
        ("http://user:{password}%0a@{host}#x", False),
    ],
)
def test_password_of_the_endpoint_is_sent_and_never_printed(
    raw: RawServer, cli: Cli, caplog: pytest.LogCaptureFixture, tmp_path: Path, endpoint: str, is_good: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    variables = {
        "HF_ENDPOINT": endpoint.format(password=PASSWORD, host=raw.url.removeprefix("http://")),
        "SPECTRUM_STREAM_DEBUG": "1",
    }
    for n, args in enumerate((["plan", REPO], ["scan", REPO, "--fetch", "cache", "--name", "x", "--json"])):
        done = cli(*args, code=0 if is_good else 2, **variables)
        assert PASSWORD not in done.stdout + done.stderr + caplog.text
        assert n or is_good == bool(raw.requests)
    raw.answers["api"] = lambda _, sock: send(sock, 500)
    done = cli("plan", REPO, code=1 if is_good else 2, **variables)
    assert PASSWORD not in done.stdout + done.stderr + caplog.text
    if is_good and PASSWORD in variables["HF_ENDPOINT"]:
        assert {r.headers["authorization"][:6] for r in raw.requests} == {"Basic "}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and PASSWORD.encode() in p.read_bytes()]


def test_provenance_selection_and_page_have_no_secret(raw: RawServer, cli: Cli, tmp_path: Path) -> None:
    variables = {"HF_ENDPOINT": raw.url.replace("://", f"://user:{PASSWORD}@"), "SPECTRUM_STREAM_DEBUG": "1"}
    result = "model_snr_results/snr_results_org-model.json"
    printed = ""
    for args in (
        ["scan", REPO, "--fetch", "range", "--top-percent", "50", "--json"],
        ["check", result, "--write-provenance"],
        ["select", result, "--top-percent", "50", "-o", "s.yaml", "--json"],
        ["report", result, "-o", "page.html"],
        ["report", result, "--json"],
        ["compare", result, "--metric", "alpha", "--json"],
        ["verify", "s.yaml", "--model", REPO, "--json"],
    ):
        done = cli(*args, code=0, **variables)
        printed += done.stdout + done.stderr
    assert Path("model_snr_results/provenance_org-model.json").exists() and Path("page.html").exists()
    assert {asked.headers.get("authorization", "")[:6] for asked in raw.requests} == {"Basic "}
    for secret in (PASSWORD, TOKEN):
        assert secret not in printed
        assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


@pytest.mark.parametrize("token", ["hf_" + "x" * 20 + "\x00y", "hf_ä" + "x" * 20, "hf_x yz" + "z" * 20, "x" * 5000])
def test_token_with_characters_forbidden_in_headers_is_not_printed(
    raw: RawServer, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(token, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    done = cli("plan", REPO, code=2, SPECTRUM_STREAM_DEBUG="1")
    assert "(bad_token)" in done.stderr
    assert token not in done.stderr
    assert not raw.requests


def test_signed_address_is_not_printed(raw: RawServer, cli: Cli) -> None:
    address = f"https://cdn.example/org/model/resolve/main/x.safetensors?X-Amz-Signature={SIGNATURE}"
    for model in (address, f"https://u:{PASSWORD}@hub.example/{REPO}", f"u:{PASSWORD}@hub.example/x/y"):
        done = cli("plan", model, code=2, SPECTRUM_STREAM_DEBUG="1")
        assert SIGNATURE not in done.stderr + done.stdout
        assert PASSWORD not in done.stderr + done.stdout
    done = cli("plan", f"{raw.url}/{REPO}?X-Amz-Signature={SIGNATURE}", "--json")
    assert SIGNATURE not in done.stderr + done.stdout


def test_session_of_a_host_program_is_the_same_afterwards(raw: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[httpx.Client] = []

    def factory() -> httpx.Client:
        made.append(hub_http.default_client_factory())
        return made[-1]

    monkeypatch.setattr(hub_http, "_GLOBAL_CLIENT", None)
    monkeypatch.setattr(hub_http, "_GLOBAL_CLIENT_FACTORY", factory)
    monkeypatch.setattr(client._swap, "_ours", None)
    client.client().close()
    client._client_of.cache_clear()
    theirs = huggingface_hub.utils.get_session()
    stop = threading.Event()
    seen: set[int] = set()

    def host() -> None:
        # The host program requests its session and downloads all the time.
        while not stop.is_set():
            session = huggingface_hub.utils.get_session()
            seen.add(session.get(f"{raw.url}/{REPO}/resolve/{COMMIT}/config.json").status_code)

    thread = threading.Thread(target=host)
    thread.start()
    for fetch in ("range", "download", "cache"):
        scan(REPO, fetch=fetch, name=fetch)
    stop.set()
    thread.join()
    assert huggingface_hub.utils.get_session() is theirs
    assert hub_http._GLOBAL_CLIENT_FACTORY is factory
    assert not theirs.is_closed
    assert type(theirs._transport) is httpx.HTTPTransport
    assert seen == {200}
    # In huggingface_hub 1.31 two threads can each make a session at the same time.
    assert len(made) >= 3, "ours are made with the settings of the host program"
    client._client_of.cache_clear()
    for one in made:
        one.close()


def test_guard_reaches_the_sockets_of_the_installed_httpx() -> None:
    # A new httpx could keep its connections in another place. Then time would have no limit.
    made = client._make_client()
    assert isinstance(made._transport, client._Guard)
    assert isinstance(made._transport._transport._pool._network_backend, client._Backend)  # type: ignore[attr-defined]
    made.close()


# Wrong answers of a server, each with secrets in all places where a server can put them.
FAULTS = {
    "400": hub_server.status(400, b"Bearer " + TOKEN.encode()),
    "401": hub_server.status(401, json.dumps({"error": f"no {TOKEN}"}).encode()),
    "403": hub_server.status(403, f"<Error>{TOKEN} http://x?X-Amz-Signature={SIGNATURE}</Error>".encode()),
    "404": hub_server.status(404, x_error_code="EntryNotFound", x_error_message=TOKEN),
    "416": hub_server.status(416),
    "429": hub_server.status(429, TOKEN.encode(), retry_after="0"),
    "429 for long": hub_server.status(429, retry_after="3600"),
    "500": hub_server.status(500, TOKEN.encode()),
    "reset": hub_server.reset,
    "cut": hub_server.cut(100),
    "short": hub_server.short_range,
    "lying": hub_server.lying_range,
    "compressed": hub_server.compressed,
    "other commit": hub_server.other_commit,
    "page": hub_server.page,
    "loop": hub_server.redirect("?X-Amz-Signature=" + SIGNATURE),
    "bad redirect": hub_server.redirect(f"http://u:{PASSWORD}@127.0.0.1:99999/?X-Amz-Signature={SIGNATURE}"),
    "nowhere": hub_server.redirect(f"http://127.0.0.1:1/?X-Amz-Signature={SIGNATURE}"),
}


@pytest.mark.parametrize("kind", ["api", "whole", "probe", "data", "head"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_wrong_answer_prints_logs_or_writes_a_secret(
    save: Save,
    working_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cli: Cli,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    fault: hub_server.Fault,
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    folder = save(llama_tensors(1))
    with HubServer({REPO: folder}) as server, HubServer({REPO: folder}) as storage:
        use(server.url, monkeypatch, tmp_path)
        monkeypatch.setattr(ranges, "_FIRST_WAIT_S", 0.0)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
        address = storage.url.replace("127.0.0.1", "localhost")
        server.elsewhere = lambda name: (
            f"{address}/{REPO}/resolve/{COMMIT}/{name}?X-Amz-Signature={SIGNATURE}&Expires=9"
        )
        (storage if kind in ("probe", "data") else server).script(kind, *[fault] * 30)
        fetch = "download" if kind == "head" else "range"
        endpoint = server.url.replace("://", f"://user:{PASSWORD}@") if kind == "api" else server.url
        done = cli("scan", REPO, "--fetch", fetch, code=None, HF_ENDPOINT=endpoint, SPECTRUM_STREAM_DEBUG="1")
        assert done.returncode in (0, 1)
    printed = done.stdout + done.stderr + caplog.text
    secrets = (TOKEN, PASSWORD, SIGNATURE)
    assert not [line for line in printed.splitlines() for secret in secrets if secret in line]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in data], path


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("see https://u:pw@h/x?sig=1 now", "see https://...@h/x?... now"),
        ("/x?X-Amz-Signature=abc&b=1", "/x?X-Amz-Signature=...&b=1"),
        ("hf_quant_config.json of org/hf_a_long_name", "hf_quant_config.json of org/hf_a_long_name"),
        ("Bearer abcdef", "Bearer ..."),
        ("org/model@main", "org/model@main"),
    ],
)  # fmt: skip
def test_redact_hides_secrets_and_nothing_else(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@given(secret=st.text(min_size=6, max_size=40), around=st.text(max_size=20))
def test_redact_hides_a_remembered_secret_in_any_text(secret: str, around: str) -> None:
    remember_secret(secret)
    assert secret not in redact(f"{around}{secret}{around}").replace("...", "")


# Answers of the API: JSON that resembles a correct answer, any bytes, and any headers.
_leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
_json: st.SearchStrategy[Any] = _leaves
for _ in range(3):
    _json = _leaves | st.lists(_json, max_size=4) | st.dictionaries(st.text(max_size=8), _json, max_size=4)
_siblings = st.lists(
    st.fixed_dictionaries({"rfilename": st.sampled_from([MODEL_FILE, "config.json"]) | _json}) | _json
)
_answers = st.one_of(
    st.fixed_dictionaries(
        {"sha": st.just(COMMIT) | _json, "siblings": _siblings | _json}, optional={"id": _json}
    ).map(lambda answer: json.dumps(answer).encode()),
    _json.map(lambda answer: json.dumps(answer).encode()),
    st.binary(max_size=200),
)
_values = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=40)
_headers = st.dictionaries(
    st.sampled_from(["Location", "ETag", "Content-Range", "Content-Length", "Retry-After", "Ratelimit", "Link",
                     "X-Linked-Size", "X-Repo-Commit", "Content-Type", "Content-Encoding", "X-Error-Code",
                     "X-Error-Message", "Set-Cookie"]),
    _values | st.sampled_from(["http://[", "http://a:99999", "/", "gzip", "9" * 30, "bytes 0-9/10"]), max_size=4,
)  # fmt: skip


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    made = httpx.Client(transport=client._Guard(httpx.MockTransport(answer)), follow_redirects=True)
    monkeypatch.setattr(ranges, "client", lambda: made)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(status=st.sampled_from([200, 200, 200, 206, 302, 401, 404, 416, 429, 500]), body=_answers, headers=_headers,
       file=st.binary(max_size=60))  # fmt: skip
def test_any_answer_of_a_server_is_a_source_or_an_error_of_the_package(
    working_folder: Path, status: int, body: bytes, headers: dict[str, str], file: bytes
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raw_headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        is_api = request.url.path.startswith("/api/")
        return httpx.Response(
            status if is_api else 200, headers=raw_headers, stream=httpx.ByteStream(body if is_api else file)
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_ENDPOINT", "http://hub.example")
        patched.setattr(constants, "HF_HUB_CACHE", str(working_folder / "cache"))
        patched.setattr(ranges, "_FIRST_WAIT_S", 0.0)
        patched.setattr(client, "MAX_WAIT_S", 0.0)
        patched.setattr(ranges, "MAX_WAIT_S", 0.0)
        answering(patched, answer)
        try:
            open_source(REPO)
        except SpectrumStreamError as error:
            assert error.reason
    assert os.listdir(working_folder) == []  # noqa: PTH208


# Servers that are slow or unusual


def test_download_over_a_slow_link_is_not_given_up(raw: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reports no bytes before it has 10 MB, so a slow download looks silent."""
    monkeypatch.setattr(hub, "_XET_SILENCE_S", 1.0)
    local = values(scan(REPO, fetch="range", name="range"))

    def slowly(path: str, sock: socket.socket) -> object:
        if not path.split("?")[0].endswith("model.safetensors"):
            return HONEST
        data = raw.files["model.safetensors"]
        head = f'HTTP/1.1 200 X\r\nX-Repo-Commit: {COMMIT}\r\nETag: "ab"\r\nContent-Length: {len(data)}\r\n\r\n'
        sock.sendall(head.encode())
        step = max(1, len(data) // 12)
        for start in range(0, len(data), step):
            sock.sendall(data[start : start + step])
            time.sleep(0.25)
        return None

    raw.answers = {"whole": slowly}
    assert values(scan(REPO, fetch="download", name="download")) == local


def test_slow_redirects_are_followed(raw: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_window_s", lambda: 0.8)
    hops: list[str] = []

    def hop(path: str, sock: socket.socket) -> object:
        hops.append(path)
        time.sleep(0.3)
        if len(hops) % 5 == 0:
            return HONEST
        send(sock, 302, headers={"Location": path, "X-Repo-Commit": COMMIT})
        return None

    raw.answers = {"whole": hop}
    assert plan(REPO).matrices
    assert len(hops) >= 5


def test_no_request_is_sent_outside_of_the_limits(raw: RawServer, tmp_path: Path) -> None:
    """huggingface_hub asks its server for a list of agents before a download, if nothing prevents it."""
    environment = os.environ | {"HF_ENDPOINT": raw.url, "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "spectrum_stream", "scan", REPO, "--fetch", "cache", "--name", "x", "-q"]
    root = str(Path(__file__).parents[2])
    subprocess.run(command, env=environment | {"PYTHONPATH": root}, check=True, capture_output=True)
    others = [asked.path for asked in raw.requests if f"/{REPO}/" not in asked.path]
    assert others == []


@pytest.mark.parametrize("etag", ['"5f-abc"', 'W/"d8x3k2abc"', '"0x8DC1"', '"CJ+abc=="'])
def test_etag_of_another_server_can_be_the_name_of_a_file(raw: RawServer, tmp_path: Path, etag: str) -> None:
    raw.headers |= {"ETag": etag}
    assert scan(REPO, fetch="cache").records
    assert len(list((tmp_path / "cache/models--org--model/blobs").iterdir())) >= 1


@pytest.mark.parametrize("revision", ["refs/pr/3", "feature/x", "v1.0+cu118", "fix-#12", "50%"])
def test_every_name_that_git_allows_can_be_a_revision(raw: RawServer, revision: str) -> None:
    assert plan(f"{REPO}@{revision}").matrices


@pytest.mark.parametrize("proxy", ["ftp://user:secretpw99@127.0.0.1:9", "http://user:sec/ret@127.0.0.1:9", "::"])
def test_bad_proxy_is_one_error_without_its_password(
    raw: RawServer, cli: Cli, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    client._client_of.cache_clear()
    done = cli("plan", REPO, code=None, SPECTRUM_STREAM_DEBUG="1")
    client._client_of.cache_clear()
    assert done.returncode in (1, 2)
    assert "secretpw99" not in done.stdout + done.stderr
