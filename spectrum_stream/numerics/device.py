"""The device that computes singular values: the CPU, a CUDA device or Metal.

This module decides everything that differs between devices: how blocks of weights get to a device, how many matrices
it computes at once, and how it computes eigenvalues. A CUDA device is probed when it is opened, because its routines
depend on the versions of torch and cuSOLVER, and some of them return wrong eigenvalues without an error:

    torch 2.11 and older    a batch of n <= 32 is one call of cuSOLVER's batched routine; larger n are looped
    torch 2.12 and newer    the batched routine for every n and batch, also for one matrix
    cuSOLVER 11.7.1         (CUDA 12.6) the batched routine needs a workspace of zeros, but torch passes recycled
                            memory (pytorch issue 192483)
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..errors import UsageError, is_out_of_memory
from . import costs, probe
from .costs import Workspace
from .dequantize import Weights
from .staging import Staging, direct_blocks

# The share of a GPU's free memory that batches may take. The rest is for the kernels that are loaded later, for
# fragmentation and for other programs.
_USABLE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Device:
    """The device that computes singular values.

    Attributes:
        torch_device: the device of the products.
        batch_nbytes: the device memory for all batches that are computed at once; 0 if batches gain nothing.
        looped: whether eigenvalues are computed one matrix a call, because calls with batches return wrong ones.
        eigenvalues_on_cpu: whether eigenvalues are computed on the CPU, because the device has no routine for them,
            or a wrong one.
        has_fast_float64: whether products in float64 take about as long as in float32.
        problem: the fault that the probe found, in words; "" for none.
    """

    torch_device: torch.device
    batch_nbytes: int = 0
    looped: bool = False
    _: KW_ONLY
    eigenvalues_on_cpu: bool = False
    has_fast_float64: bool = True
    problem: str = ""
    # The workspace of the eigenvalue routine by n and size of a number, and the buffers of each thread.
    _workspaces: dict[tuple[int, int], Workspace] = field(default_factory=dict, init=False, repr=False, compare=False)
    _threads: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)

    def __str__(self) -> str:
        return str(self.torch_device)

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU itself."""
        return self.torch_device.type == "cpu"

    def blocks(self, ws: Sequence[Weights], dtype: torch.dtype | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the blocks of columns of matrices, on the device; see `Staging.blocks`."""
        if not self.batch_nbytes:
            return direct_blocks(ws, dtype, self.torch_device)
        if not hasattr(self._threads, "staging"):
            self._threads.staging = Staging(self.torch_device)
        staging: Staging = self._threads.staging
        return staging.blocks(ws, dtype)

    def eigvalsh(self, k: torch.Tensor) -> torch.Tensor:
        """Compute the eigenvalues of symmetric matrices from their lower triangles.

        A batch that fails is halved again and again, so that one bad matrix does not affect the others.

        Args:
            k: (batch, n, n), finite.

        Returns:
            (batch, n), ascending, in the dtype of K and on the device or on the CPU. NaN for a matrix that fails.

        Raises:
            torch.OutOfMemoryError: a smaller batch may fit.
        """
        n = k.shape[-1]
        if self._is_on_cpu(n):
            k = k.cpu()
        at_once = 1 if self.looped else min(costs.MAX_BATCH, max(1, costs.MAX_BATCH_NUMEL // (n * n)))
        return torch.cat([_eigvalsh(k[i : i + at_once]) for i in range(0, len(k), at_once)])

    def limit(self, n: int, m: int, itemsize: int) -> int:
        """Return the largest batch of n x m matrices for one thread, at least 1."""
        share = self.batch_nbytes // costs.DEVICE_THREADS
        return costs.batch_limit(n, m, itemsize, share, self._workspace(min(n, m), itemsize))

    def nbytes(self, n: int, m: int, itemsize: int, batch: int) -> int:
        """Return the memory of a batch of n x m matrices on the device, in bytes."""
        return costs.device_nbytes(n, m, itemsize, batch, self._workspace(min(n, m), itemsize))

    def is_measured(self, n: int) -> bool:
        """Whether the workspace for a short side of n is known or needs no measurement."""
        return self.torch_device.type != "cuda" or self._is_on_cpu(n) or (n, 4) in self._workspaces

    def measure(self, n: int) -> None:
        """Measure the workspace of the eigenvalue routine for matrices with n rows.

        Nothing else may run on the device. The workspace depends on the shape alone, so it is measured with zeros, in
        float32. In float64 it counts as twice as large. This resets torch's statistics of peak memory.
        """
        workspace = costs.assumed_workspace(n, 4)
        try:
            # The first call may also take memory that the libraries keep. The larger batch comes first, so this makes
            # `each` too large rather than too small.
            two, one = self._measure_peak(n, 2), self._measure_peak(n, 1)
        except RuntimeError as error:
            # Other programs may have taken the memory, or a single matrix is too large. The computation meets the
            # same error, and then halves the batch or uses the CPU.
            if not is_out_of_memory(error) and not _is_of_routine(error):
                raise
        else:
            # The workspace is at least the copy of K, even if an allocator counts nothing.
            each = max(two - one, 4 * n * n)
            workspace = Workspace(max(0, one - each), each)
        # The cached memory belongs to the stream of this thread, so other streams cannot use it.
        torch.cuda.empty_cache()
        self._workspaces[n, 4] = workspace
        self._workspaces[n, 8] = Workspace(2 * workspace.fixed, 2 * workspace.each)

    def _workspace(self, n: int, itemsize: int) -> Workspace:
        return self._workspaces.get((n, itemsize)) or costs.assumed_workspace(n, itemsize)

    def _is_on_cpu(self, n: int) -> bool:
        # A single matrix above the limit of cuSOLVER has more than 46,340 rows.
        return self.eigenvalues_on_cpu or n * n > costs.MAX_BATCH_NUMEL

    def _measure_peak(self, n: int, batch: int) -> int:
        k = torch.zeros(batch, n, n, device=self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        self.eigvalsh(k)
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def new_stream(self) -> AbstractContextManager[object]:
        """Return a context for a thread that computes on its own stream.

        It also selects the device.
        """
        if self.torch_device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self.torch_device))  # type: ignore[no-untyped-call]

    def free_unused(self) -> None:
        """Release the device memory in the cache of torch."""
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()


CPU = Device(torch.device("cpu"))
# Metal has no float64, and torch computes eigenvalues there only for small matrices.
_METAL = Device(torch.device("mps"), eigenvalues_on_cpu=True, has_fast_float64=False)


def open_device(name: str = "auto") -> Device:
    """Open and probe the device `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UsageError: no_such_device; device_is_full.
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
        if is_out_of_memory(error):
            raise _device_is_full(name) from error
        raise UsageError(
            f"this machine has no device {name!r}",
            reason="no_such_device",
            hint="use --device auto, which picks the device",
        ) from error
    if device.type == "mps":
        return _METAL
    try:
        return _probe_cuda(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _device_is_full(name) from error


def _device_is_full(name: str) -> UsageError:
    return UsageError(
        f"the device {name!r} has too little free memory",
        reason="device_is_full",
        hint="end the programs that use it, or use --device cpu",
    )


def _probe_cuda(device: torch.device) -> Device:
    opened = check_eigenvalues(Device(device))
    has_fast_float64 = probe.has_fast_float64(device)
    # The libraries are loaded now, so their memory no longer counts as free.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return replace(opened, batch_nbytes=int(free * _USABLE_SHARE), has_fast_float64=has_fast_float64)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Run LAPACK on one thread.

    On a busy machine, threads that share a matrix can be a hundred times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_eigenvalues(device: Device) -> Device:
    """Choose the first way that computes eigenvalues correctly.

    The ways are tried in this order: batches, one matrix a call, the CPU.
    """
    if probe.finds_known_eigenvalues(device.eigvalsh, device.torch_device):
        return device
    found = f"{device} computes wrong eigenvalues of batches (torch {torch.__version__})"
    one_by_one = replace(device, looped=True, problem=f"{found}, so they are computed one matrix at a time")
    if probe.finds_known_eigenvalues(one_by_one.eigvalsh, device.torch_device):
        return one_by_one
    found = f"{device} computes wrong eigenvalues (torch {torch.__version__})"
    return replace(device, eigenvalues_on_cpu=True, problem=f"{found}, so they are computed on the CPU")


def _eigvalsh(k: torch.Tensor) -> torch.Tensor:
    # Nothing is tried again in the `except` clause, because the traceback keeps the memory of the first try.
    try:
        found: torch.Tensor = torch.linalg.eigvalsh(k)
        return found
    except RuntimeError as error:
        if is_out_of_memory(error) or not _is_of_routine(error):
            raise
    if len(k) == 1:
        return torch.full_like(k[0, :1], torch.nan)
    half = len(k) // 2
    return torch.cat([_eigvalsh(k[:half]), _eigvalsh(k[half:])])


def _is_of_routine(error: RuntimeError) -> bool:
    """Whether the matrices or the batch size, not the device, caused an error.

    torch restates the status CUSOLVER_STATUS_INVALID_VALUE as LinAlgError, and others as "cusolver error" or
    "hipsolver error".
    """
    return isinstance(error, LinAlgError) or "solver error" in str(error)
