"""Where bytes come from. MODEL is a path or a repo of the Hugging Face Hub; a path that exists wins."""

from pathlib import Path

from ..errors import SourceError
from .local import open_local
from .source import Halted, LocalShard, RangesIgnored, RemoteShard, Shard, Source

__all__ = ["Halted", "LocalShard", "RangesIgnored", "RemoteShard", "Shard", "Source", "open_source"]


def open_source(model: str) -> Source:
    """Find the shards of MODEL. Reads the index and the config, and of a repo the beginning of each shard.

    Args:
        model: a folder, a `.safetensors` file, `org/name`, `name`, either with `@revision`, `hf://…`, or the
            address of a repo's page.

    Raises:
        SourceError: no_such_path, no_safetensors, no_index, unreadable; for a repo also what `open_hub` raises.
        BadIndex: bad_index, unsafe_shard_name, missing_shard.
        CheckpointError: not_a_file, file_too_large.
    """
    try:
        path = Path(model).expanduser()
        exists = path.exists()
    # RuntimeError: `~someone`, and there is no such user; the others: too long for a path, or not one.
    except (OSError, ValueError, RuntimeError):
        exists = False
    if exists:
        return open_local(model, path)
    # Only now: it takes a third of a second to import, which a local scan need not wait for.
    from .hub import open_hub, parse_address

    address = parse_address(model)
    if address is None:
        raise SourceError(
            f"{model} is neither a folder nor a file, nor the name of a repo on the Hub",
            reason="no_such_path",
            hint="give a path, or org/name",
        )
    try:
        return open_hub(model, address)
    except SourceError as error:
        if "://" in model:
            raise
        # Who mistyped a path should not look for the fault in the network.
        raise SourceError(
            f"there is no folder or file {model} here, and as a repo: {error}", reason=error.reason, hint=error.hint
        ) from error
