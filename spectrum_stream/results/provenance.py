"""The provenance of a published result: a separate file, since readers take every key of a result for a module.

    provenance_{slug}.json   the model and its commit, the shards, the version of the program, the names that the
                             result uses, the precisions, and the SHA-256 of the result that it belongs to

It has no path of the machine that scanned. After a scan of a local copy the commit is not known. The SHA-256 of the
shards then identify the weights: the Hub shows the same numbers for the files of a repo.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.header import header_nbytes
from ..errors import BadHeader, ResultError, UsageError
from ..files import open_regular
from ..model.names import slug
from ..text import VERSION
from .atomic import write_atomically
from .record import open_records, record_path

SCHEMA_VERSION = 1
RESULT_PREFIX = "snr_results_"


def provenance_path(result: Path) -> Path:
    """Return the path of the provenance of a result."""
    # The name does not begin with `snr_results_`, so that `snr_results_*.json` matches results only.
    return result.with_name(f"provenance_{result.name.removeprefix(RESULT_PREFIX)}")


def is_provenance(data: Any) -> bool:
    """Whether the content of a JSON file is a provenance."""
    return isinstance(data, dict) and {"schema_version", "result_sha256"} <= data.keys()


def slug_of(result: Path) -> str | None:
    """Return the slug in the name of a result file; None for other names."""
    name = result.name
    is_result = name.startswith(RESULT_PREFIX) and name.endswith(".json")
    return name.removeprefix(RESULT_PREFIX).removesuffix(".json") if is_result else None


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal.

    Raises:
        FileError: not_a_file, unreadable. FileNotFoundError.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_provenance(result: Path, model: str | None = None) -> Path:
    """Write the provenance of a result from its record.

    Args:
        model: the id of the model on the Hub; needed for a local checkpoint, known for a repo.

    Returns:
        The path of the file.

    Raises:
        UsageError: no_model; other_model, the result is named after another model, or the record is of another repo.
        ResultError: no_record, locked, corrupt; changed, the local shards are not the scanned ones; unreadable;
            unwritable.
        FileError: as `sha256`.
    """
    precisions: Counter[str] = Counter()
    degenerate = 0
    with open_records(record_path(result)) as records:
        for record in records.rows:
            if record.precision is not None:
                precisions[record.precision] += 1
            degenerate += record.score is not None and record.score.is_degenerate
    identity = records.identity
    repo = identity["path"].removeprefix("hf://") if identity["path"].startswith("hf://") else None
    name = model or repo
    if name is None:
        raise UsageError(
            "the id of a local checkpoint is not known",
            reason="no_model",
            hint="give it with --model org/name",
        )
    if slug(name) != slug_of(result) or (repo is not None and repo != name):
        raise UsageError(
            f"{result} is not named after {name}", reason="other_model", hint=f"scan the model with --name {name}"
        )
    try:
        data = {
            "schema_version": SCHEMA_VERSION,
            "model": name,
            "commit": identity["commit"],
            "shards": {
                shard: {"nbytes": nbytes, "sha256": _shard_sha256(identity, shard, nbytes)}
                for shard, nbytes in identity["shards"].items()
            },
            "program": f"spectrum_stream {VERSION}",
            "engine": identity["engine"],
            "names": identity["names"],
            "precisions": dict(precisions),
            "degenerate": degenerate,
            "result_sha256": sha256(result),
        }
    except OSError as error:
        raise ResultError(f"{error.filename} cannot be read: {error.strerror}", reason="unreadable") from error
    path = provenance_path(result)
    write_atomically(path, json.dumps(data, indent=4) + "\n")
    return path


def _shard_sha256(identity: Mapping[str, Any], shard: str, nbytes: int) -> str | None:
    if identity["commit"] is not None:
        # The commit identifies the shard, which may not be on this machine.
        return None
    root = Path(identity["path"])
    path = root if root.name == shard and not root.is_dir() else root / shard
    status = path.stat()
    is_scanned = [status.st_mtime_ns, status.st_ino] == identity["versions"].get(shard) and status.st_size == nbytes
    # A record can be untrusted, and it must not cause the SHA-256 of another file to be published.
    if not is_scanned or not _is_shard(path, nbytes):
        raise ResultError(
            f"{path} is not the file that was scanned",
            reason="changed",
            hint="scan the model again before you write its provenance",
        )
    return sha256(path)


def _is_shard(path: Path, nbytes: int) -> bool:
    with open_regular(path) as file:
        begin = file.read(9)
    try:
        header_nbytes(begin[:8], nbytes)
    except BadHeader:
        return False
    return begin[8:] == b"{"
