"""The tensors of a checkpoint: the headers of its shards, checked against its index. Reads no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import BadHeader, CheckpointError, FileError, SourceError
from ..text import counted, listed, printable, si_bytes
from . import LocalShard, Shard, Source
from .adapters import base_of, find_adapter
from .formats import describe_bytes
from .header import (
    MAX_HEADERS_NBYTES,
    MAX_TENSORS,
    PREFIX_NBYTES,
    Header,
    HeaderFault,
    TensorInfo,
    header_nbytes,
    parse_header,
)
from .partial import check_slices, find_slices
from .source import PROBE_NBYTES

# For a warning, the headers of at most this many shards that the index does not list are read.
_MAX_DESCRIBED = 5


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a checkpoint, in the order of the shards and their bytes.

    Attributes:
        source: where it was opened.
        tensors: (shard, tensor) pairs in file order.
        metadata: the metadata of each shard, by the name of the shard.
        adapter: the names of the tensors of an adapter, which are not among `tensors`.
        warnings: those of the source, and harmless differences between index and headers.
    """

    source: Source
    tensors: tuple[tuple[Shard, TensorInfo], ...]
    metadata: Mapping[str, Mapping[str, str]]
    warnings: tuple[str, ...]
    adapter: tuple[str, ...] = ()


def read_checkpoint(source: Source) -> Checkpoint:
    """Read the headers of all shards.

    As in transformers, every tensor of each shard counts, whether the index lists it or not, and the last of two
    tensors with one name (`modeling_utils.py`, `_load_pretrained_model`, version 5.24).

    Raises:
        SourceError: slices, the shards hold slices of the matrices.
        BadHeader: a shard is malformed or truncated; the message names it.
        CheckpointError: adapter, there are no weights but those of an adapter; empty_weights, all tensors are empty
            and another copy is there; too_many_tensors or headers_too_large, in all shards together.
    """
    if (slices := find_slices([shard.name for shard in source.shards], source.where, source.config)) is not None:
        raise slices
    warnings = list(source.warnings)
    tensors: dict[str, tuple[Shard, TensorInfo]] = {}
    doubled: dict[str, str] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    headers_nbytes = 0
    for shard in source.shards:
        header = read_header(shard)
        headers_nbytes += header.nbytes
        _check_limits(source, len(tensors) + len(header.tensors), headers_nbytes)
        metadata[shard.name] = header.metadata
        for tensor in header.tensors:
            # The place of the last one keeps the order of the file.
            if (earlier := tensors.pop(tensor.name, None)) is not None:
                doubled[tensor.name] = f"{tensor.name} (in {earlier[0].name} and {shard.name})"
            tensors[tensor.name] = (shard, tensor)
    check_slices(source.where, metadata.values())
    if doubled:
        warnings.append(
            f"{counted(len(doubled), 'tensor is', 'tensors are')} in two shards; the last one is read, as in "
            f"transformers: {listed(list(doubled.values()))}"
        )
    if source.weight_map is not None:
        warnings += _compare_with_index(source.weight_map, tensors)
        warnings += [_describe_unlisted(shard, tensors) for shard in source.unlisted[:_MAX_DESCRIBED]]
        if more := len(source.unlisted[_MAX_DESCRIBED:]):
            warnings.append(f"the index does not list {more} other shards, which belong to it by their numbers")
    _check_not_empty(source, [tensor for _, tensor in tensors.values()])
    left_out = _check_adapter(source, tensors, metadata)
    if left_out:
        warnings.append(
            f"{counted(len(left_out), 'tensor', 'tensors')} of an adapter beside the weights, ignored as in "
            f"transformers: the scores are for the weights without the adapter ({listed(sorted(left_out))})"
        )
    kept = tuple(pair for name, pair in tensors.items() if name not in left_out)
    return Checkpoint(source, kept, metadata, tuple(warnings), tuple(sorted(left_out)))


def _check_limits(source: Source, tensors: int, headers_nbytes: int) -> None:
    """Check the size of a checkpoint after each of its headers.

    Raises:
        CheckpointError: too_many_tensors, headers_too_large.
    """
    if tensors > MAX_TENSORS:
        raise CheckpointError(
            f"{source.where} has more than {MAX_TENSORS:,} tensors, the limit for a checkpoint",
            reason="too_many_tensors",
        )
    if headers_nbytes > MAX_HEADERS_NBYTES:
        raise CheckpointError(
            f"the headers of {source.where} have more than {si_bytes(MAX_HEADERS_NBYTES)} together, the limit",
            reason="headers_too_large",
        )


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
        foreign = describe_bytes(probe, shard.nbytes)
        if foreign is None:
            # The length is impossible and no JSON follows it, so this is not a header.
            is_absurd = error.reason in (HeaderFault.TOO_LARGE, HeaderFault.PAST_END)
            if is_absurd and probe[PREFIX_NBYTES : PREFIX_NBYTES + 1] != b"{":
                raise BadHeader(
                    f"{shard.where} is not a safetensors file, or its start is damaged: {error}",
                    reason=error.reason,
                    hint="download it again, or check the format of the file",
                ) from error
            raise BadHeader(
                f"{shard.where}: {error}",
                reason=error.reason,
                hint="download it again: the shard is damaged or incomplete",
            ) from error
        hint = foreign.hint
        if foreign.is_pointer and not isinstance(shard, LocalShard):
            hint = "the server has the pointer only: use another server (HF_ENDPOINT), or tell the owner of the repo"
        raise BadHeader(f"{shard.where} {foreign.what}", reason=error.reason, hint=hint) from error


def _compare_with_index(weight_map: Mapping[str, str], tensors: Mapping[str, tuple[Shard, TensorInfo]]) -> list[str]:
    """Return a sentence for each way in which the index and the shards disagree."""
    unlisted = [name for name in tensors if name not in weight_map]
    missing = [name for name in weight_map if name not in tensors]
    moved = [name for name, (shard, _) in tensors.items() if weight_map.get(name, shard.name) != shard.name]
    return [
        f"{what}: {listed([printable(name) for name in names], 5)} ({len(names)} in all)"
        for what, names in (
            ("the shards hold tensors that the index does not list, and they are read", unlisted),
            ("the index lists tensors that no shard holds, ignored", missing),
            ("the index lists tensors in another shard than the one that is read", moved),
        )
        if names
    ]


def _describe_unlisted(shard: Shard, tensors: Mapping[str, object]) -> str:
    """Return a sentence for a shard that belongs to the others by its number, and that the index does not list."""
    start = f"the index does not list {printable(shard.name)}, which is one of its shards by its number"
    try:
        names = [tensor.name for tensor in read_header(shard).tensors if tensor.name not in tensors]
    except (BadHeader, FileError, SourceError):
        return f"{start} and cannot be read"
    return (
        f"{start}: {counted(len(names), 'tensor', 'tensors')} that no other shard holds "
        f"{'is' if len(names) == 1 else 'are'} left out, as in transformers"
        + (f" ({listed([printable(name) for name in names])})" if names else "")
    )


def _check_not_empty(source: Source, tensors: Sequence[TensorInfo]) -> None:
    """Check that a file is not the stub that a sharded run saves beside the shards with the weights.

    Raises:
        CheckpointError: empty_weights.
    """
    if source.ignored and tensors and not any(tensor.nbytes for tensor in tensors):
        beside = listed(source.ignored, 4)
        raise CheckpointError(
            f"{source.shards[0].where} holds only empty tensors, as a sharded run saves them if it does not gather "
            f"the weights; {beside} {'lies' if len(source.ignored) == 1 else 'lie'} beside it",
            reason="empty_weights",
            hint=source.other_copy,
        )


def _check_adapter(
    source: Source,
    tensors: Mapping[str, tuple[Shard, TensorInfo]],
    metadata: Mapping[str, Mapping[str, str]],
) -> frozenset[str]:
    """Return the names of an adapter's tensors that lie beside weights.

    Raises:
        CheckpointError: adapter.
    """
    adapter = find_adapter(list(tensors), source.shards[0].name, source.adapter_config)
    if adapter is None or not adapter.is_alone:
        return frozenset() if adapter is None else adapter.names
    base = base_of(source.adapter_config, metadata.values())
    for_base = "" if base is None else f" for {base}"
    scan_base = f"scan {base_of(source.adapter_config, ()) or 'its base model'}"
    raise CheckpointError(
        f"{source.where} is an adapter ({adapter.kind}){for_base}, not a model: "
        f"{len(adapter.names)} of {counted(len(tensors), 'tensor belongs', 'tensors belong')} to it",
        reason="adapter",
        hint=f"{scan_base}, or merge the adapter into it (PEFT: `merge_and_unload()`) and scan the result",
    )
