"""Run a coverage-guided fuzzer."""

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris


def fuzz(one: Callable[[bytes], object], seeds: Iterable[bytes], options: Iterable[str] = ()) -> None:
    """Call `one` with changed seeds until it raises or the process is ended.

    Args:
        options: defaults of libFuzzer's options, which those of the command line replace.
    """
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(seeds):
            Path(corpus, str(i)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], corpus], one)
        atheris.Fuzz()
