"""The header of a safetensors file: bytes and a file size to tensors, or to one reason for rejection.

    offset 0      8 bytes   N, the length of the header, an unsigned little-endian integer
    offset 8      N bytes   JSON: {name: {"dtype", "shape", "data_offsets": [begin, end)}, "__metadata__"?}
    offset 8+N              the data: every byte belongs to exactly one tensor

This module is pure, so it serves local and remote files and can be fuzzed. The rules are those of the reference
reader (safetensors 0.8, `tensor.rs`): every file that it rejects is rejected here. Four things differ:

- a tensor that is named twice is rejected; the reference keeps the last one;
- an unknown dtype is accepted, and the plan skips the tensor by name;
- a tensor that is a JSON list instead of an object is rejected;
- the number of tensors, and the lengths of their names and shapes, have limits.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any, NoReturn

from ..errors import BadHeader
from ..files import JsonTooLarge, check_json

PREFIX_NBYTES = 8
MAX_HEADER_NBYTES = 100_000_000
# A tensor of two dimensions has eight values.
MAX_HEADER_VALUES = 5_000_000
# The limit of the headers of all shards together.
MAX_HEADERS_NBYTES = 100_000_000
# The largest published models have about 300,000 tensors, with names of up to 150 characters and 20 components, and
# with up to 5 dimensions.
MAX_TENSORS = 500_000
MAX_NAME_LENGTH = 1000
MAX_COMPONENTS = 64
MAX_DIMENSIONS = 64
# The longest dtype of the format has 11 characters. Messages contain an unknown one.
_MAX_DTYPE_LENGTH = 64
_MAX_USIZE = 2**64 - 1
_FIELDS = ("dtype", "shape", "data_offsets")

# fmt: off
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}
# fmt: on


class HeaderFault(StrEnum):
    """Why a header is rejected."""

    TOO_SHORT = "header_too_short"  # the file ends within the eight bytes of N
    TOO_LARGE = "header_too_large"  # N is above the limit of the format
    PAST_END = "header_past_end"  # N reaches beyond the file
    NOT_UTF8 = "header_not_utf8"
    ABOVE_LIMIT = "header_above_limit"  # too many values of JSON, or too many levels
    NOT_JSON = "header_not_json"
    NOT_AN_OBJECT = "header_not_an_object"
    DUPLICATE = "duplicate_key"
    BAD_METADATA = "bad_metadata"  # __metadata__ is not a map of strings
    TOO_MANY_TENSORS = "too_many_tensors"
    LONG_NAME = "name_too_long"
    TOO_MANY_DIMENSIONS = "too_many_dimensions"
    BAD_TENSOR = "bad_tensor_entry"  # a missing field, or one of the wrong type
    BAD_OFFSETS = "bad_offsets"  # a hole, an overlap, or an end before its beginning
    OVERFLOW = "size_overflow"  # the shape describes more than 2**64 bytes
    MISALIGNED = "size_misaligned"  # a sub-byte dtype that does not end on a byte
    WRONG_SIZE = "size_mismatch"  # shape and dtype do not add up to the bytes claimed
    TRUNCATED = "truncated"  # the file ends within a tensor
    TRAILING = "trailing_bytes"  # bytes that belong to no tensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; its bytes are [start, stop) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a header.

    Attributes:
        tensors: in the order of their bytes.
        metadata: `__metadata__`, free text by key; empty without one.
        nbytes: N, the length of the header.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    nbytes: int


def header_nbytes(prefix: bytes, file_nbytes: int) -> int:
    """Return N, checked against the limit and the file before memory is allocated.

    Raises:
        BadHeader: TOO_SHORT, TOO_LARGE, PAST_END.
    """
    if len(prefix) < PREFIX_NBYTES or file_nbytes < PREFIX_NBYTES:
        _reject(HeaderFault.TOO_SHORT, f"the file is {file_nbytes} bytes long, too short to be safetensors")
    nbytes = int.from_bytes(prefix[:PREFIX_NBYTES], "little")
    if nbytes > MAX_HEADER_NBYTES:
        _reject(HeaderFault.TOO_LARGE, f"the header claims {nbytes} bytes, over the limit of {MAX_HEADER_NBYTES}")
    if PREFIX_NBYTES + nbytes > file_nbytes:
        _reject(HeaderFault.PAST_END, f"the header claims {nbytes} bytes, but the file has {file_nbytes}")
    return nbytes


def parse_header(header: bytes, file_nbytes: int) -> Header:
    """Parse a header.

    Args:
        header: the N bytes after the length prefix.
        file_nbytes: the size of the whole file, 8 + N + data.

    Raises:
        BadHeader: with the first `HeaderFault` found; the rules are checked in the order of its members.
    """
    entries = _load(header)
    metadata = _check_metadata(entries.pop("__metadata__", None))
    if len(entries) > MAX_TENSORS:
        count = f"{len(entries):,} tensors, over the limit of {MAX_TENSORS:,}"
        _reject(HeaderFault.TOO_MANY_TENSORS, f"the header has {count}")
    data_start = PREFIX_NBYTES + len(header)
    tensors = [_tensor(name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=attrgetter("start", "stop"))
    end = data_start
    for tensor in tensors:
        if tensor.start != end or tensor.stop < tensor.start:
            _reject(
                HeaderFault.BAD_OFFSETS,
                f"{tensor.name!r} claims bytes {tensor.start} to {tensor.stop}, expected to start at {end}",
            )
        _check_size(tensor)
        end = tensor.stop
    if end > file_nbytes:
        _reject(HeaderFault.TRUNCATED, f"the file has {file_nbytes} bytes of the {end} that its header describes")
    if end < file_nbytes:
        _reject(HeaderFault.TRAILING, f"the file has {file_nbytes - end} bytes after its last tensor")
    return Header(tuple(tensors), metadata, len(header))


def _reject(fault: HeaderFault, message: str) -> NoReturn:
    raise BadHeader(message, reason=fault)


def _load(header: bytes) -> dict[str, Any]:
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError:
        _reject(HeaderFault.NOT_UTF8, "the header is not UTF-8 text")
    try:
        check_json(header, MAX_HEADER_VALUES)
        entries = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except BadHeader:
        raise
    except JsonTooLarge as error:
        _reject(HeaderFault.ABOVE_LIMIT, f"the header is above a limit: {error}")
    # A header that is not JSON can hide its nesting from the check.
    except (ValueError, RecursionError):
        _reject(HeaderFault.NOT_JSON, "the header is not JSON")
    if not isinstance(entries, dict):
        _reject(HeaderFault.NOT_AN_OBJECT, "the header is not a JSON object")
    return entries


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        # Python's json keeps the last of two equal keys, another reader may keep the first.
        _reject(HeaderFault.DUPLICATE, "the header names the same key twice")
    return result


def _integer(literal: str) -> int | float:
    # The reference reader takes "-0" for a float. 20 digits hold every 64-bit integer.
    return int(literal) if len(literal) <= 20 and literal != "-0" else _float(literal)


def _float(literal: str) -> float:
    value = float(literal)
    return value if math.isfinite(value) else _constant(literal)


def _constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _check_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _reject(HeaderFault.BAD_METADATA, "__metadata__ is not a map from strings to strings")
    return metadata


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME_LENGTH:
        _reject(
            HeaderFault.LONG_NAME,
            f"the name {name[:40]!r}... has {len(name):,} characters, over the limit of {MAX_NAME_LENGTH:,}",
        )
    if name.count(".") >= MAX_COMPONENTS:
        _reject(
            HeaderFault.LONG_NAME,
            f"the name {name[:40]!r}... has {name.count('.') + 1} components, over the limit of {MAX_COMPONENTS}",
        )
    if not isinstance(entry, dict) or any(field not in entry for field in _FIELDS):
        _reject(HeaderFault.BAD_TENSOR, f"{name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype == "":
        # The reader that a scan uses rejects the file for it.
        _reject(HeaderFault.BAD_TENSOR, f"{name!r} has an empty dtype")
    is_dtype = isinstance(dtype, str) and len(dtype) <= _MAX_DTYPE_LENGTH
    if not is_dtype or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        _reject(HeaderFault.BAD_TENSOR, f"{name!r} has a dtype, a shape or data_offsets of the wrong type")
    if len(shape) > MAX_DIMENSIONS:
        _reject(
            HeaderFault.TOO_MANY_DIMENSIONS,
            f"{name!r} has {len(shape):,} dimensions, over the limit of {MAX_DIMENSIONS}",
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        # json.loads accepts a lone surrogate, which would fail much later, when the result is written.
        _reject(HeaderFault.NOT_JSON, "a tensor's name is not Unicode text")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    # isinstance would accept True, and == would accept 2.0.
    return not any([type(size) is not int or not 0 <= size <= _MAX_USIZE for size in value])


def _check_size(tensor: TensorInfo) -> None:
    dtype_bits = DTYPE_BITS.get(tensor.dtype)
    if dtype_bits is None:
        return
    bits = 1
    # This is the order of the reference reader, so both overflow on [2**63, 4, 0] and not on [0, 2**63, 4].
    for factor in (*tensor.shape, dtype_bits):
        bits *= factor
        if bits > _MAX_USIZE:
            _reject(HeaderFault.OVERFLOW, f"{tensor.name!r} has an impossible shape {list(tensor.shape)}")
    if bits % 8:
        _reject(HeaderFault.MISALIGNED, f"{tensor.name!r} does not end on a whole byte")
    if bits // 8 != tensor.nbytes:
        _reject(
            HeaderFault.WRONG_SIZE,
            f"{tensor.name!r} is {tensor.dtype}{list(tensor.shape)}, {bits // 8} bytes, but claims {tensor.nbytes}",
        )
