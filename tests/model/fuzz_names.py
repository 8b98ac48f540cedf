"""A coverage-guided fuzzer of a list of names, to be run by hand.

pip install atheris && python -m tests.model.fuzz_names -max_total_time=300
"""

import sys
import tempfile
from pathlib import Path

import atheris

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


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(_SEEDS):
            Path(corpus, str(i)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], check_names)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
