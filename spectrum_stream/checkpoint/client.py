"""The HTTP client of every request, with limits of bytes and time.

huggingface_hub's requests go through it too.

    huggingface_hub or `ranges.py` → httpx.Client → _Guard → httpx's transport → _Stream → the socket

The guard checks the address of each request, also after a redirect. It passes on only known headers in their correct
form. The stream counts the bytes of an answer and the time spent waiting for them. Both work only within a `Scope` of
the same thread. So they do not change the requests of a host program that uses huggingface_hub in other threads.
"""

import atexit
import functools
import importlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import huggingface_hub.utils._http as hub_http
from huggingface_hub import constants
from huggingface_hub.utils import hf_raise_for_status, httpx, parse_ratelimit_headers

from ..errors import CheckpointError, SourceError, SpectrumStreamError, UsageError
from ..text import si_bytes
from .hub_errors import BadResponse, NotAgain, TooSlow
from .redact import redact, redact_errors, remember_secret

# An answer must bring this many bytes a second, counted over a window of the seconds spent waiting.
FLOOR_NBYTES_S = 1000
_WINDOW_S = 10.0
# The limit of the status line and all headers. Those of answers such as 100 Continue count, and so does the part of
# the body that comes with them.
_HEAD_NBYTES = 300_000
# The body of an error or of a redirect.
_WORDS_NBYTES = 64_000
# An answer to huggingface_hub that is not the file: the token for Xet.
_ANSWER_NBYTES = 1_000_000
# Bytes of an answer that are not the file: the chunked encoding.
_SLACK_NBYTES = 1_000_000
# The requests of one download by huggingface_hub: its retries and their redirects.
_HUB_REQUESTS = 100
# The limit for all headers of a request and its redirects, and for those of a download by huggingface_hub.
_HEADS_S = 60.0
# The Hub's rate limits are per five minutes. A server that asks for more will not answer soon.
MAX_WAIT_S = 330.0
RETRY_STATUS = (408, 429, 500, 502, 503, 504)
_IDENTITY = ("", "identity")
_ADDRESS_NCHARS = 8000
# A host name (international ones in their encoded form), or an IP address, which can name an interface.
_HOST = re.compile(rb"[0-9a-zA-Z_-]([0-9a-zA-Z._-]{0,252})|[0-9a-fA-F:.]{2,45}(%[0-9a-zA-Z._-]{1,40})?")

_DIGITS = r"[0-9]{1,18}"
# huggingface_hub makes it the name of a file, so it has no dot and no slash.
_ETAG = r'(W/)?"?[0-9A-Za-z_+=][0-9A-Za-z_+=-]{0,127}"?'
# The headers that are passed on. Others, such as cookies, are dropped. So is a header in another form.
_HEADERS = {
    name: re.compile(form)
    for name, form in {
        "content-length": _DIGITS,
        "content-range": f"bytes {_DIGITS}-{_DIGITS}/{_DIGITS}",
        # huggingface_hub uses these two as file names.
        "etag": _ETAG,
        "x-linked-etag": _ETAG,
        "x-linked-size": _DIGITS,
        "x-repo-commit": r"[0-9a-f]{40,64}",
        "x-error-code": r"[A-Za-z]{1,64}",
        "x-error-message": r"[ -~]{1,500}",
        "retry-after": r" *[0-9]{1,9} *",
        "ratelimit": r'"\w{1,64}" *; *r *= *[0-9]{1,9} *; *t *= *[0-9]{1,9}',
        "x-xet-hash": r"[0-9a-fA-F]{64}",
        "x-xet-access-token": r"[!-~]{1,8000}",
        "x-xet-token-expiration": r"[0-9]{1,12}",
    }.items()
}
_PASSWORD = re.compile(r"://[^/@]*?:([^@]+)@")
_XET_AUTH = re.compile(r'<([^<>\s]{1,2000})>[^<>,]*?;\s*rel="?xet-auth"?')
# The loggers that name addresses.
_LOGGERS = (
    *(f"{name}.{part}" for name in ("httpcore", "httpcore2") for part in ("connection", "http11", "proxy", "socks")),
    *(
        "httpx",
        "httpx2",
        "huggingface_hub.utils._http",
        "huggingface_hub.file_download",
        "huggingface_hub.utils._xet",
    ),
)


# Older versions of huggingface_hub do not have it.
_detect_agent: Any = None
with suppress(ImportError):
    _detect_agent = importlib.import_module("huggingface_hub.utils._detect_agent")


@dataclass(slots=True, kw_only=True)
class Scope:
    """The limits of the requests for one file or answer.

    Attributes:
        where: the name of the file or answer in messages.
        endpoint: the address of the server; only requests to it carry the token.
        nbytes: the limit of the body.
        head_s: the seconds that are left to wait for headers.
        commit: the commit that huggingface_hub downloads from; None for our own requests.
        with_xet: whether huggingface_hub may use Xet.
        requests: the number of requests so far, redirects included.
        last_byte_s: the time of the last byte that came, by the monotonic clock.
    """

    where: str
    endpoint: httpx.URL
    nbytes: int
    head_s: float
    commit: str | None = None
    with_xet: bool = True
    requests: int = 0
    last_byte_s: float = 0.0

    @classmethod
    def of_request(cls, where: str, endpoint: httpx.URL, nbytes: int) -> "Scope":
        """Return the limits of one request of our own, with its redirects."""
        return cls(where=where, endpoint=endpoint, nbytes=nbytes, head_s=_HEADS_S)

    @classmethod
    def of_hub(cls, where: str, endpoint: httpx.URL, nbytes: int, commit: str, *, with_xet: bool) -> "Scope":
        """Return the limits of one download by huggingface_hub."""
        return cls(where=where, endpoint=endpoint, nbytes=nbytes, head_s=_HEADS_S, commit=commit, with_xet=with_xet)

    def limit_nbytes(self, request: httpx.Request) -> int:
        """Return the limit of the body of an answer with status 200 or 206."""
        is_file = self.commit is None or "/resolve/" in request.url.path or not _is_same(request.url, self.endpoint)
        return self.nbytes if is_file else _ANSWER_NBYTES


class _Local(threading.local):
    scope: Scope | None = None
    exchange: "_Exchange | None" = None


_local = _Local()


@contextmanager
def within(scope: Scope) -> Iterator[None]:
    """Apply limits to the requests of this thread."""
    outer, _local.scope = _local.scope, scope
    try:
        yield
    finally:
        _local.scope = outer


def client() -> httpx.Client:
    """Return the client for our own requests, made as that of huggingface_hub."""
    # Two processes must not share a connection.
    return _client_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _client_of(_: int) -> httpx.Client:
    made = _make_client()
    atexit.register(made.close)
    return made


def _make_client() -> httpx.Client:
    """Make a client with huggingface_hub's settings and our guard.

    The settings are those of the host program. httpx has no public way to put something between a client and the
    transports that it makes for proxies.
    """
    _filter_logs()
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy") and (found := _PASSWORD.search(value)) is not None:
            remember_secret(found[1])
    try:
        made: httpx.Client = _swap.factory()
    except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
        raise UsageError(
            f"no connection can be made with these settings ({type(error).__name__})",
            reason="bad_proxy",
            hint="check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and SSL_CERT_FILE",
        ) from redact_errors(error)
    made._transport = _Guard(made._transport)
    made._mounts = {pattern: mount and _Guard(mount) for pattern, mount in made._mounts.items()}
    return made


def _forbid_agents(is_forbidden: bool) -> None:
    """Keep huggingface_hub from asking its server for a list of agents, or allow it again.

    Newer versions ask before a download. That request has no limits, and its answer names environment variables that
    huggingface_hub then reads.
    """
    if _detect_agent is None:
        return
    empty = _detect_agent._EMPTY_REGISTRY
    if is_forbidden and _detect_agent._registry is None:
        _detect_agent._registry = empty
    elif not is_forbidden and _detect_agent._registry is empty:
        _detect_agent._registry = None


class _Swap:
    """Our client in place of huggingface_hub's while it downloads for us.

    `huggingface_hub.set_client_factory` would close the client of the host program, and cannot be undone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._theirs: Any = None
        self._ours: Any = None
        self._factory: Any = None

    def factory(self) -> Any:
        """Make a client with the factory of the host program or huggingface_hub."""
        return (self._factory or hub_http._GLOBAL_CLIENT_FACTORY)()

    def enter(self) -> None:
        with self._lock, hub_http._CLIENT_LOCK:
            self._depth += 1
            if self._depth == 1:
                _forbid_agents(True)
                self._theirs, self._factory = hub_http._GLOBAL_CLIENT, hub_http._GLOBAL_CLIENT_FACTORY
                hub_http._GLOBAL_CLIENT, hub_http._GLOBAL_CLIENT_FACTORY = self._ours, _make_client

    def leave(self) -> None:
        with self._lock, hub_http._CLIENT_LOCK:
            self._depth -= 1
            # The host program may have set another factory in the meantime.
            if self._depth == 0 and hub_http._GLOBAL_CLIENT_FACTORY is _make_client:
                self._ours = hub_http._GLOBAL_CLIENT
                hub_http._GLOBAL_CLIENT, hub_http._GLOBAL_CLIENT_FACTORY = self._theirs, self._factory
            if self._depth == 0:
                self._theirs = self._factory = None
                _forbid_agents(False)

    def forget(self) -> None:
        """Drop the connections of the parent process."""
        self.__init__()  # type: ignore[misc]

    def close(self) -> None:
        if self._ours is not None:
            self._ours.close()


_swap = _Swap()
atexit.register(_swap.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_swap.forget)


@contextmanager
def under_huggingface_hub() -> Iterator[None]:
    """Let huggingface_hub use our client, and restore its own at the end."""
    _swap.enter()
    try:
        yield
    finally:
        _swap.leave()


def check_address(url: httpx.URL) -> str | None:
    """Return what is wrong with an address, or None."""
    if url.scheme not in ("http", "https"):
        return "does not begin with http:// or https://"
    if not _HOST.fullmatch(url.raw_host):
        return "has no valid host"
    if url.port is not None and not 0 < url.port < 65536:
        return "has an invalid port"
    if url.userinfo:
        return "has a user or a password"
    return "is too long" if len(str(url)) > _ADDRESS_NCHARS else None


class _Guard(httpx.BaseTransport):
    """A transport that checks requests and answers within the scope of the thread."""

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport
        pool = getattr(transport, "_pool", None)
        if pool is not None and hasattr(pool, "_network_backend"):
            pool._network_backend = _Backend(pool._network_backend)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        scope = _local.scope
        if scope is None:
            return self._transport.handle_request(request)
        _prepare(request, scope)
        exchange = _Exchange(scope)
        _local.exchange = exchange
        try:
            response = self._transport.handle_request(request)
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            # huggingface_hub would try again without a message.
            if scope.commit is not None and request.method == "HEAD":
                raise NotAgain(error) from error
            raise
        except (httpx.HTTPError, SpectrumStreamError, BadResponse, TooSlow):
            raise
        except Exception as error:
            # Examples are host names that cannot be encoded and headers that cannot be decoded.
            raise BadResponse(f"the request cannot be sent ({type(error).__name__})") from error
        finally:
            _local.exchange = None
        try:
            return _admit(request, response, scope, exchange)
        except BaseException:
            response.close()
            raise

    def close(self) -> None:
        self._transport.close()


def _prepare(request: httpx.Request, scope: Scope) -> None:
    """Check a request, and remove secrets that are not for its server."""
    scope.requests += 1
    if scope.requests > _HUB_REQUESTS:
        raise BadResponse(f"one download takes more than {_HUB_REQUESTS} requests")
    if (fault := check_address(request.url)) is not None:
        raise SourceError(f"{scope.where}: its address {fault}", reason="bad_redirect")
    if not _is_same(request.url, scope.endpoint):
        request.headers.pop("authorization", None)
    request.headers.pop("cookie", None)
    request.headers["Accept-Encoding"] = "identity"
    timeouts = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        kind: timeouts.get(kind) or float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        for kind in ("connect", "read", "write", "pool")
    }


def _admit(request: httpx.Request, response: httpx.Response, scope: Scope, exchange: "_Exchange") -> httpx.Response:
    """Return an answer with its known headers, or raise an error about it."""
    status = response.status_code
    headers = {
        name: value
        for name, form in _HEADERS.items()
        if (value := response.headers.get(name)) is not None and form.fullmatch(value)
    }
    headers |= _xet_headers(response, scope)
    if scope.commit is not None and headers.get("x-repo-commit", scope.commit) != scope.commit:
        raise CheckpointError(
            f"{scope.where} comes from another commit, {headers['x-repo-commit']}", reason="changed"
        )
    if status < 200:
        raise BadResponse(f"the server answered {status}")
    if status < 300:
        if request.method != "HEAD" and response.headers.get("content-encoding", "").strip().lower() not in _IDENTITY:
            raise BadResponse("the answer is compressed, although the request forbids it")
        exchange.begin_body(scope.limit_nbytes(request))
        extensions = {key: value for key, value in response.extensions.items() if key != "reason_phrase"}
        return httpx.Response(status, headers=headers, stream=response.stream, extensions=extensions)
    words = _read_words(response, exchange)
    headers.pop("content-length", None)
    if status in (301, 302, 303, 307, 308) and (location := response.headers.get("location")) is not None:
        headers["location"] = _check_redirect(request.url, location, scope)
        words = b""
    admitted = httpx.Response(status, headers=headers, content=words)
    if scope.commit is not None and status in RETRY_STATUS:
        wait = parse_wait(admitted)
        if request.method == "HEAD" or (wait is not None and wait > MAX_WAIT_S):
            # huggingface_hub would wait as long as the server asks.
            admitted.request = request
            hf_raise_for_status(admitted)
    return admitted


def parse_wait(response: httpx.Response) -> float | None:
    """Return the seconds that a server asks to wait; None if it does not."""
    limits = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    # The header may hold a date instead. It was dropped then.
    seconds = response.headers.get("retry-after", "").strip()
    return float(seconds) if re.fullmatch(r"[0-9]{1,9}", seconds) else None


def _check_redirect(base: httpx.URL, location: str, scope: Scope) -> str:
    try:
        if len(location) > _ADDRESS_NCHARS or not location.isprintable():
            fault: str | None = "is too long or not printable"
        else:
            own, url = httpx.URL(location), base.join(location)
            # httpx would add the host of the request, but not its port.
            fault = "has no host" if own.scheme and not own.host else check_address(url)
            if fault is None and (base.scheme, url.scheme) == ("https", "http"):
                fault = "is not encrypted"
    # Host names can raise errors of several libraries.
    except Exception:
        fault = "is not valid"
    if fault is not None:
        raise SourceError(
            f"{base.host} redirects {scope.where} to an address that {fault}",
            reason="bad_redirect",
            hint="check HF_ENDPOINT, and whether the network asks for a login",
        )
    return location


def _xet_headers(response: httpx.Response, scope: Scope) -> dict[str, str]:
    """Return the addresses for Xet that may be used.

    The token is sent to the first one, so that must be an address of the endpoint.
    """
    headers: dict[str, str] = {}
    if scope.commit is None or not scope.with_xet:
        return headers
    link = _XET_AUTH.search(response.headers.get("link", "")[:_ADDRESS_NCHARS])
    route = link[1] if link is not None else response.headers.get("x-xet-refresh-route", "")
    home = constants.HUGGINGFACE_CO_URL_HOME
    if route.startswith(home):
        # huggingface_hub also replaces this address by the endpoint.
        route = f"{str(scope.endpoint).rstrip('/')}/{route.removeprefix(home)}"
    with suppress(httpx.InvalidURL, ValueError):
        url = httpx.URL(route)
        below = scope.endpoint.path.rstrip("/") + "/api/"
        if check_address(url) is None and _is_same(url, scope.endpoint) and url.path.startswith(below):
            headers["x-xet-refresh-route"] = route
    with suppress(httpx.InvalidURL, ValueError):
        storage = response.headers.get("x-xet-cas-url", "")
        is_encrypted = httpx.URL(storage).scheme == "https" or scope.endpoint.scheme == "http"
        if storage and check_address(httpx.URL(storage)) is None and is_encrypted:
            headers["x-xet-cas-url"] = storage
    return headers


def _read_words(response: httpx.Response, exchange: "_Exchange") -> bytes:
    """Read the start of an error's body, in a form for huggingface_hub."""
    if response.headers.get("content-encoding", "").strip().lower() not in _IDENTITY:
        response.close()
        return b""
    exchange.begin_body(_WORDS_NBYTES)
    body = bytearray()
    with suppress(httpx.HTTPError, SourceError, TooSlow):
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > _WORDS_NBYTES:
                break
    response.close()
    text = body[:_WORDS_NBYTES].decode("utf-8", "replace").strip()
    if text[:1] in ("{", "["):
        # The text of the key `error` is the message. The expression cannot fail at deep nesting, as a parser can.
        found = re.search(r'"(?:error|message)"\s*:\s*"((?:[^"\\]|\\.){0,500})"', text)
        text = "" if found is None else found[1]
    words = "".join(c if c.isprintable() else " " for c in redact(text[:2000]))
    # The words are written as JSON, because huggingface_hub appends other text in full.
    return json.dumps({"error": words}).encode() if words else b""


def _is_same(url: httpx.URL, endpoint: httpx.URL) -> bool:
    """Whether an address has the scheme, host and port of a server, which may turn http into https."""
    scheme, host, port = _origin(endpoint)
    is_upgrade = (scheme, port) == ("http", 80) and _origin(url) == ("https", host, 443)
    return is_upgrade or _origin(url) == (scheme, host, port)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _window_s() -> float:
    # A user allows longer pauses with the variable of huggingface_hub.
    return max(_WINDOW_S, float(constants.HF_HUB_DOWNLOAD_TIMEOUT) + 2)


class _Exchange:
    """The bytes and the waiting time of one request and its answer."""

    __slots__ = ("_head_s", "_in_head", "_left", "_limit", "_received", "_scope", "_waited", "_window_s")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._in_head = True
        self._limit = self._left = _HEAD_NBYTES
        self._window_s = self._head_s = _window_s()
        self._waited, self._received = 0.0, 0

    def begin_body(self, nbytes: int) -> None:
        """Count the body from now on."""
        self._in_head = False
        self._limit, self._left = nbytes, nbytes + nbytes // 8 + _SLACK_NBYTES
        self._waited, self._received = 0.0, 0

    def clip(self, timeout: float | None) -> float:
        """Return the timeout of the next read."""
        left = min(self._scope.head_s, self._head_s) if self._in_head else self._window_s
        return max(0.001, left if timeout is None else min(timeout, left))

    def count(self, nbytes: int, waited_s: float) -> None:
        """Count a read.

        Raises:
            TooSlow; SourceError: bad_response, the answer is too long.
        """
        self._left -= nbytes
        if self._left < 0:
            raise SourceError(
                f"{self._scope.where}: the answer is longer than {si_bytes(self._limit)}", reason="bad_response"
            )
        if nbytes:
            self._scope.last_byte_s = time.monotonic()
        if self._in_head:
            self._scope.head_s -= waited_s
            self._head_s -= waited_s
            self._received += nbytes
            # Without a byte, the error is that of the connection: a timeout.
            if self._received and min(self._scope.head_s, self._head_s) <= 0:
                raise TooSlow
            return
        self._waited += waited_s
        self._received += nbytes
        if self._waited >= self._window_s:
            if nbytes and self._received < FLOOR_NBYTES_S * self._window_s:
                raise TooSlow
            self._waited, self._received = 0.0, 0


class _Stream:
    """A connection that counts the bytes that it reads.

    An answer belongs to the request that was written last.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._exchange: _Exchange | None = None

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        exchange = self._exchange
        if exchange is None:
            return self._stream.read(max_bytes, timeout)  # type: ignore[no-any-return]
        started = time.monotonic()
        try:
            data: bytes = self._stream.read(max_bytes, exchange.clip(timeout))
        except Exception:
            exchange.count(0, time.monotonic() - started)
            raise
        exchange.count(len(data), time.monotonic() - started)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._exchange = _local.exchange
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **kwargs: Any) -> "_Stream":
        return _Stream(self._stream.start_tls(*args, **kwargs))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend:
    """Makes connections that count the bytes that they read."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def connect_tcp(self, *args: Any, **kwargs: Any) -> _Stream:
        return _Stream(self._backend.connect_tcp(*args, **kwargs))

    def connect_unix_socket(self, *args: Any, **kwargs: Any) -> _Stream:
        return _Stream(self._backend.connect_unix_socket(*args, **kwargs))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


def _redact_record(record: logging.LogRecord) -> bool:
    if _local.scope is not None:
        record.msg, record.args = redact(record.getMessage()), ()
        record.exc_info = record.exc_text = None
    return True


@functools.cache
def _filter_logs() -> None:
    """Redact the addresses that other libraries log during our requests."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_redact_record)
