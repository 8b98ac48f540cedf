"""Parse literal bytes to one reason for rejection, and compare every row with the reference reader."""

import json
import tracemalloc
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrum_stream.checkpoint.header import (
    DTYPE_BITS,
    MAX_COMPONENTS,
    MAX_DIMENSIONS,
    MAX_HEADER_NBYTES,
    MAX_HEADER_VALUES,
    MAX_NAME_LENGTH,
    MAX_TENSORS,
    HeaderFault,
    TensorInfo,
    header_nbytes,
    parse_header,
)
from spectrum_stream.errors import BadHeader


def file_of(header: bytes | str | dict[str, Any], data: bytes = b"", *, claim: int | None = None) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if claim is None else claim).to_bytes(8, "little") + raw + data


def read(file: bytes) -> list[TensorInfo]:
    nbytes = header_nbytes(file[:8], len(file))
    return list(parse_header(file[8 : 8 + nbytes], len(file)).tensors)


def reference_accepts(file: bytes) -> bool:
    try:
        safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return False
    return True


def f32(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


ONE = f32(0, 4, 1)
WORD = b"\0" * 4

REFUSED = [
    pytest.param(b"", HeaderFault.TOO_SHORT, id="empty file"),
    pytest.param(b"\0" * 7, HeaderFault.TOO_SHORT, id="seven bytes"),
    pytest.param(file_of("{}", claim=MAX_HEADER_NBYTES + 1), HeaderFault.TOO_LARGE, id="length over the limit"),
    pytest.param(b"\xff" * 8 + b"{}", HeaderFault.TOO_LARGE, id="length of 2**64 - 1"),
    pytest.param(file_of("{}", claim=3), HeaderFault.PAST_END, id="length past the end by one"),
    pytest.param(file_of(b"\xff\xfe{}"), HeaderFault.NOT_UTF8, id="not UTF-8"),
    pytest.param(file_of(b'{"\xff":0}'), HeaderFault.NOT_UTF8, id="name not UTF-8"),
    pytest.param(file_of(""), HeaderFault.NOT_JSON, id="header of no bytes"),
    pytest.param(file_of("{"), HeaderFault.NOT_JSON, id="cut JSON"),
    pytest.param(file_of(b"\xef\xbb\xbf{}"), HeaderFault.NOT_JSON, id="byte order mark"),
    pytest.param(file_of('{"a": NaN}'), HeaderFault.NOT_JSON, id="NaN"),
    pytest.param(file_of('{"a": 1e999}'), HeaderFault.NOT_JSON, id="number out of range"),
    pytest.param(file_of("[" * 100_000), HeaderFault.NOT_JSON, id="nested beyond the stack"),
    pytest.param(file_of('{"a": ' + "9" * 5000 + "}"), HeaderFault.NOT_JSON, id="integer of 5,000 digits"),
    pytest.param(
        file_of('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', WORD),
        HeaderFault.NOT_JSON,
        id="surrogate",
    ),
    pytest.param(file_of("[]"), HeaderFault.NOT_AN_OBJECT, id="list"),
    pytest.param(file_of("null"), HeaderFault.NOT_AN_OBJECT, id="null"),
    pytest.param(file_of('{"__metadata__":{},"__metadata__":{}}'), HeaderFault.DUPLICATE, id="metadata twice"),
    pytest.param(
        file_of('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', WORD),
        HeaderFault.DUPLICATE,
        id="field twice",
    ),
    pytest.param(file_of({"__metadata__": {"a": 1}}), HeaderFault.BAD_METADATA, id="metadata of numbers"),
    pytest.param(file_of({"__metadata__": []}), HeaderFault.BAD_METADATA, id="metadata a list"),
    pytest.param(file_of({"__metadata__": ONE}, WORD), HeaderFault.BAD_METADATA, id="metadata a tensor"),
    pytest.param(file_of({"a": 1}), HeaderFault.BAD_TENSOR, id="tensor a number"),
    pytest.param(file_of({"a": {"dtype": "F32", "shape": [1]}}, WORD), HeaderFault.BAD_TENSOR, id="no offsets"),
    pytest.param(file_of({"a": {**ONE, "dtype": None}}, WORD), HeaderFault.BAD_TENSOR, id="dtype null"),
    pytest.param(file_of({"a": {**ONE, "shape": 1}}, WORD), HeaderFault.BAD_TENSOR, id="shape a number"),
    pytest.param(file_of({"a": {**ONE, "shape": [1.0]}}, WORD), HeaderFault.BAD_TENSOR, id="shape a float"),
    pytest.param(file_of({"a": {**ONE, "shape": [True]}}, WORD), HeaderFault.BAD_TENSOR, id="shape true"),
    pytest.param(file_of({"a": {**ONE, "shape": [-1]}}, WORD), HeaderFault.BAD_TENSOR, id="shape negative"),
    pytest.param(file_of({"a": f32(0, 0, 0, 2**64)}), HeaderFault.BAD_TENSOR, id="dimension of 2**64"),
    pytest.param(
        file_of({"a": {**ONE, "data_offsets": [0, 4, 4]}}, WORD), HeaderFault.BAD_TENSOR, id="three offsets"
    ),
    pytest.param(
        file_of({"a": {**ONE, "data_offsets": [-4, 0]}}, WORD), HeaderFault.BAD_TENSOR, id="negative offset"
    ),
    pytest.param(
        file_of('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', WORD),
        HeaderFault.BAD_TENSOR,
        id="minus zero",
    ),
    pytest.param(file_of({"a": {**ONE, "dtype": "F" * 65}}, WORD), HeaderFault.BAD_TENSOR, id="dtype of 65 letters"),
    pytest.param(file_of({"a": f32(4, 8, 1)}, WORD * 2), HeaderFault.BAD_OFFSETS, id="hole at the start"),
    pytest.param(file_of({"a": ONE, "b": f32(8, 12, 1)}, WORD * 3), HeaderFault.BAD_OFFSETS, id="hole between"),
    pytest.param(file_of({"a": ONE, "b": ONE}, WORD), HeaderFault.BAD_OFFSETS, id="two names for one range"),
    pytest.param(file_of({"a": f32(0, 8, 2), "b": f32(4, 12, 2)}, WORD * 3), HeaderFault.BAD_OFFSETS, id="overlap"),
    pytest.param(file_of({"a": f32(4, 0, 1)}, WORD), HeaderFault.BAD_OFFSETS, id="reversed"),
    pytest.param(file_of({"a": f32(0, 0, 2**63, 4, 0)}), HeaderFault.OVERFLOW, id="shape overflows"),
    pytest.param(file_of({"a": f32(0, 0, 2**62)}), HeaderFault.OVERFLOW, id="bits overflow to zero modulo 2**64"),
    pytest.param(
        file_of({"a": {"dtype": "F4", "shape": [7], "data_offsets": [0, 4]}}, WORD),
        HeaderFault.MISALIGNED,
        id="half byte",
    ),
    pytest.param(file_of({"a": f32(0, 4, 2)}, WORD), HeaderFault.WRONG_SIZE, id="shape too large"),
    pytest.param(file_of({"a": f32(0, 8, 1)}, WORD * 2), HeaderFault.WRONG_SIZE, id="shape too small"),
    pytest.param(file_of({"a": f32(0, 8, 2)}, WORD), HeaderFault.TRUNCATED, id="data cut short"),
    pytest.param(file_of({"a": ONE}, WORD + b"\0"), HeaderFault.TRAILING, id="a byte after the data"),
    pytest.param(file_of("{}", b"PK\x03\x04"), HeaderFault.TRAILING, id="another file appended"),
]

ACCEPTED = [
    pytest.param(file_of("{}"), 0, id="no tensors"),
    pytest.param(file_of({"a": ONE}, WORD), 1, id="one"),
    pytest.param(file_of({"a": ONE, "__metadata__": {"format": "pt"}}, WORD), 1, id="metadata"),
    pytest.param(file_of({"a": ONE, "__metadata__": None}, WORD), 1, id="metadata null"),
    pytest.param(file_of(" \n" + json.dumps({"a": ONE}) + " \t  ", WORD), 1, id="white space on both sides"),
    pytest.param(file_of({"b": f32(4, 8, 1), "a": ONE}, WORD * 2), 2, id="not in order"),
    pytest.param(file_of({"a": f32(0, 4)}, WORD), 1, id="scalar"),
    pytest.param(file_of({"a": f32(0, 0, 0)}), 1, id="empty"),
    pytest.param(file_of({"a": f32(0, 0, 0, 2**63, 4)}), 1, id="empty by its first dimension"),
    pytest.param(file_of({"a": ONE, "b": f32(4, 4, 0), "c": f32(0, 0, 0)}, WORD), 3, id="empty ones between"),
    pytest.param(file_of({"a": {**ONE, "extra": [1, 2.5]}}, WORD), 1, id="a field more"),
    pytest.param(file_of({"": ONE}, WORD), 1, id="no name"),
    pytest.param(file_of({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, WORD), 1, id="four bits each"),
]


@pytest.mark.parametrize(("file", "fault"), REFUSED)
def test_parse_header_rejects_each_fault_with_its_reason(file: bytes, fault: HeaderFault) -> None:
    with pytest.raises(BadHeader) as refused:
        read(file)
    assert refused.value.reason == fault
    assert not reference_accepts(file)


@pytest.mark.parametrize(("file", "count"), ACCEPTED)
def test_parse_header_accepts_odd_but_valid_headers(file: bytes, count: int) -> None:
    assert len(read(file)) == count
    assert reference_accepts(file)


# The reference has no limits.
EMPTY = f32(0, 0, 0)
ABOVE_LIMITS = [
    pytest.param({f"t{i}": EMPTY for i in range(MAX_TENSORS + 1)}, HeaderFault.TOO_MANY_TENSORS, id="tensors"),
    pytest.param({"a" * (MAX_NAME_LENGTH + 1): EMPTY}, HeaderFault.LONG_NAME, id="length of a name"),
    pytest.param({".a" * MAX_COMPONENTS: EMPTY}, HeaderFault.LONG_NAME, id="components of a name"),
    pytest.param({"a": f32(0, 0, 0, *[1] * MAX_DIMENSIONS)}, HeaderFault.TOO_MANY_DIMENSIONS, id="dimensions"),
]


@pytest.mark.parametrize(("header", "fault"), ABOVE_LIMITS)
def test_parse_header_rejects_a_header_above_each_limit(header: dict[str, Any], fault: HeaderFault) -> None:
    with pytest.raises(BadHeader) as refused:
        read(file_of(header))
    assert refused.value.reason == fault
    assert len(str(refused.value)) < 300


def test_parse_header_accepts_names_and_shapes_at_the_limits() -> None:
    name = ("." * (MAX_COMPONENTS - 1)).ljust(MAX_NAME_LENGTH, "a")
    assert read(file_of({name: f32(0, 0, 0, *[1] * (MAX_DIMENSIONS - 1))}))[0].name == name


def test_header_fault_cases_cover_every_member() -> None:
    assert {param.values[1] for param in (*REFUSED, *ABOVE_LIMITS)} | {HeaderFault.ABOVE_LIMIT} == set(HeaderFault)


@pytest.mark.parametrize(
    "extra",
    ["[" + "{}," * MAX_HEADER_VALUES + "{}]", "[" + "1," * MAX_HEADER_VALUES + "1]", "[" * 101 + "]" * 101],
    ids=["objects", "numbers", "levels"],
)
def test_parse_header_rejects_a_header_above_its_limits_before_it_is_built(extra: str) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": {extra}}}}}'
    file = file_of(header, WORD)
    tracemalloc.start()
    with pytest.raises(BadHeader) as refused:
        read(file)
    assert refused.value.reason == HeaderFault.ABOVE_LIMIT
    assert tracemalloc.get_traced_memory()[1] < 4 * len(file) + 1_000_000
    tracemalloc.stop()


def test_parse_header_rejects_duplicate_tensors_unlike_the_reference() -> None:
    entry = json.dumps(ONE)
    file = file_of(f'{{"a":{entry},"a":{entry}}}', WORD)
    with pytest.raises(BadHeader) as refused:
        read(file)
    assert refused.value.reason == HeaderFault.DUPLICATE
    assert reference_accepts(file)


def test_parse_header_checks_offsets_of_unknown_dtypes() -> None:
    future = {"dtype": "F2_E1M0", "shape": [16], "data_offsets": [0, 4]}
    assert read(file_of({"a": future}, WORD))[0].dtype == "F2_E1M0"
    with pytest.raises(BadHeader) as refused:
        read(file_of({"a": future, "b": f32(8, 12, 1)}, WORD * 3))
    assert refused.value.reason == HeaderFault.BAD_OFFSETS


def test_parse_header_returns_the_metadata() -> None:
    file = file_of({"__metadata__": {"format": "mlx"}})
    assert parse_header(file[8:], len(file)).metadata == {"format": "mlx"}


def test_parse_header_sorts_tensors_by_file_offset() -> None:
    file = file_of({"b": f32(4, 12, 2), "a": ONE}, WORD * 3)
    start = len(file) - 12
    assert read(file) == [
        TensorInfo("a", "F32", (1,), start, start + 4),
        TensorInfo("b", "F32", (2,), start + 4, start + 12),
    ]
    assert read(file)[1].nbytes == 8


DIMENSIONS = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    header: dict[str, Any] = {}
    end = 0
    names = draw(st.lists(st.text(max_size=8).filter(lambda s: s != "__metadata__"), unique=True, max_size=5))
    for name in names:
        dtype = draw(st.sampled_from([d for d, bits in DTYPE_BITS.items() if bits % 8 == 0]))
        shape = draw(DIMENSIONS)
        nbytes = DTYPE_BITS[dtype] // 8
        for dimension in shape:
            nbytes *= dimension
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return file_of(header, b"\0" * end)


def encodable(file: bytes) -> bool:
    return b"\\ud" not in file


@given(valid_files().filter(encodable))
def test_parse_header_agrees_with_the_reference_on_valid_files(file: bytes) -> None:
    entries = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    theirs = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries}
    assert {t.name: (t.dtype, t.shape) for t in read(file)} == theirs


# The default is a few hundred examples; `pytest --hypothesis-profile nightly` takes 20,000.
@pytest.mark.slow
@settings(max_examples=max(400, settings.default.max_examples if settings.default else 0))
@given(valid_files(), st.data())
def test_parse_header_agrees_with_the_reference_on_mutated_files(file: bytes, data: st.DataObject) -> None:
    mutated = bytearray(file)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
        if not mutated:
            break
    try:
        tensors = read(bytes(mutated))
    except BadHeader as error:
        assert error.reason in set(HeaderFault)
    else:
        if all(t.dtype in DTYPE_BITS for t in tensors):
            assert reference_accepts(bytes(mutated))
