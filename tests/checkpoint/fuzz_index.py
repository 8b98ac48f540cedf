"""A coverage-guided fuzzer of the text of an index, to be run by hand.

    pip install atheris && python -m tests.checkpoint.fuzz_index -max_total_time=300

The names of other files in the folder come before the first line feed.
"""

import json

import atheris

from ..support.fuzzing import fuzz

with atheris.instrument_imports(include=["spectrum_stream"]):
    from ..support.untrusted import check_index


def one(data: bytes) -> None:
    names, _, index = data.partition(b"\n")
    check_index(index, tuple(name for name in names.decode("utf-8", "replace").split("|") if name))


_SEEDS = (
    ("", {"weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}),
    ("model.fp16.safetensors|config.json", {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors"}}),
    ("b-00001-of-00002.safetensors|rank1.safetensors", {"weight_map": {"a": "./x.safetensors", "b": "../x.bin"}}),
    ("model-rank-0-part-0.safetensors", {"weight_map": {"a": 1}}),
)


if __name__ == "__main__":
    fuzz(one, (f"{names}\n{json.dumps(index)}".encode() for names, index in _SEEDS))
