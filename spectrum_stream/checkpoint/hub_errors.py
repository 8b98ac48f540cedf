"""Network and Hub errors, each as one sentence with a hint: a table of test, reason, message and hint."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from huggingface_hub import get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from ..errors import SourceError, SpectrumStreamError
from .redact import redact, redact_errors


class BadResponse(Exception):
    """The server sent an answer that breaks the protocol. Another request may help."""


class TooSlow(Exception):
    """The server sends too few bytes a second."""


class NotAgain(Exception):
    """An error of the network that huggingface_hub must not retry."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error, and the request that it belongs to."""

    error: Exception
    endpoint: str
    repo: str
    revision: str

    @property
    def status(self) -> int | None:
        """The status of the server's answer; None without an answer."""
        return self.error.response.status_code if isinstance(self.error, HfHubHTTPError) else None

    @property
    def host(self) -> str:
        """The host that answered; after a redirect it is not the endpoint's."""
        return str(self.error.response.url.host) if isinstance(self.error, HfHubHTTPError) else ""

    @property
    def answer(self) -> str:
        """The words of the server's answer.

        Addresses are left out, because they can be signed.
        """
        text = _read_words(self.error.response) if isinstance(self.error, HfHubHTTPError) else ""
        words = re.sub(r"<[^>]*>|\S*://\S*", " ", text).split()
        return " ".join(words)[:200] or "no reason given"

    @property
    def cause(self) -> str:
        """The error in a few words."""
        return describe(self.error)

    @property
    def errno(self) -> int | None:
        """The number of an error of the operating system."""
        return self.error.errno if isinstance(self.error, OSError) else None

    @property
    def strerror(self) -> str:
        """The words for that number."""
        return str(self.error.strerror) if isinstance(self.error, OSError) else ""


class _Row(NamedTuple):
    """One kind of failure. `message` and `hint` are formatted with the failure as `f`."""

    fits: Callable[[_Failure], bool]
    reason: str
    message: str
    hint: str | None = None


def _is(*types: type[Exception]) -> Callable[[_Failure], bool]:
    return lambda f: isinstance(f.error, types)


def _has_status(*statuses: int) -> Callable[[_Failure], bool]:
    return lambda f: f.status in statuses


def _read_words(response: httpx.Response) -> str:
    """Return the words of an error, in the form that `client.py` writes."""
    try:
        return str(response.json()["error"])
    except (ValueError, LookupError, TypeError):
        return response.text


def _is_refused_elsewhere(f: _Failure) -> bool:
    """Whether access was denied by a host that the endpoint redirects to."""
    if not isinstance(f.error, HfHubHTTPError) or f.status not in (401, 403):
        return False
    home, there = httpx.URL(f.endpoint), f.error.response.url
    return bool((home.host, home.port) != (there.host, there.port))


def _is_hidden(f: _Failure) -> bool:
    """Whether the repo is missing or hidden: some servers answer 401 for that."""
    return isinstance(f.error, RepositoryNotFoundError) or (f.status == 401 and get_token() is None)


_AGAIN = "check the connection; the same command resumes"
_OFFLINE = _Row(
    _is(OfflineModeIsEnabled),
    "offline",
    "{f.repo} is not in the cache, and HF_HUB_OFFLINE forbids a download",
    "unset HF_HUB_OFFLINE, or run `hf download {f.repo}` where there is a network",
)

# The first row that fits counts. The order matters, because the tests overlap:
# - a 401 or 403 of a storage host is not about the token, so it comes before all rows about access;
# - GatedRepoError is a RepositoryNotFoundError, and both are HfHubHTTPErrors with a status of their own;
# - a 401 without a token means a hidden repo, a 401 with one means a bad token;
# - HfHubHTTPError is an httpx.HTTPError and an OSError, so every row with a status comes before those without;
# - the timeouts and redirects of httpx are httpx.HTTPErrors, and the last row takes what is left.
_ROWS = (
    _Row(
        _is_refused_elsewhere,
        "forbidden",
        "{f.endpoint} redirects to {f.host}, which denies access: {f.answer}",
        _AGAIN,
    ),
    _Row(
        _is(GatedRepoError),
        "gated_repo",
        "{f.repo} is gated, and the owner of this token has no access",
        "ask for access on {f.endpoint}/{f.repo}, then set HF_TOKEN or run `hf auth login`",
    ),
    _Row(
        _is(RevisionNotFoundError),
        "no_such_revision",
        "{f.repo} has no revision {f.revision}",
        "its branches and commits are on {f.endpoint}/{f.repo}/commits/main",
    ),
    _Row(
        _is_hidden,
        "no_such_repo",
        "{f.endpoint} has no repo {f.repo} that you may see",
        "check the name; for a private repo set HF_TOKEN or run `hf auth login`",
    ),
    _Row(_is(DisabledRepoError), "repo_disabled", "{f.repo} was disabled by {f.endpoint}"),
    _Row(_is(RemoteEntryNotFoundError), "no_such_file", "a file of {f.repo} no longer exists", _AGAIN),
    _Row(
        _has_status(401),
        "bad_token",
        "{f.endpoint} does not accept the token",
        "it may have expired: set HF_TOKEN again, or run `hf auth login`",
    ),
    _Row(
        _has_status(403),
        "forbidden",
        "{f.endpoint} denies access to {f.repo}",
        "the token may lack the permission to read this repo: see `hf auth whoami`",
    ),
    _Row(
        _has_status(429),
        "rate_limited",
        "{f.endpoint} limits the rate of requests",
        "wait a few minutes, then run the same command to resume; a token in HF_TOKEN raises the limits",
    ),
    _Row(lambda f: f.status is not None, "server_error", "{f.endpoint} answered {f.status} for {f.repo}", _AGAIN),
    _OFFLINE,
    _Row(_is(httpx.TooManyRedirects), "redirect_loop", "{f.endpoint} redirects in a circle for {f.repo}"),
    _Row(_is(TooSlow), "timeout", "{f.endpoint} answers too slowly for {f.repo}: {f.cause}", _AGAIN),
    _Row(_is(httpx.TimeoutException), "timeout", "{f.endpoint} did not answer in time", _AGAIN),
    _Row(
        _is(httpx.HTTPError),
        "unreachable",
        "{f.endpoint} cannot be reached: {f.cause}",
        "check the connection, the proxy (HTTPS_PROXY) and HF_ENDPOINT; the same command resumes",
    ),
    _Row(
        lambda f: f.errno in (errno.ENOSPC, errno.EDQUOT),
        "disk_full",
        "the disk is full: {f.repo} cannot be downloaded",
        "use --fetch range, which needs no disk",
    ),
    _Row(
        _is(BadResponse),
        "bad_response",
        "{f.endpoint} does not answer as the Hub does for {f.repo}: {f.cause}",
        _AGAIN,
    ),
    _Row(lambda f: f.errno is not None, "unwritable", "{f.repo} cannot be downloaded: {f.strerror}"),
    _Row(lambda f: True, "bad_response", "{f.endpoint} does not answer as the Hub does for {f.repo}", _AGAIN),
)


@contextmanager
def explaining(endpoint: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the network, the Hub and the disk into a SourceError.

    Raises:
        SourceError: with the reason of the first row of the table that fits.
    """
    try:
        yield
    except SpectrumStreamError as error:
        redact_errors(error)
        raise
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        BadResponse,
        TooSlow,
        HFValidationError,
        OSError,
        UnicodeError,
    ) as error:
        redact_errors(error)
        failure = _Failure(error, endpoint, repo, revision or "main")
        raise _explain(failure, next(row for row in _ROWS if row.fits(failure))) from error


def explain_offline(repo: str) -> SourceError:
    """Return the error for a repo that is not in the cache in offline mode."""
    return _explain(_Failure(OfflineModeIsEnabled(), "", repo, "main"), _OFFLINE)


def _explain(failure: _Failure, row: _Row) -> SourceError:
    hint = None if row.hint is None else redact(row.hint.format(f=failure))
    return SourceError(redact(row.message.format(f=failure)), reason=row.reason, hint=hint)


def describe(error: Exception) -> str:
    """Return an error of the network in a few words, without addresses."""
    if isinstance(error, HfHubHTTPError):
        return f"the server answered {error.response.status_code}"
    if isinstance(error, TooSlow):
        return "less than 1 kB a second"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        return "no connection"
    if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
        return "the connection broke off"
    return redact(str(error))
