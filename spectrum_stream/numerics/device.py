"""The device that computes singular values: the CPU, a CUDA device or Metal."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UsageError

# The share of a GPU's free memory for the K of a batch. The workspace of the eigenvalue routine needs room too.
_BATCH_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Device:
    """The device that computes singular values.

    Attributes:
        torch_device: the device of the products.
        batch_nbytes: memory for the K of one batch; 0 if batches gain nothing.
        looped: whether eigenvalues are found faster one matrix at a time (measured when the device is opened).
    """

    torch_device: torch.device
    batch_nbytes: int = 0
    looped: bool = False

    def __str__(self) -> str:
        return str(self.torch_device)


CPU = Device(torch.device("cpu"))


def open_device(name: str = "auto") -> Device:
    """Open and probe the device `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UsageError: no_such_device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu":
        return CPU
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps"):
            raise RuntimeError(name)
        torch.zeros(1, device=device)
    # The class of the error depends on the build of torch: AssertionError without CUDA, for example.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"this machine has no device {name!r}",
            reason="no_such_device",
            hint="use --device auto, which picks the device",
        ) from error
    if device.type == "mps":
        return Device(device)
    free, _ = torch.cuda.mem_get_info(device)
    return Device(device, int(free * _BATCH_SHARE), _is_looping_faster(device))


def _is_looping_faster(device: torch.device) -> bool:
    # This depends on the versions of torch and cuSOLVER, by factors of ten in either direction.
    k = torch.eye(256, device=device).expand(16, -1, -1).contiguous()

    def seconds(run: Callable[[], object]) -> float:
        run()
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return seconds(lambda: [torch.linalg.eigvalsh(one) for one in k]) < seconds(lambda: torch.linalg.eigvalsh(k))
