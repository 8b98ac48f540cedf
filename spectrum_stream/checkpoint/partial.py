"""Files that hold only a part of each weight: slices of tensors by rank, and unfinished downloads.

Nothing in a tensor shows that it is half of a matrix, so such files are recognized by their names, by the metadata of
a shard and by config.json. A score of them would be wrong without a word, so they are rejected.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import CheckpointError, SourceError
from ..files import parse_json
from ..text import listed


class _Slices(NamedTuple):
    """A program that saves slices, by the names of its files without the suffix."""

    name: re.Pattern[str]
    program: str
    hint: str


_ORIGINAL = "scan the checkpoint that they were made from"
_CONSOLIDATE = (
    "join them with `torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files`, and "
    "scan the result"
)
_RANK = re.compile(r"rank[-_]?\d+", re.IGNORECASE)
_BY_NAME = (
    # vLLM, ShardedStateLoader.DEFAULT_PATTERN
    _Slices(re.compile(r"model-rank-\d+-part-\d+"), "vLLM", _ORIGINAL),
    # DeepSeek-V3, inference/convert.py; one rank has the whole matrices.
    _Slices(re.compile(r"model\d+-mp(?!1$)\d+"), "DeepSeek's inference code", _ORIGINAL),
    # torch 2.13, distributed/checkpoint/_hf_utils.py
    _Slices(re.compile(r"shard-\d+-model-\d+-of-\d+"), "torch.distributed.checkpoint", _CONSOLIDATE),
)
_RANKS = _Slices(_RANK, "TensorRT-LLM", _ORIGINAL)
_DCP = "DCP_SHARDING_INFO"
# Programs that write to the final name at once keep the state of an unfinished download in a file of these names.
_STATE = (".aria2", ".st")
UNFINISHED = (".aria2", ".part", ".partial", ".crdownload", ".download", ".incomplete", ".!qb")


def find_slices(files: Iterable[str], where: str, config: Mapping[str, Any] | None = None) -> SourceError | None:
    """Return the error for files that hold slices of tensors, by their names; None for other files.

    Args:
        files: the shards of a checkpoint, or all safetensors files of a folder that has no checkpoint.
        where: the folder, file or repo, for the message.
        config: config.json; that of TensorRT-LLM states how many ranks there are.
    """
    stems = sorted(file.rpartition("/")[2].rpartition(".")[0] for file in files)
    kind = next((kind for kind in _BY_NAME if any(kind.name.fullmatch(stem) for stem in stems)), None)
    ranks = [stem for stem in stems if _RANK.fullmatch(stem)]
    if kind is None and ranks and (len(ranks) > 1 or _rank_count(config) > 1):
        kind = _RANKS
    if kind is None:
        return None
    found = [stem for stem in stems if kind.name.fullmatch(stem)]
    return SourceError(
        f"{where} holds slices of the matrices, not whole ones, as {kind.program} saves them for several devices: "
        f"{listed(found)}",
        reason="slices",
        hint=kind.hint,
    )


def check_slices(where: str, metadata: Iterable[Mapping[str, str]]) -> None:
    """Check the metadata of the shards for tensors that are slices.

    Raises:
        SourceError: slices.
    """
    for data in metadata:
        try:
            info = parse_json(data.get(_DCP, "{}"))
        except ValueError:
            info = None
        parts = info.values() if isinstance(info, dict) else [None]
        if not all(isinstance(part, dict) and _is_at_start(part) for part in parts):
            raise SourceError(
                f"{where} holds slices of the matrices, not whole ones, according to {_DCP} in its metadata",
                reason="slices",
                hint=_CONSOLIDATE,
            )


def check_finished(files: Sequence[str], shards: Iterable[str], where: str) -> None:
    """Check that no shard is a download that still runs or was interrupted.

    Raises:
        CheckpointError: unfinished.
    """
    for shard in shards:
        for suffix in _STATE:
            if (state := f"{shard}{suffix}") in files:
                raise CheckpointError(
                    f"{where}/{shard} is an unfinished download: {state} lies beside it",
                    reason="unfinished",
                    hint=f"continue the download, or delete {state} if you know that {shard} is complete",
                )


def find_unfinished(files: Iterable[str]) -> list[str]:
    """Return the files that are unfinished downloads by their names."""
    return [file for file in files if file.lower().endswith(UNFINISHED)]


def hint_unfinished(file: str) -> str:
    """Return how to continue an unfinished download."""
    download = "`hf download`" if file.endswith(".incomplete") else "download"
    return f"run the same {download} again; it continues"


def _rank_count(config: Mapping[str, Any] | None) -> int:
    """Return the number of ranks by the config of TensorRT-LLM, or 1."""
    mapping = (config or {}).get("mapping")
    if not isinstance(mapping, Mapping):
        return 1
    return max([1, *(n for key in ("world_size", "tp_size", "pp_size") if type(n := mapping.get(key)) is int)])


def _is_at_start(part: Mapping[str, Any]) -> bool:
    offsets = part.get("saved_offsets", ())
    return isinstance(offsets, (list, tuple)) and not any(offsets)
