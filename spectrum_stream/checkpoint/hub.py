"""A checkpoint in a repo of the Hugging Face Hub, or of a server that speaks its protocol.

The revision is resolved to a commit once, and every later request is for that commit, so a push during a scan
changes nothing. huggingface_hub's environment variables set the token, the server, offline mode and the cache:
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME.
"""

import functools
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HfUriError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import build_hf_headers, parse_hf_uri, tqdm, validate_repo_id

from ..errors import BadIndex, CheckpointError, SourceError, UsageError
from ..text import VERSION
from .hub_errors import BadResponse, explain_offline, explaining
from .index import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_JSON_NBYTES,
    Choice,
    check_json_size,
    choose_shards,
    is_safe_shard_name,
    parse_json,
    read_config,
)
from .local import open_local
from .ranges import RemoteFile, with_retries
from .source import PROBE_NBYTES, LocalShard, RangesIgnored, Shard, Source

_LIBRARY = "spectrum-stream"
_PROBES_AT_ONCE = 8
# huggingface_hub itself tries the body of a file five times. These tries are for the requests before it.
_DOWNLOAD_TRIES = 2


@dataclass(frozen=True, slots=True)
class Address:
    """A repo as a user names it; the revision is a branch, a tag or a commit."""

    repo: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """The name in file names: Spectrum's, with the revision if it is not main."""
        return self.repo if self.revision in (None, "main") else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Repo:
    """A repo at a commit.

    Attributes:
        revision: the name that was resolved to the commit.
        small: the names of index and config, if the repo has them.
    """

    endpoint: str
    id: str
    commit: str
    revision: str
    small: tuple[str, ...]

    def file(self, name: str) -> RemoteFile:
        """Return a file of the repo at the commit."""
        return RemoteFile(
            hf_hub_url(self.id, name, revision=self.commit, endpoint=self.endpoint),
            self.commit,
            build_hf_headers(library_name=_LIBRARY, library_version=VERSION),
            f"{self.id}/{name}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HubShard:
    """A shard in a repo.

    Attributes:
        head: its first bytes, enough for most headers.
        is_ranged: whether the server answers a request for a byte range with that range.
    """

    name: str
    nbytes: int
    repo: Repo
    file: RemoteFile = field(repr=False)
    head: bytes = field(repr=False)
    is_ranged: bool

    @property
    def where(self) -> str:
        return self.file.where

    def read(self, start: int, stop: int) -> bytes:
        """See `RemoteShard`.

        Raises:
            SourceError: see `explaining`; CheckpointError: changed.
        """
        stop = min(stop, self.nbytes)
        if stop <= len(self.head) or len(self.head) == self.nbytes:
            return self.head[start:stop]
        with explaining(self.repo.endpoint, self.repo.id, self.repo.commit):
            if self.is_ranged:
                body = bytearray()
                try:
                    self.file.stream(start, stop, self.nbytes, lambda _, chunk: body.extend(chunk))
                    return bytes(body)
                except RangesIgnored:
                    pass
            return self.file.read_prefix(stop)[start:]

    def stream(
        self, start: int, stop: int, write: Callable[[int, bytes], object], halt: threading.Event | None = None
    ) -> None:
        """See `RemoteShard`."""
        with explaining(self.repo.endpoint, self.repo.id, self.repo.commit):
            self.file.stream(start, stop, self.nbytes, write, halt)

    def download(self, folder: Path | None, on_bytes: Callable[[int], object]) -> LocalShard:
        """See `RemoteShard`. Uses Xet if the server has it."""

        class Counter(tqdm):
            # A disabled tqdm neither draws nor counts, so this class counts.
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                on_bytes(int(n or 0))

        def attempt(name: str) -> Path:
            try:
                return Path(
                    hf_hub_download(
                        self.repo.id,
                        name,
                        revision=self.repo.commit,
                        local_dir=folder,
                        endpoint=self.repo.endpoint,
                        library_name=_LIBRARY,
                        library_version=VERSION,
                        tqdm_class=Counter,
                    )
                )
            except LocalEntryNotFoundError as error:
                # Every failure of the first request is wrapped in this error; the cause is the real one.
                raise error.__cause__ or error from None

        with explaining(self.repo.endpoint, self.repo.id, self.repo.commit):
            path = with_retries(self.where, lambda: attempt(self.name), tries=_DOWNLOAD_TRIES)
            # A cached model needs its index and config to be used offline.
            for name in self.repo.small if folder is None else ():
                if _find_in_cache(self.repo, name) is None:
                    with_retries(self.where, functools.partial(attempt, name))
            if folder is None:
                _write_ref(self.repo, path)
        local = LocalShard.at(self.name, path)
        if local.nbytes != self.nbytes or local.read(0, len(self.head)) != self.head:
            raise CheckpointError(f"{self.where} was changed after it was planned", reason="changed")
        return local


def parse_address(model: str) -> Address | None:
    """Parse MODEL as the name of a repo; return None if it cannot be one.

    Raises:
        UsageError: bad_address, an address that does not belong to a model.
    """
    if "://" in model and "/" in (body := model.removeprefix("hf://")):
        try:
            uri = parse_hf_uri(model, endpoint=_read_endpoint())
        except HfUriError as error:
            raise UsageError(
                f"{model} is not the address of a repo on {_read_endpoint()}",
                reason="bad_address",
                hint="give org/name, and set HF_ENDPOINT for another server",
            ) from error
        # The page of a file stands for its repo. A folder in a repo can be another checkpoint.
        path = uri.path_in_repo
        if uri.type != "model" or "/" in path or (path and "." not in path):
            raise UsageError(
                f"{model} is not the address of a model's repo",
                reason="bad_address",
                hint=f"give {uri.id}" if uri.type == "model" else None,
            )
        return Address(uri.id, uri.revision)
    body = model.removeprefix("hf://")
    repo, at, revision = body.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return None
    if repo.endswith(".safetensors") or (at and not revision):
        return None
    return Address(repo, revision or None)


def open_hub(model: str, address: Address) -> Source:
    """Find the shards of a repo: resolve the commit, list the files, probe each shard.

    Shards in the user's cache are read there. In offline mode all of them must be there.

    Raises:
        SourceError: no_such_repo, gated_repo, bad_token, forbidden, no_such_revision, repo_disabled, offline,
            unreachable, timeout, rate_limited, server_error, redirect_loop, bad_response; no_safetensors, no_index.
        BadIndex: bad_index, unsafe_shard_name, missing_shard.
        CheckpointError: changed, file_too_large.
    """
    endpoint = _read_endpoint()
    if constants.is_offline_mode():
        return _open_cached(model, address)
    with explaining(endpoint, address.repo, address.revision):
        repo, files = with_retries(address.repo, lambda: _resolve_revision(endpoint, address))
        where = f"hf://{repo.id}"

        def read_json(name: str) -> Any:
            return parse_json(_read_small(repo, name))

        choice = choose_shards(files, read_json, where)
        config, warnings = read_config(files, read_json, where)
        shards = _open_shards(repo, choice, files)
    return Source(
        model=model,
        name=address.name,
        where=where,
        commit=repo.commit,
        shards=shards,
        weight_map=choice.weight_map,
        config=config,
        warnings=(*warnings, *choice.warnings),
    )


def _resolve_revision(endpoint: str, address: Address) -> tuple[Repo, list[str]]:
    """Ask for the commit of a revision and for its files."""
    api = HfApi(endpoint=endpoint, library_name=_LIBRARY, library_version=VERSION)
    try:
        revision = address.revision or "main"
        info = api.model_info(address.repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if not re.fullmatch("[0-9a-f]{40,64}", info.sha or ""):
            raise ValueError(info.sha)
        files = [sibling.rfilename for sibling in info.siblings or () if isinstance(sibling.rfilename, str)]
    except (HfHubHTTPError, HFValidationError):
        raise
    # The answer may be the login page of a hotel's network, or another API; ModelInfo then raises any of these.
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(
            f"{endpoint} does not answer as the Hub does for {address.repo}",
            reason="bad_response",
            hint="check HF_ENDPOINT, and whether the network asks for a login",
        ) from error
    small = tuple(name for name in (INDEX_FILE, CONFIG_FILE) if name in files)
    return Repo(endpoint, address.repo, str(info.sha), revision, small), files


def _open_shards(repo: Repo, choice: Choice, files: Sequence[str]) -> tuple[Shard, ...]:
    if missing := [name for name in choice.names if name not in set(files)]:
        raise BadIndex(
            f"the index of {repo.id} names {missing[0]}, which is not in the repo ({len(missing)} missing in all)",
            reason="missing_shard",
        )
    if unsafe := [name for name in choice.names if not is_safe_shard_name(name)]:
        raise BadIndex(f"{repo.id} has a shard with an unsafe name: {unsafe[0]!r}", reason="unsafe_shard_name")
    halt = threading.Event()
    with ThreadPoolExecutor(_PROBES_AT_ONCE, "probe") as pool:
        try:
            return tuple(pool.map(lambda name: _open_shard(repo, name, halt), choice.names))
        except BaseException:
            # Without this, the pool would wait for probes that wait for the server.
            halt.set()
            raise


def _open_shard(repo: Repo, name: str, halt: threading.Event) -> Shard:
    cached = _find_in_cache(repo, name)
    if cached is not None:
        return LocalShard.at(name, cached)
    file = repo.file(name)
    head, nbytes, is_ranged = file.probe(PROBE_NBYTES, halt)
    if nbytes is None:
        url = hf_hub_url(repo.id, name, revision=repo.commit, endpoint=repo.endpoint)
        nbytes = with_retries(
            file.where, lambda: get_hf_file_metadata(url, token=get_token(), endpoint=repo.endpoint).size
        )
    if nbytes is None:
        raise BadResponse(f"{repo.endpoint} does not give the size of {name}")
    return HubShard(name=name, nbytes=nbytes, repo=repo, file=file, head=head, is_ranged=is_ranged)


def _read_small(repo: Repo, name: str) -> bytes:
    if (cached := _find_in_cache(repo, name)) is not None:
        check_json_size(cached.stat().st_size, str(cached))
        return cached.read_bytes()
    file = repo.file(name)
    body = file.read_prefix(MAX_JSON_NBYTES + 1)
    check_json_size(len(body), file.where)
    return body


def _find_in_cache(repo: Repo, name: str) -> Path | None:
    path = try_to_load_from_cache(repo.id, name, revision=repo.commit)
    return Path(path) if isinstance(path, str) else None


def _open_cached(model: str, address: Address) -> Source:
    try:
        folder = Path(snapshot_download(address.repo, revision=address.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise explain_offline(address.repo) from error
    return replace(open_local(model, folder), name=address.name, where=f"hf://{address.repo}", commit=folder.name)


def _write_ref(repo: Repo, file: Path) -> None:
    """Write the commit of the revision into the cache, so that offline mode finds it.

    `file` is below models--org--name/snapshots/{commit}; the commit goes to models--org--name/refs/{revision}.
    """
    snapshot = next((p for p in file.parents if p.name == repo.commit), None)
    if repo.revision == repo.commit or snapshot is None:
        return
    ref = snapshot.parents[1] / "refs" / repo.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(repo.commit)


def _read_endpoint() -> str:
    # constants.ENDPOINT was read when huggingface_hub was imported, which a host program may have done long ago.
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
