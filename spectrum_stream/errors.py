"""All errors that a user can meet.

    SpectrumStreamError        exit 1
    ├── UsageError             exit 2  the request is invalid
    ├── FileError                      a file is not a regular file, too large or unreadable
    ├── SourceError                    MODEL does not lead to a checkpoint
    ├── CheckpointError                the checkpoint is broken, or has nothing to score
    │   ├── BadHeader                  a shard breaks a rule of the safetensors format
    │   └── BadIndex                   the index is malformed, or shards are missing
    ├── ComputeError                   singular values could not be computed
    ├── ResultError                    a result file cannot be used, or belongs to another model
    └── FreezeError                    a selection does not fit the model it is applied to

Each error has a `reason`, a stable code for scripts and tests, and may have a `hint`, the next thing to type.
The message is one sentence that names the thing and the problem. If one matrix of many fails, that is not an
error but a status in the matrix's record.

Python, numpy, torch, safetensors and the system report a lack of memory, each with its own class of error.
`is_out_of_memory` recognizes all of them.
"""

import contextlib
import errno
from collections.abc import Iterator

# The words of libraries for a lack of memory or threads, in lower case. torch has a class for some devices only.
# safetensors, CUDA's libraries and the dynamic linker have only words.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "_alloc_failed",
    "can't start new thread",
    "can't allocate lock",
    "failed to map segment",
    "resource temporarily unavailable",
)


class SpectrumStreamError(Exception):
    """The root of all errors that this package raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, reason: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.hint = hint


class UsageError(SpectrumStreamError):
    """The request is invalid: a percentage of 140, an unknown group."""

    exit_code = 2


class FileError(SpectrumStreamError):
    """A file cannot be read: not_a_file (e.g. a FIFO), file_too_large, unreadable."""


class SourceError(SpectrumStreamError):
    """MODEL does not lead to a checkpoint."""


class CheckpointError(SpectrumStreamError):
    """The checkpoint exists, but it is broken or has nothing to score."""


class BadHeader(CheckpointError):
    """A safetensors file breaks a rule of its format.

    `reason` is a `header.HeaderFault`.
    """


class BadIndex(CheckpointError):
    """The index is malformed, or names missing shards."""


class ComputeError(SpectrumStreamError):
    """The singular values of a model could not be computed."""


class ResultError(SpectrumStreamError):
    """A result file is missing, malformed, locked, or belongs to another model."""


class FreezeError(SpectrumStreamError):
    """A selection matches no parameter of the model, or would leave none to train."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the process gets no more memory or threads.

    Errors of this package do not count, although such an error may be their cause.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, SpectrumStreamError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    # The names of classes are compared, because the classes themselves would have to be imported.
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, Exception) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


@contextlib.contextmanager
def memory_reported() -> Iterator[None]:
    """Restate errors for a lack of memory as an error of this package: no_memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # The functions of the traceback keep tensors alive.
        raise no_memory() from error.with_traceback(None)


def no_memory() -> SpectrumStreamError:
    """Make the error for a lack of memory that ends a command."""
    return SpectrumStreamError(
        "the system does not give this process the memory or the threads that it needs",
        reason="no_memory",
        hint="raise the limits (ulimit -a), or use --max-memory with scan; finished scores are saved",
    )
