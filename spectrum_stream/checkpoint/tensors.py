"""The tensors of a checkpoint: the headers of its shards, checked against its index. Reads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BadHeader, BadIndex
from ..text import listed
from . import Shard, Source
from .header import PREFIX_NBYTES, Header, TensorInfo, header_nbytes, parse_header
from .source import PROBE_NBYTES

_OTHER_FORMATS = {
    b"PK\x03\x04": "it is a zip archive, most likely a PyTorch pickle",
    b"\x80\x02": "it is a Python pickle",
    b"GGUF": "it is a GGUF file",
    b"version https://git-lfs": "it is a Git LFS pointer: run `git lfs pull`",
    b"<!DOCTYPE": "it is an HTML page, most likely an error page saved by a download",
    b"<html": "it is an HTML page, most likely an error page saved by a download",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a checkpoint, in the order of the shards and their bytes.

    Attributes:
        source: where it was opened.
        tensors: (shard, tensor) pairs in file order.
        metadata: the metadata of each shard, by the name of the shard.
        warnings: those of the source, and harmless differences between index and headers.
    """

    source: Source
    tensors: tuple[tuple[Shard, TensorInfo], ...]
    metadata: Mapping[str, Mapping[str, str]]
    warnings: tuple[str, ...]


def read_checkpoint(source: Source) -> Checkpoint:
    """Read the headers of all shards.

    Raises:
        BadHeader: a shard is malformed or truncated; the message names it.
        BadIndex: tensor_missing, the index places a tensor in a shard that lacks it.
    """
    warnings = list(source.warnings)
    tensors: dict[str, tuple[Shard, TensorInfo]] = {}
    unlisted: list[str] = []
    doubled: list[str] = []
    metadata: dict[str, Mapping[str, str]] = {}
    for shard in source.shards:
        header = read_header(shard)
        metadata[shard.name] = header.metadata
        for tensor in header.tensors:
            if source.weight_map is not None:
                owner = source.weight_map.get(tensor.name)
                if owner is None:
                    unlisted.append(tensor.name)
                elif owner != shard.name:
                    doubled.append(tensor.name)
                if owner != shard.name:
                    continue
            tensors[tensor.name] = (shard, tensor)
    if source.weight_map is not None:
        _check_index(source, tensors)
    for what, names in (
        ("tensors that are in a shard but not in the index, ignored", unlisted),
        ("tensors that are also in another shard than the one in the index, ignored there", doubled),
    ):
        if names:
            warnings.append(f"{what}: {listed(names, 5)}")
    return Checkpoint(source, tuple(tensors.values()), metadata, tuple(warnings))


def read_header(shard: Shard) -> Header:
    """Read the header of one shard.

    Raises:
        BadHeader: with the shard's path in the message.
    """
    probe = shard.read(0, PROBE_NBYTES)
    try:
        nbytes = header_nbytes(probe[:PREFIX_NBYTES], shard.nbytes)
        stop = PREFIX_NBYTES + nbytes
        # The header ends at file position N + 8. A comparison with N could lose its last eight bytes.
        header = probe[PREFIX_NBYTES:stop] if stop <= len(probe) else shard.read(PREFIX_NBYTES, stop)
        return parse_header(header, shard.nbytes)
    except BadHeader as error:
        foreign = next((what for start, what in _OTHER_FORMATS.items() if probe.startswith(start)), None)
        raise BadHeader(
            f"{shard.where}: {foreign or error}",
            reason=error.reason,
            hint=None if foreign else "download it again: the shard is damaged or incomplete",
        ) from error


def _check_index(source: Source, tensors: dict[str, tuple[Shard, TensorInfo]]) -> None:
    assert source.weight_map is not None
    if missing := [name for name in source.weight_map if name not in tensors]:
        raise BadIndex(
            f"the index of {source.where} places {missing[0]!r} in {source.weight_map[missing[0]]}, "
            f"which does not hold it ({len(missing)} missing in all)",
            reason="tensor_missing",
            hint="download index and shards again: they are of different versions",
        )
