"""Every error that a user can meet.

    SpectrumStreamError        exit 1
    ├── UsageError             exit 2  the request cannot be carried out as it was typed
    ├── SourceError                    there is no checkpoint to read where MODEL points
    ├── CheckpointError                the checkpoint is there and is not what it says it is
    │   ├── BadHeader                  a shard breaks a rule of the safetensors format
    │   └── BadIndex                   the index and the shards disagree
    ├── ComputeError                   singular values could not be computed
    ├── ResultError                    a result file cannot be read, or is somebody else's
    └── FreezeError                    a selection does not fit the model it is applied to

Each error carries a `reason`, a stable code that scripts and tests compare, and may carry a `hint`, the
next thing to type. The message is one sentence about what is wrong, and where. What befalls one
matrix of many is not an error but a status in that matrix's record.
"""


class SpectrumStreamError(Exception):
    """The root: `except SpectrumStreamError` catches whatever this package raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, reason: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.hint = hint


class UsageError(SpectrumStreamError):
    """The request cannot be carried out as it was typed: a percentage of 140, a group nobody has."""

    exit_code = 2


class SourceError(SpectrumStreamError):
    """MODEL does not lead to a checkpoint."""


class CheckpointError(SpectrumStreamError):
    """The checkpoint is there, and cannot be trusted or has nothing to score."""


class BadHeader(CheckpointError):
    """A safetensors file breaks a rule of its format; `reason` is a `header.HeaderFault`."""


class BadIndex(CheckpointError):
    """The index is malformed, or names shards and tensors that are not there."""


class ComputeError(SpectrumStreamError):
    """Singular values could not be computed at all."""


class ResultError(SpectrumStreamError):
    """A result file is missing, malformed, locked, or belongs to another model."""


class FreezeError(SpectrumStreamError):
    """A selection names nothing in the model, or would leave nothing to train."""
