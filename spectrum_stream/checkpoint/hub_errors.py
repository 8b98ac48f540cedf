"""What goes wrong between here and a server, in one sentence each, with what to do next."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

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


class BadResponse(Exception):
    """An answer that breaks the rules; asking again may help."""


@contextmanager
def explaining(endpoint: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn what goes wrong in here into a SourceError: one sentence, with what to do next."""
    try:
        yield
    except SpectrumStreamError:
        raise
    except (httpx.HTTPError, BadResponse, HFValidationError, OSError) as error:
        raise _explained(error, endpoint, repo, revision) from error


def _explained(error: Exception, endpoint: str, repo: str, revision: str | None) -> SourceError:
    again = "check the connection; the same command resumes"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HfHubHTTPError) and status in (401, 403) and _is_elsewhere(error, endpoint):
        host, said = error.response.url.host, _excerpt(error.response.text)
        return SourceError(
            f"{host}, to which {endpoint} redirects, refuses access: {said}",
            reason="forbidden",
            hint=again,
        )
    if isinstance(error, GatedRepoError):
        return SourceError(
            f"{repo} is gated, and this token's owner has no access to it",
            reason="gated_repo",
            hint=f"ask for access on {endpoint}/{repo}, then set HF_TOKEN or run `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            f"{repo} has no revision {revision or 'main'}",
            reason="no_such_revision",
            hint=f"its branches and commits are on {endpoint}/{repo}/commits/main",
        )
    # A server other than the Hub may say no more than 401 of a repo that it hides.
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and get_token() is None):
        return SourceError(
            f"there is no folder {repo} here, and no repo of that name on {endpoint} that you may see",
            reason="no_such_repo",
            hint="check the name; for a private repo set HF_TOKEN or run `hf auth login`",
        )
    if isinstance(error, DisabledRepoError):
        return SourceError(f"{repo} was disabled by {endpoint}", reason="repo_disabled")
    if isinstance(error, RemoteEntryNotFoundError):
        return SourceError(f"a file of {repo} is not there any more", reason="no_such_file", hint=again)
    if status == 401:
        return SourceError(
            f"{endpoint} does not accept the token",
            reason="bad_token",
            hint="it may have expired: set HF_TOKEN anew, or run `hf auth login`",
        )
    if status == 403:
        return SourceError(
            f"{endpoint} refuses access to {repo}",
            reason="forbidden",
            hint="the token may lack the permission to read this repo: see `hf auth whoami`",
        )
    if status == 429:
        return SourceError(
            f"{endpoint} refuses more requests for now",
            reason="rate_limited",
            hint="wait a few minutes; the same command resumes; a token in HF_TOKEN raises the limits",
        )
    if status is not None:
        return SourceError(f"{endpoint} answered {status} for {repo}", reason="server_error", hint=again)
    if isinstance(error, OfflineModeIsEnabled):
        return offline(repo)
    if isinstance(error, httpx.TooManyRedirects):
        return SourceError(f"{endpoint} redirects in a circle for {repo}", reason="redirect_loop")
    if isinstance(error, httpx.TimeoutException):
        return SourceError(f"{endpoint} did not answer in time", reason="timeout", hint=again)
    if isinstance(error, httpx.HTTPError):
        return SourceError(
            f"{endpoint} cannot be reached: {describe(error)}",
            reason="unreachable",
            hint="check the connection, the proxy (HTTPS_PROXY) and HF_ENDPOINT; the same command resumes",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceError(f"the disk is full: {repo} cannot be downloaded", reason="disk_full", hint="--fetch range")
    if isinstance(error, OSError) and error.errno is not None:
        return SourceError(f"{repo} cannot be downloaded: {error.strerror}", reason="unwritable")
    return SourceError(f"{endpoint} does not answer as the Hub does for {repo}", reason="bad_response", hint=again)


def offline(repo: str) -> SourceError:
    return SourceError(
        f"{repo} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
        reason="offline",
        hint=f"unset HF_HUB_OFFLINE, or run `hf download {repo}` where there is a network",
    )


def _is_elsewhere(error: HfHubHTTPError, endpoint: str) -> bool:
    home, there = httpx.URL(endpoint), error.response.url
    return (home.host, home.port) != (there.host, there.port)


def _excerpt(body: str) -> str:
    """The words of an answer in XML, HTML or JSON, as many as fit a sentence; no address, which could be signed."""
    words = re.sub(r"<[^>]*>|\S*://\S*", " ", body).split()
    return " ".join(words)[:200] or "no reason given"


def describe(error: Exception) -> str:
    """An error of the network in a few words, with no address in them."""
    if isinstance(error, HfHubHTTPError):
        return f"the server answered {error.response.status_code}"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        return "no connection"
    if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
        return "the connection broke off"
    return str(error)
