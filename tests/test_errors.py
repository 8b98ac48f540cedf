import errno

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from spectrum_stream.errors import ResultError, SpectrumStreamError, is_out_of_memory, memory_reported


def huge_in_numpy() -> None:
    np.empty(1 << 55)


def huge_in_torch() -> None:
    torch.empty(1 << 60)


def huge_in_python() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize("run", [huge_in_numpy, huge_in_torch, huge_in_python])
def test_is_out_of_memory_knows_the_errors_of_libraries(run: object) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as error:
        run()  # type: ignore[operator]
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), False),
        (SafetensorError("Error while mapping: Cannot allocate memory (os error 12)"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (ImportError("no module named x"), False),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ResultError("the model out of memory/x is locked", reason="locked"), False),
        (KeyboardInterrupt("out of memory"), False),
    ],
    ids=repr,
)
def test_is_out_of_memory_reads_words_and_numbers(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_memory_reported_restates_only_a_lack_of_memory() -> None:
    with pytest.raises(SpectrumStreamError) as error, memory_reported():
        raise MemoryError
    assert error.value.reason == "no_memory"
    assert error.value.exit_code == 1
    assert error.value.__cause__ is not None
    assert error.value.__cause__.__traceback__ is None
    with pytest.raises(KeyError), memory_reported():
        raise KeyError
