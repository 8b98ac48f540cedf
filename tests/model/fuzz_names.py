"""A coverage-guided fuzzer of a list of names, to be run by hand.

pip install atheris && python -m tests.model.fuzz_names -max_total_time=300
"""

import atheris

from ..support.fuzzing import fuzz

with atheris.instrument_imports(include=["spectrum_stream"]):
    from ..support.untrusted import check_names

_SEEDS = (
    b"a.weight torch.Size([2, 3])\nb.weight\r\n",
    b'["a.weight", "b"]',
    b"\xef\xbb\xbfa\n",
    b"[[1]]",
    b"3",
    b"\\\n",
)


if __name__ == "__main__":
    fuzz(check_names, _SEEDS)
