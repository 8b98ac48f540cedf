"""One file of a repo, read by byte ranges: requests, the checks of an answer, and retries.

    GET {endpoint}/{repo}/resolve/{commit}/{file}      with `Range: bytes=a-b` and `Accept-Encoding: identity`
    → 302 to a signed address on another host          kept for the next ranges, renewed when it expires
    → 206 with `Content-Range: bytes a-b/total`        the only accepted answer; a 200 is closed unread

huggingface_hub provides the headers with the token, and the classes of its error responses. The retries are our own:
those of huggingface_hub sleep as long as a server asks, and cannot continue a body that broke off. The limits of
bytes and time are those of `client.py`.
"""

import logging
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status, httpx

from ..errors import CheckpointError, SourceError
from ..text import si_bytes
from .client import MAX_WAIT_S, RETRY_STATUS, Scope, client, parse_wait, within
from .hub_errors import BadResponse, TooSlow, describe
from .redact import redact_errors
from .source import Halted, RangesIgnored

T = TypeVar("T")

_log = logging.getLogger("spectrum_stream")

# The limit of attempts in a row that bring no byte.
TRIES = 5
_FIRST_WAIT_S = 0.5
# An attempt that brings fewer bytes counts as one without progress.
_PROGRESS_NBYTES = 64_000
# The limit of answers that break the protocol, which is rarely a coincidence.
_BAD_TRIES = 3
# One of several connections can get too few bytes, so a range that comes too slowly is requested once more.
_SLOW_TRIES = 2
# The status codes of a signed address that has expired, or was signed for another range.
_EXPIRED_STATUS = (400, 401, 403, 404, 410)
# Stop keeping signed addresses after this many in a row that worked only once.
_BOUND_TO_RANGES = 2


class RemoteFile:
    """A file at a commit. Safe to use from several threads.

    Args:
        url: the address that redirects to the file.
        endpoint: the server that the headers are for.
        commit: the commit that `X-Repo-Commit` must name, if the server sends it.
        headers: with the token.
        where: its name in messages; an address could hold a signature.
    """

    def __init__(self, url: str, endpoint: str, commit: str, headers: dict[str, str], where: str) -> None:
        self.where = where
        self._endpoint = httpx.URL(endpoint)
        self._url = httpx.URL(url)
        self._commit = commit
        self._headers = headers
        self._address: httpx.URL | None = None
        self._served = 0
        self._bound = 0
        self._lock = threading.Lock()

    def probe(self, nbytes: int, halt: threading.Event | None = None) -> tuple[bytes, int | None, bool]:
        """Read the file's first bytes and size, and test if the server has ranges.

        Returns:
            At most `nbytes` bytes; the size of the file, None if the server does not send it; whether the server
            answered with the range.

        Raises:
            SourceError: bad_response; HfHubHTTPError and httpx's errors, for `explaining`.
        """

        def attempt() -> tuple[bytes, int | None, bool]:
            with self._request(0, nbytes) as response:
                if response.status_code == 416:
                    return b"", 0, True
                if response.status_code == 200:
                    size = response.headers.get("content-length")
                    return _read(response, nbytes), int(size) if size is not None else None, False
                total = _check_range(response, 0, nbytes, None)
                head = _read(response, nbytes)
                if len(head) != min(nbytes, total):
                    raise httpx.RemoteProtocolError("the body is short")
                return head, total, True

        return with_retries(self.where, attempt, halt=halt)

    def ask_size(self) -> int | None:
        """Return the size of the file, None if the server does not send it.

        Raises:
            SourceError: bad_response; HfHubHTTPError and httpx's errors, for `explaining`.
        """

        def attempt() -> int | None:
            with within(Scope.of_request(self.where, self._endpoint, 0)):
                response = client().head(self._url, headers=self._headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            # The Hub names the size in the redirect; the storage host may deny a HEAD.
            for answer in (*response.history, response):
                if (linked := answer.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_SIZE)) is not None:
                    return int(linked)
            hf_raise_for_status(response)
            size = response.headers.get("content-length")
            return int(size) if size is not None else None

        return with_retries(self.where, attempt)

    def read_prefix(self, nbytes: int) -> bytes:
        """Read the first bytes of a file without a range request.

        The rest of the body is not read.

        Raises:
            SourceError: bad_response; CheckpointError: changed; HfHubHTTPError and httpx's errors, for `explaining`.
        """

        def attempt() -> bytes:
            with self._get_whole(nbytes) as response:
                return _read(response, nbytes)

        return with_retries(self.where, attempt)

    def save(self, path: Path, nbytes: int, on_bytes: Callable[[int], object], *, ranged: bool) -> None:
        """Write the whole file to a path.

        Args:
            nbytes: its size.
            on_bytes: called with the number of bytes that came since the last call.
            ranged: whether to continue a body that breaks off; without byte ranges it is requested again.

        Raises:
            OSError; SourceError: bad_response; CheckpointError: changed; HfHubHTTPError and httpx's errors, for
            `explaining`.
        """
        # Nothing is written through a link or into an existing file.
        with path.open("xb") as file:

            def write(_: int, chunk: bytes) -> None:
                file.write(chunk)
                on_bytes(len(chunk))

            def attempt() -> None:
                file.seek(0)
                file.truncate()
                with self._get_whole(nbytes) as response:
                    for chunk in response.iter_raw():
                        if file.tell() + len(chunk) > nbytes:
                            raise CheckpointError(f"{self.where} became longer than {nbytes} bytes", reason="changed")
                        write(0, chunk)
                if file.tell() < nbytes:
                    raise httpx.RemoteProtocolError("the body is short")

            if ranged:
                with suppress(RangesIgnored):
                    return self.stream(0, nbytes, nbytes, write)
            with_retries(self.where, attempt, slow_tries=_SLOW_TRIES)

    def stream(
        self,
        start: int,
        stop: int,
        total: int,
        write: Callable[[int, bytes], object],
        halt: threading.Event | None = None,
    ) -> None:
        """Pass bytes [start, stop) to `write(position, chunk)`, each once and in order.

        A body that breaks off is continued by further requests.

        Args:
            total: the size of the file when its header was read.
            halt: set it to stop the transfer soon.

        Raises:
            RangesIgnored; Halted.
            CheckpointError: changed.
            SourceError: bad_response; HfHubHTTPError and httpx's errors, for `explaining`.
        """
        position = start

        def attempt() -> None:
            nonlocal position
            with self._request(position, stop) as response:
                if response.status_code == 200:
                    raise RangesIgnored
                _check_range(response, position, stop, total, self.where)
                for chunk in response.iter_raw():
                    if halt is not None and halt.is_set():
                        raise Halted
                    if len(chunk) > stop - position:
                        raise BadResponse("the server sent more bytes than were requested")
                    write(position, chunk)
                    position += len(chunk)
            if position < stop:
                raise httpx.RemoteProtocolError("the body is short")

        if start < stop:
            with_retries(self.where, attempt, progress=lambda: position, halt=halt, slow_tries=_SLOW_TRIES)

    @contextmanager
    def _get_whole(self, nbytes: int) -> Iterator[httpx.Response]:
        """Request the file without a range, and check the answer.

        At most `nbytes` bytes of the body are read.
        """
        with _get(self._url, self._endpoint, self._headers, self.where, nbytes) as response:
            _check_whole(response)
            _check_commit(response, self._commit, self.where)
            yield response

    @contextmanager
    def _request(self, start: int, stop: int) -> Iterator[httpx.Response]:
        with ExitStack() as stack:
            yield self._answer(stack, start, stop)

    def _answer(self, stack: ExitStack, start: int, stop: int) -> httpx.Response:
        address = self._address
        if address is not None:
            response = stack.enter_context(self._get_range(address, start, stop))
            if address == self._url:
                _check_commit(response, self._commit, self.where)
            if response.status_code not in _EXPIRED_STATUS or address == self._url:
                self._served += 1
                return response
            stack.close()
        with self._lock:
            # Another thread may have renewed the address while this one waited for the lock.
            if self._address is not None and self._address != address:
                response = stack.enter_context(self._get_range(self._address, start, stop))
                if response.status_code not in _EXPIRED_STATUS:
                    return response
                stack.close()
            if address is not None:
                # An address that worked only once may be signed for one range, and not only for a time.
                self._bound = 0 if self._served else self._bound + 1
            self._address, self._served = None, 0
            response = stack.enter_context(self._get_range(self._url, start, stop))
            _check_commit(response, self._commit, self.where)
            if self._bound < _BOUND_TO_RANGES and response.status_code == 206:
                self._address = response.url
        return response

    def _get_range(self, url: httpx.URL, start: int, stop: int) -> AbstractContextManager[httpx.Response]:
        headers = self._headers | {"Range": f"bytes={start}-{stop - 1}"}
        return _get(url, self._endpoint, headers, self.where, stop - start)


def read_answer(url: str, endpoint: str, headers: dict[str, str], where: str, nbytes: int) -> bytes:
    """Send a request to the API of a server, and return the body of its answer.

    Raises:
        CheckpointError: file_too_large; HfHubHTTPError and httpx's errors, for `explaining`.
    """
    with _get(httpx.URL(url), httpx.URL(endpoint), headers, where, nbytes) as response:
        _check_whole(response)
        body = _read(response, nbytes + 1)
    if len(body) > nbytes:
        raise CheckpointError(
            f"the answer of {endpoint} for {where} is larger than {si_bytes(nbytes)}", reason="file_too_large"
        )
    return body


def with_retries(
    where: str,
    attempt: Callable[[], T],
    *,
    progress: Callable[[], int] = lambda: 0,
    halt: threading.Event | None = None,
    tries: int = TRIES,
    connect_tries: int = TRIES,
    slow_tries: int = 1,
) -> T:
    """Call `attempt` until it succeeds, and return its result.

    Args:
        where: the file or repo, for messages.
        progress: returns the position that was reached. An attempt that advances it by 64 kB is not counted.
        halt: set it to stop the waiting.
        tries: the limit of attempts in a row without progress.
        connect_tries: the limit of those that reach no server.
        slow_tries: the limit of attempts that bring bytes, but too slowly.

    Raises:
        Halted; SourceError: rate_limited, bad_response; else the error of the last attempt.
    """
    failed, bad, slow, reached = 0, 0, 0, progress()
    while True:
        asked: float | None = None
        try:
            return attempt()
        except BadResponse as error:
            redact_errors(error)
            last: Exception = SourceError(f"{where}: {error}", reason="bad_response")
            last.__cause__ = error
            bad += 1
            if bad >= min(_BAD_TRIES, tries):
                raise last from error
        except TooSlow as error:
            slow += 1
            if slow >= slow_tries:
                raise
            last = error
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            last = error
        except HfHubHTTPError as error:
            if error.response.status_code not in RETRY_STATUS:
                raise
            last, asked = error, parse_wait(error.response)
        # A server that breaks off after every byte makes no progress.
        failed, reached = (0, progress()) if progress() >= reached + _PROGRESS_NBYTES else (failed + 1, reached)
        if asked is not None and asked > MAX_WAIT_S:
            raise SourceError(
                f"{where}: the server asks to wait {asked:.0f} s before the next request",
                reason="rate_limited",
                hint="the same command resumes; a token in HF_TOKEN raises the Hub's limits",
            ) from last
        if failed >= (min(tries, connect_tries) if isinstance(last, httpx.ConnectError) else tries):
            raise last
        wait = asked if asked is not None else _FIRST_WAIT_S * 2 ** (failed - 1) * random.uniform(0.75, 1.25)
        _log.warning("%s: %s; retrying in %.0f s", where, describe(last), wait)
        if (halt or threading.Event()).wait(wait):
            raise Halted


@contextmanager
def _get(
    url: httpx.URL, endpoint: httpx.URL, headers: dict[str, str], where: str, nbytes: int
) -> Iterator[httpx.Response]:
    """Send a request within the limits for a body of `nbytes` bytes.

    The client drops the token for other servers.
    """
    with (
        within(Scope.of_request(where, endpoint, nbytes)),
        client().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
    ):
        yield response


def _check_whole(response: httpx.Response) -> None:
    if response.status_code != 200:
        hf_raise_for_status(_read_body(response))
        raise BadResponse(f"the server answered {response.status_code}")


def _check_range(response: httpx.Response, start: int, stop: int, total: int | None, where: str = "") -> int:
    """Check that an answer is exactly the requested range, up to the end of the file.

    Return the file's size.

    Raises:
        CheckpointError: changed; BadResponse; HfHubHTTPError.
    """
    if response.status_code == 416:
        raise CheckpointError(f"{where} became shorter while it was read", reason="changed")
    if response.status_code != 206:
        hf_raise_for_status(_read_body(response))
        raise BadResponse(f"the server answered {response.status_code} to a range")
    match = re.fullmatch(
        r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", response.headers.get("content-range", "")
    )
    if match is None:
        raise BadResponse("the answer has no Content-Range header")
    first, last, size = map(int, match.groups())
    if total is not None and size != total:
        raise CheckpointError(f"{where} had {total} bytes and has {size} now", reason="changed")
    length = response.headers.get("content-length")
    if (first, last + 1) != (start, min(stop, size)) or (length is not None and length != str(last + 1 - first)):
        raise BadResponse("the answer is another range than the requested one")
    return size


def _check_commit(response: httpx.Response, commit: str, where: str) -> None:
    first = response.history[0] if response.history else response
    answered = first.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
    if answered is not None and answered != commit:
        raise CheckpointError(f"{where} comes from another commit, {answered}", reason="changed")


def _read_body(response: httpx.Response) -> httpx.Response:
    # The message of an error is in the body, which a streamed response has not read yet.
    response.read()
    return response


def _read(response: httpx.Response, nbytes: int) -> bytes:
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= nbytes:
            break
    return bytes(body[:nbytes])
