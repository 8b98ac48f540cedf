"""Find a checkpoint: MODEL is a path or a repo of the Hugging Face Hub. A path that exists wins."""

import re
from pathlib import Path
from urllib.parse import unquote

from ..errors import SourceError, UsageError
from .local import open_local
from .redact import redact, remember_secret
from .source import Halted, LocalShard, RangesIgnored, RemoteShard, Shard, Source

__all__ = ["Halted", "LocalShard", "RangesIgnored", "RemoteShard", "Shard", "Source", "open_source"]

# user:password@host, and in an address of the web also token@host. `org/name@revision`, `hf://name@revision`,
# `host:8000/org/name` and `C:\folder` are others.
_PASSWORD = re.compile(
    r"(?![A-Za-z]:\\)(?:https?:/+(?:[^/:]*:)?|(?:[A-Za-z][\w+.-]*:/+)?[^/:]*:)(?P<password>[^/?#]*)@", re.IGNORECASE
)


def open_source(model: str) -> Source:
    """Find the shards of MODEL.

    This reads the index and the config; for a repo also the first bytes of each shard.

    Args:
        model: a folder, a safetensors file or index, `org/name`, `name` or `org/name/folder` with or without
            `@revision`, `hf://…`, or the address of a page of a repo.

    Raises:
        UsageError: bad_address, MODEL has a user or a password.
        SourceError: no_such_path, no_safetensors, no_index, slices, no_snapshot, unreadable; for a repo also what
            `open_hub` raises.
        BadIndex: bad_index, unsafe_shard_name, missing_shard.
        CheckpointError: not_a_file, file_too_large, unfinished.
    """
    try:
        path = Path(model).expanduser()
        exists = path.exists() or path.is_symlink()
    # `~someone` without such a user is a RuntimeError. The others mean that it is too long for a path, or not one.
    except (OSError, ValueError, RuntimeError):
        exists = False
    if exists:
        return open_local(model, path)
    if (found := _PASSWORD.match(model)) is not None:
        remember_secret(found["password"])
        remember_secret(unquote(found["password"]))
        # It would be shown again in the next command to type.
        raise UsageError(
            "MODEL has a user or a password", reason="bad_address", hint="set HF_TOKEN, or run `hf auth login`"
        )
    # This import takes a third of a second, and a local scan does not need it.
    from .hub import open_hub, parse_address

    address = None if _is_below_a_folder(model) else parse_address(model)
    if address is None:
        raise SourceError(
            f"{redact(model)} is not a folder, a file or the name of a repo on the Hub",
            reason="no_such_path",
            hint="give a path, or org/name",
        )
    try:
        return open_hub(model, address)
    except SourceError as error:
        if "://" in model:
            raise
        if address.path and error.reason in ("no_such_repo", "no_such_path", "unreachable", "offline"):
            # A path with three or more parts is rarely a folder of a repo.
            raise SourceError(
                f"there is no folder or file {model} here, and as a folder of a repo: {error}",
                reason="no_such_path",
                hint=error.hint if error.reason == "no_such_path" else f"for a folder of a repo give hf://{model}",
            ) from error
        # Otherwise a mistyped path would look like a network problem.
        raise SourceError(
            f"there is no folder or file {model} here, and as a repo: {error}", reason=error.reason, hint=error.hint
        ) from error


def _is_below_a_folder(model: str) -> bool:
    """Whether MODEL is a missing path: it begins with a folder that is here, and is longer than a repo's name."""
    first, *others = model.split("/")
    try:
        return "://" not in model and len(others) > 1 and Path(first or "/").is_dir()
    except (OSError, ValueError):
        return False
