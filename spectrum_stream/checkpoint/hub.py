"""A checkpoint in a repo of the Hugging Face Hub, or of a server that speaks its protocol.

The revision is resolved to a commit once, and every later request is for that commit, so a push during a scan
changes nothing. huggingface_hub's environment variables set the token, the server, offline mode and the cache:
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME.
"""

import base64
import functools
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

from huggingface_hub import __version__ as hub_version
from huggingface_hub import (
    constants,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    FileMetadataError,
    HfUriError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import httpx, parse_hf_uri, tqdm, validate_repo_id

from ..errors import BadHeader, BadIndex, CheckpointError, SourceError, UsageError
from ..files import parse_json as parse_answer
from ..files import read_file
from ..text import VERSION, counted, listed, printable
from .client import Scope, check_address, under_huggingface_hub, within
from .formats import explain_files
from .header import PREFIX_NBYTES, header_nbytes
from .hub_errors import BadResponse, NotAgain, TooSlow, explain_offline, explaining
from .index import (
    SMALL_FILES,
    choose_for,
    find_modules,
    is_one_of_several,
    is_safe_path,
    is_safe_shard_name,
    is_safetensors,
    kind_of,
    missing_shards,
    parse_small,
    read_adapter_config,
    read_config,
)
from .local import is_lone_file, open_local
from .ranges import RemoteFile, read_answer, with_retries
from .redact import has_secret, redact, remember_secret
from .source import PROBE_NBYTES, LocalShard, RangesIgnored, Shard, Source
from .tensors import read_header

_LIBRARY = "spectrum-stream"
_PROBES_AT_ONCE = 8
# huggingface_hub itself tries the body of a file five times. These tries are for the requests before it. Only the
# first one may use Xet.
_DOWNLOAD_TRIES = 3
# Xet reports its progress several times a second. After this time without a byte, the file is downloaded without it.
_XET_SILENCE_S = 30.0
_XET_ABORT_S = 5.0
# The largest answers of the API have a few megabytes, for the repos with the most files.
_MAX_API_NBYTES = 50_000_000
# The largest published checkpoints have a few hundred shards.
_MAX_SHARDS = 10_000
_REVISION_NCHARS = 250
# Git allows neither these nor control characters in the name of a branch or tag.
_NOT_IN_REVISIONS = re.compile(r"[\s~^:?*\[\\]|\.\.|@\{|//|/\.|^[./]|[./]$|\.lock(/|$)")
# Without a network, the command fails soon. A running scan can wait for the network to come back.
_CONNECT_TRIES = 2
# Hosts that people copy without `https://`.
_WEB_HOST = re.compile(r"([\w-]+\.)+(com|co|cn|org|net|io|ai)", re.IGNORECASE)
_OTHER_SCHEMES = {
    "modelscope": "download it with `modelscope download`, and give the folder",
    "ms": "download it with `modelscope download`, and give the folder",
    "file": "give the path, without file://",
    "s3": "copy it with `aws s3 cp --recursive`, and give the folder",
    "gs": "copy it with `gcloud storage cp --recursive`, and give the folder",
    "ollama": "give the repo on the Hub that it was made from",
}


@dataclass(frozen=True, slots=True)
class Address:
    """A repo, or a folder or file in it, as a user names it.

    Attributes:
        revision: a branch, a tag or a commit.
        path: the folder or file; "" for the top of the repo.
    """

    repo: str
    revision: str | None = None
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repo:
    """A repo at a commit.

    Attributes:
        revision: the name that was resolved to the commit.
        folder: the folder of the checkpoint in the repo; "" for the top. Names of files are relative to it.
        small: the names of the index and of the configs, if the repo has them.
    """

    endpoint: str
    id: str
    commit: str
    revision: str
    folder: str
    small: tuple[str, ...]

    def path(self, name: str) -> str:
        """Return the path of a file in the repo."""
        return f"{self.folder}/{name}" if self.folder else name

    def url(self, name: str) -> str:
        """Return the address of a file at the commit."""
        return hf_hub_url(self.id, self.path(name), revision=self.commit, endpoint=self.endpoint)

    def file(self, name: str) -> RemoteFile:
        """Return a file of the repo at the commit."""
        return RemoteFile(self.url(name), self.endpoint, self.commit, _make_headers(), f"{self.id}/{self.path(name)}")


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

        watch = _Watch(on_bytes)
        tries = 0

        def attempt(path: str, nbytes: int) -> Path:
            nonlocal tries
            tries += 1
            where = f"{self.repo.id}/{path}"
            scope = Scope.of_hub(where, httpx.URL(self.repo.endpoint), nbytes, self.repo.commit, with_xet=tries == 1)
            return watch.run(functools.partial(_download, self.repo, path, folder, scope, watch.counter), scope)

        with explaining(self.repo.endpoint, self.repo.id, self.repo.commit), under_huggingface_hub():
            try:
                path = with_retries(
                    self.where, lambda: attempt(self.repo.path(self.name), self.nbytes), tries=_DOWNLOAD_TRIES
                )
                # A cached model needs its index and config to be used offline.
                for name in self.repo.small if folder is None else ():
                    if _find_in_cache(self.repo, name) is None:
                        small = functools.partial(attempt, self.repo.path(name), kind_of(name).max_nbytes)
                        with_retries(self.where, small, tries=_DOWNLOAD_TRIES)
            except FileMetadataError as error:
                # huggingface_hub rejects a mirror that does not send the commit with a file, or a hash as its ETag.
                if folder is None:
                    raise SourceError(
                        f"{self.repo.endpoint} does not send the commit (X-Repo-Commit) and the hash (ETag) of the "
                        f"files of {self.repo.id}, which the cache needs",
                        reason="bad_response",
                        hint="use --fetch range or --fetch download",
                    ) from error
                path = folder / PurePosixPath(self.name).name
                self.file.save(path, self.nbytes, on_bytes, ranged=self.is_ranged)
            if folder is None:
                _write_ref(self.repo, path)
        local = LocalShard.at(self.name, path)
        if local.nbytes != self.nbytes or local.read(0, len(self.head)) != self.head:
            raise CheckpointError(f"{self.where} was changed after it was planned", reason="changed")
        return local


class _Watch:
    """A download by huggingface_hub in a separate thread.

    If Xet sends nothing more, the thread is abandoned.

    Attributes:
        counter: the class of progress bars that huggingface_hub reports bytes to.
    """

    def __init__(self, on_bytes: Callable[[int], object]) -> None:
        self._on_bytes = on_bytes
        self._last_byte: float | None = None
        self._stop: BaseException | None = None
        watch = self

        class Counter(tqdm):
            # A disabled tqdm neither draws nor counts, so this class counts.
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]
                watch._last_byte = time.monotonic()

            def update(self, n: float | None = 1) -> None:
                watch._count(int(n or 0))

            def close(self) -> None:
                watch._last_byte = None

        self.counter = Counter

    def run(self, download: Callable[[], Path], scope: Scope) -> Path:
        """Run a download to its end.

        Args:
            scope: its limits. It knows the bytes that come by HTTP; those of Xet are only reported.

        Raises:
            BadResponse: it fails for a reason other than the network; the errors of `on_bytes` and `download`.
        """
        done: list[Path | BaseException] = []

        def work() -> None:
            try:
                done.append(download())
            except BaseException as error:
                done.append(error)

        self._forget()
        thread = threading.Thread(target=work, name="download", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05 if self._last_byte is None else 1.0)
            last_byte_s = max(self._last_byte or 0.0, scope.last_byte_s)
            if self._last_byte is not None and time.monotonic() - last_byte_s > _XET_SILENCE_S:
                _abort_xet()
                thread.join(_XET_ABORT_S)
                if thread.is_alive():
                    raise TooSlow
        if self._stop is not None:
            raise self._stop
        (outcome,) = done
        if isinstance(outcome, Path):
            return outcome
        if isinstance(outcome, NotAgain):
            raise outcome.error
        if isinstance(outcome, LocalEntryNotFoundError):
            # huggingface_hub wraps every failure of the first request in this error. The cause is the real failure.
            raise outcome.__cause__ or outcome from None
        if isinstance(outcome, (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError)):
            # huggingface_hub and hf_xet raise any of these for an answer that they do not expect.
            raise BadResponse(f"the download fails ({type(outcome).__name__})") from outcome
        raise outcome

    def _forget(self) -> None:
        self._last_byte, self._stop = None, None

    def _count(self, nbytes: int) -> None:
        if nbytes:
            self._last_byte = time.monotonic()
        try:
            self._on_bytes(nbytes)
        except BaseException as error:
            self._stop = error
            raise


def _abort_xet() -> None:
    """End a running download by Xet."""
    from huggingface_hub.utils._xet import abort_xet_session

    abort_xet_session()  # type: ignore[no-untyped-call]


def _download(repo: Repo, path: str, folder: Path | None, scope: Scope, counter: type[Any]) -> Path:
    password = _read_password()
    with within(scope):
        return Path(
            hf_hub_download(
                repo.id,
                path,
                revision=repo.commit,
                local_dir=folder,
                endpoint=repo.endpoint,
                library_name=_LIBRARY,
                library_version=VERSION,
                headers=None if password is None else {"authorization": password},
                tqdm_class=counter,
            )
        )


def parse_address(model: str) -> Address | None:
    """Parse MODEL as the name of a repo, or of a folder or file in it; return None if it cannot be one.

    Raises:
        UsageError: bad_address, an address that does not belong to a model on the Hub.
    """
    text = model
    if model.startswith(("datasets/", "spaces/")) and model.count("/") > 1:
        text = f"hf://{model}"
    elif "://" not in model:
        if not _is_web_address(model):
            return _parse_name(model)
        text = f"https://{model}"
    scheme, _, body = text.partition("://")
    if scheme == "hf" and "/" not in body:
        return _parse_name(body)
    if scheme != "hf":
        # A page can have an anchor, `?library=` or `?show_file_info=`.
        text = re.split("[?#]", text, maxsplit=1)[0].rstrip("/")
    try:
        uri = parse_hf_uri(text, endpoint=_read_endpoint())
    except HfUriError:
        raise UsageError(
            f"{redact(model)} is not the address of a repo on {_read_endpoint()}",
            reason="bad_address",
            hint=redact(_advise(text)),
        ) from None
    if uri.type != "model":
        raise UsageError(
            f"{redact(model)} is a {uri.type}, not a model", reason="bad_address", hint="give the repo of a model"
        )
    path, revision = uri.path_in_repo.strip("/"), uri.revision
    if revision is None and "@" in path:
        path, _, revision = path.rpartition("@")
    if path and not is_safe_path(path):
        raise UsageError(f"{redact(model)} is not the address of a folder of {uri.id}", reason="bad_address")
    _check_revision(uri.id, revision)
    return Address(uri.id, revision, path)


def _check_revision(repo: str, revision: str | None) -> None:
    """Check that a text can be a revision, because the cache uses it as a path.

    Raises:
        UsageError: bad_revision.
    """
    if revision is not None and (
        len(revision) > _REVISION_NCHARS or not revision.isprintable() or _NOT_IN_REVISIONS.search(revision)
    ):
        raise UsageError(
            f"{printable(redact(revision[:_REVISION_NCHARS]))} cannot be a revision of {repo}",
            reason="bad_revision",
            hint="give a branch, a tag or a commit",
        )


def _parse_name(name: str) -> Address | None:
    """Parse `org/name`, `name` or `org/name/folder`, each with or without `@revision`.

    Raises:
        UsageError: bad_address.
    """
    name = name.removeprefix("models/") if name.count("/") > 1 else name
    before, at, revision = name.partition("@")
    if (at and not revision) or before.endswith("/"):
        return None
    parts = before.split("/")
    repo, path = "/".join(parts[:2]), "/".join(parts[2:])
    if (tagged := re.fullmatch(r"([\w.-]+/[\w.-]+):([\w.-]+)", repo)) is not None:
        raise UsageError(
            f"{name} is not the name of a repo",
            reason="bad_address",
            hint=f"give {tagged[1]}@{tagged[2]} for the revision {tagged[2]}",
        )
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return None
    # A repo can have such a name, but a missing file is more likely.
    if is_safetensors(repo) or repo.endswith(".json") or (path and not is_safe_path(path)):
        return None
    _check_revision(repo, revision or None)
    return Address(repo, revision or None, path)


def _is_web_address(name: str) -> bool:
    """Whether a name begins with a host, as an address that was copied without `https://`."""
    host, _, rest = name.partition("/")
    return "/" in rest and (
        _WEB_HOST.fullmatch(host) is not None or host == _read_endpoint().partition("://")[2].partition("/")[0]
    )


def _advise(address: str) -> str:
    """Return the hint for an address that is not of the Hub."""
    scheme, _, rest = address.partition("://")
    if scheme not in ("http", "https", "hf"):
        return _OTHER_SCHEMES.get(scheme, "download it, and give the folder; or give org/name for a repo on the Hub")
    host, *parts = rest.split("/") if scheme != "hf" else ("", *rest.split("/"))
    if "modelscope" in host:
        return _OTHER_SCHEMES["modelscope"]
    parts = parts[1:] if parts[:1] == ["models"] else parts
    name = "/".join(parts[:2]) if len(parts) > 1 else "org/name"
    if (tagged := re.fullmatch(r"([\w.-]+/[\w.-]+):([\w.-]+)", name)) is not None:
        return f"give {tagged[1]}@{tagged[2]} for the revision {tagged[2]}"
    if parts[2:3] == ["commit"] and len(parts) > 3:
        return f"give {name}@{parts[3]}"
    if not host or host in constants.HF_URL_HOSTS or host in _read_endpoint():
        return f"give {name}"
    return f"give {name}, and set HF_ENDPOINT={scheme}://{host} if that server speaks the protocol of the Hub"


def open_hub(model: str, address: Address) -> Source:
    """Find the shards of a repo: resolve the commit, list the files, probe each shard.

    Shards in the user's cache are read there. In offline mode all of them must be there.

    Raises:
        SourceError: no_such_repo, gated_repo, bad_token, forbidden, no_such_revision, repo_disabled, offline,
            unreachable, timeout, rate_limited, server_error, redirect_loop, bad_response; no_such_path,
            no_safetensors, no_index.
        BadIndex: bad_index, unsafe_shard_name, missing_shard.
        CheckpointError: changed, file_too_large.
    """
    endpoint = _read_endpoint()
    if constants.is_offline_mode():
        return _open_cached(model, address)
    with explaining(endpoint, address.repo, address.revision):
        commit, every = with_retries(
            address.repo, lambda: _resolve_revision(endpoint, address), connect_tries=_CONNECT_TRIES
        )
        folder, file = _locate(address, every)
        repo = Repo(
            endpoint=endpoint,
            id=address.repo,
            commit=commit,
            revision=address.revision or "main",
            folder=folder,
            small=(),
        )
        files = [f.removeprefix(f"{folder}/") for f in every if not folder or f.startswith(f"{folder}/")]
        where = _write_where(address.repo, folder)

        def read_json(name: str) -> Any:
            return parse_small(_read_small(repo, name), f"{where}/{name}")

        config, quantization_files, warnings = read_config(files, read_json, where)
        adapter_config = read_adapter_config(files, read_json)
        choice = choose_for(file, files, read_json, where, config)
        if choice is None:
            raise explain_files(files if file is None else [file], where)
        if missing := sorted({*choice.names} - {*files}):
            raise missing_shards(where, choice.index, missing, files)
        if unsafe := [name for name in choice.names if not is_safe_shard_name(name)]:
            raise BadIndex(f"{repo.id} has a shard with an unsafe name: {unsafe[0]!r}", reason="unsafe_shard_name")
        is_part = choice.file is not None and is_one_of_several(choice.names[0], files, read_json)
        if is_part:
            warnings.append(f"{file} is one shard of a model: give {where} to score the whole model")
        if choice.file is None:
            warnings += find_modules(files, read_json)
        repo = replace(repo, small=tuple(name for name in files if name in (*SMALL_FILES, choice.index)))
        shards = _open_shards(repo, choice.names)
        unlisted = _open_shards(repo, [name for name in choice.unlisted if is_safe_shard_name(name)], check=False)
    path = repo.path(choice.file) if choice.file is not None else folder
    return Source(
        model=redact(model),
        name=_write_name(address, path),
        where=_write_where(address.repo, path),
        commit=repo.commit,
        shards=shards,
        weight_map=choice.weight_map,
        config=config,
        quantization_files=quantization_files,
        is_part=is_part,
        adapter_config=adapter_config,
        ignored=choice.ignored,
        unlisted=unlisted,
        other_index=None if choice.other_index is None else f"{where}/{choice.other_index}",
        warnings=(*warnings, *choice.warnings),
    )


def _resolve_revision(endpoint: str, address: Address) -> tuple[str, list[str]]:
    """Ask for the commit of a revision and for its files.

    Raises:
        SourceError: bad_response; CheckpointError: file_too_large; as `read_answer`.
    """
    revision = address.revision or "main"
    url = f"{endpoint}/api/models/{address.repo}/revision/{quote(revision, safe='')}"
    body = read_answer(url, endpoint, _make_headers(), address.repo, _MAX_API_NBYTES)
    try:
        answer = parse_answer(body)
    except ValueError:
        answer = None
    fault = "repeats the token in its answer" if has_secret(body) else _find_fault(answer, revision)
    # The answer may be the login page of a network, or come from another API.
    if fault is not None:
        raise SourceError(
            f"{endpoint} {fault} for {address.repo}",
            reason="bad_response",
            hint="check HF_ENDPOINT, and whether the network asks for a login",
        )
    names = [file.get("rfilename") for file in answer["siblings"] if isinstance(file, dict)]
    return answer["sha"], [name for name in names if isinstance(name, str)]


def _find_fault(answer: Any, revision: str) -> str | None:
    """Return the fault of an answer about a revision, or None."""
    if not isinstance(answer, dict):
        return "does not answer as the Hub does"
    commit = answer.get("sha")
    if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40,64}", commit):
        return "does not send the commit (sha)"
    if not isinstance(answer.get("siblings"), list):
        return "does not send the list of files (siblings)"
    if re.fullmatch("[0-9a-f]{40}", revision) and commit != revision:
        return f"answers with another commit, {commit},"
    return None


def _locate(address: Address, files: Sequence[str]) -> tuple[str, str | None]:
    """Return the folder that an address names, and the file in it or None.

    Raises:
        SourceError: no_such_path.
    """
    path = address.path
    if path in files:
        folder, _, name = path.rpartition("/")
        return folder, name
    if not path or any(f.startswith(f"{path}/") for f in files):
        return path, None
    folders = sorted({f.rpartition("/")[0] for f in files if is_safetensors(f)})
    places = [f"{_write_where(address.repo, folder)}" for folder in folders]
    raise SourceError(
        f"{_write_where(address.repo, '')} has no folder or file {path}",
        reason="no_such_path",
        hint=f"its weights are in {listed(places, 6)}" if places else None,
    )


def _write_where(repo: str, path: str) -> str:
    return f"hf://{repo}/{path}" if path else f"hf://{repo}"


def _write_name(address: Address, path: str) -> str:
    """Return the name in file names: Spectrum's, with the folder, and with the revision if it is not main."""
    name = f"{address.repo}/{path}" if path else address.repo
    return name if address.revision in (None, "main") else f"{name}@{address.revision}"


def _open_shards(repo: Repo, names: Sequence[str], *, check: bool = True) -> tuple[Shard, ...]:
    """Probe each shard, and check that it begins like safetensors.

    Raises:
        BadIndex: too_many_shards; BadHeader: a shard does not begin like safetensors.
    """
    if len(names) > _MAX_SHARDS:
        raise BadIndex(
            f"{repo.id} has {counted(len(names), 'shard', 'shards')}, and the limit is {_MAX_SHARDS}",
            reason="too_many_shards",
        )
    halt = threading.Event()
    with ThreadPoolExecutor(_PROBES_AT_ONCE, "probe") as pool:
        try:
            return tuple(pool.map(lambda name: _open_shard(repo, name, halt, check), names))
        except BaseException:
            # Without this, the pool would wait for probes that wait for the server.
            halt.set()
            raise


def _open_shard(repo: Repo, name: str, halt: threading.Event, check: bool) -> Shard:
    cached = _find_in_cache(repo, name)
    if cached is not None:
        return LocalShard.at(name, cached)
    file = repo.file(name)
    head, nbytes, is_ranged = file.probe(PROBE_NBYTES, halt)
    if nbytes is None:
        nbytes = file.ask_size()
    if nbytes is None:
        raise BadResponse(f"{repo.endpoint} does not give the size of {name}")
    shard = HubShard(name=name, nbytes=nbytes, repo=repo, file=file, head=head, is_ranged=is_ranged)
    if check:
        try:
            header_nbytes(head[:PREFIX_NBYTES], nbytes)
        except BadHeader:
            # This shard is rejected at once, with the name of its format, before thousands of others are probed.
            read_header(shard)
    return shard


def _read_small(repo: Repo, name: str) -> bytes:
    kind = kind_of(name)
    if (cached := _find_in_cache(repo, name)) is not None:
        return read_file(cached, kind)
    file = repo.file(name)
    body = file.read_prefix(kind.max_nbytes + 1)
    kind.check_size(len(body), file.where)
    if has_secret(body):
        raise SourceError(f"{repo.endpoint} repeats the token in {file.where}", reason="bad_response")
    return body


def _find_in_cache(repo: Repo, name: str) -> Path | None:
    path = try_to_load_from_cache(repo.id, repo.path(name), revision=repo.commit)
    return Path(path) if isinstance(path, str) else None


def _open_cached(model: str, address: Address) -> Source:
    try:
        root = Path(snapshot_download(address.repo, revision=address.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise explain_offline(address.repo) from error
    path = root / address.path
    # The name of the snapshot comes from a file in the cache.
    if root.parent.name != "snapshots" or not re.fullmatch("[0-9a-f]{40,64}", root.name):
        raise explain_offline(address.repo)
    if not path.exists():
        raise explain_offline(f"{address.repo}/{address.path}")
    if path.is_file() and not is_lone_file(path):
        path = path.parent
    inside = "" if path == root else path.relative_to(root).as_posix()
    return replace(
        open_local(model, path),
        name=_write_name(address, inside),
        where=_write_where(address.repo, inside),
        commit=root.name,
    )


def _write_ref(repo: Repo, file: Path) -> None:
    """Write the commit of the revision into the cache, so that offline mode finds it.

    `file` is below models--org--name/snapshots/{commit}; the commit goes to models--org--name/refs/{revision}.
    """
    snapshot = next((p for p in file.parents if p.name == repo.commit), None)
    if repo.revision == repo.commit or snapshot is None:
        return
    ref = snapshot.parents[1] / "refs" / repo.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    # This writes a new file, so that nothing is written through a link.
    with tempfile.NamedTemporaryFile("w", dir=ref.parent, suffix=".tmp", delete=False) as new:
        new.write(repo.commit)
    Path(new.name).replace(ref)


def _read_endpoint() -> str:
    """Return the address of the server, without a password.

    Raises:
        UsageError: bad_endpoint. The message does not repeat the address, because it may hold a password.
    """
    return _split_endpoint()[0]


def _read_password() -> str | None:
    """Return the header for the user and password in HF_ENDPOINT, or None."""
    return _split_endpoint()[1]


def _split_endpoint() -> tuple[str, str | None]:
    # constants.ENDPOINT was read when huggingface_hub was imported, which a host program may have done long ago.
    text = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).strip().rstrip("/")
    header = None
    if (found := re.fullmatch(r"(https?://)([^/?#]*)@(.*)", text, re.DOTALL | re.IGNORECASE)) is not None:
        user, _, password = map(unquote, found[2].partition(":"))
        pair = f"{user}:{password}"
        for secret in (pair, found[2], password or user):
            remember_secret(secret)
        header = f"Basic {base64.b64encode(pair.encode()).decode()}"
        text = found[1] + found[3]
    try:
        url = httpx.URL(text)
        fault = check_address(url)
    # Host names can raise errors of several libraries.
    except Exception:
        fault = "is not valid"
    if fault is None and (not text.isprintable() or " " in text or set(text) & set("?#\\")):
        fault = "has characters that are not allowed"
    if fault is not None:
        raise UsageError(
            f"the address in HF_ENDPOINT {fault}",
            reason="bad_endpoint",
            hint="e.g. HF_ENDPOINT=https://huggingface.co",
        )
    return text, header


def _make_headers() -> dict[str, str]:
    """Return the headers of a request to the server, with the token.

    Raises:
        UsageError: bad_token. An error of the HTTP library would contain the token.
    """
    if (token := get_token()) is not None:
        remember_secret(token)
        if not re.fullmatch(r"[!-~]{1,4096}", token):
            raise UsageError(
                "the token has characters that a token cannot have",
                reason="bad_token",
                hint="set HF_TOKEN again, or run `hf auth login`",
            )
    # `build_hf_headers` would send a request of its own, without limits.
    headers = {"user-agent": f"{_LIBRARY}/{VERSION}; hf_hub/{hub_version}; python/{platform.python_version()}"}
    if token is not None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        headers["authorization"] = f"Bearer {token}"
    password = _read_password()
    return headers if password is None else headers | {"authorization": password}
