"""A coverage-guided fuzzer of the header's reader, to be run by hand.

    pip install atheris && python -m tests.checkpoint.fuzz_header -max_total_time=300

The reference must accept every header that we accept, and only `BadHeader` may be raised.
"""

import json
from typing import Any

import atheris
import safetensors

from ..support.fuzzing import fuzz

with atheris.instrument_imports(include=["spectrum_stream"]):
    from spectrum_stream.checkpoint.header import DTYPE_BITS, HeaderFault, header_nbytes, parse_header
    from spectrum_stream.errors import BadHeader


def one(data: bytes) -> None:
    # Half of the inputs are only a header with a correct length. Most others fail at the first eight bytes.
    file = data[1:] if data[:1] < b"\x80" else len(data[1:]).to_bytes(8, "little") + data[1:]
    try:
        nbytes = header_nbytes(file[:8], len(file))
        tensors = parse_header(file[8 : 8 + nbytes], len(file)).tensors
    except BadHeader as error:
        assert error.reason in set(HeaderFault)
        return
    if all(t.dtype in DTYPE_BITS for t in tensors):
        safetensors.deserialize(file)  # type: ignore[no-untyped-call]


_SEEDS: tuple[dict[str, Any], ...] = (
    {},
    {"__metadata__": {"format": "pt"}},
    {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}},
    {"a.weight": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [0, 0]}},
    {
        "a": {"dtype": "F4", "shape": [2, 0], "data_offsets": [0, 0]},
        "b": {"dtype": "X", "shape": [], "data_offsets": [0, 0]},
    },
)


if __name__ == "__main__":
    # Without a valid header to start from, the fuzzer finds none in hours. The seeds are only headers.
    fuzz(one, (b"\xff" + json.dumps(seed).encode() for seed in _SEEDS))
