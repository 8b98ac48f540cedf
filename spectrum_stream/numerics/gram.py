"""K = W Wᵀ and its rounding, measured against float64 on this machine.

W is n x m with n <= m. K is summed over blocks of columns, each upcast as it is read, so no float32 copy of W exists.

    float32, float64   the dtype of products and sums
    mixed              products in float32 of 256 columns, added in float64, where float64 products are slow

**Matrix units.** Products of bfloat16 and float16 numbers are exact in float32, so only the sums are rounded. On
CUDA, tensor cores take 16-bit factors and return float32. On a CPU, torch has bfloat16 products (AMX, AVX512-BF16,
and BF16 on Arm). They are used for weights in bfloat16 if a probe finds them faster and at least as exact as float32.

**The diagonal** of K is a sum of squares. All its terms are positive, so its rounding has a bias: on a processor with
AVX2, it was 5 units in the last place too small at m = 576 and more. This would move all eigenvalues. So the diagonal
is summed separately, in float64 (on Metal in float32).

**The rounding of K** differs between processors and libraries, so it is measured: the entries of K in 64 rows and in
the columns with the same indices are compared with those in float64. This costs 64 * 64 * m multiplications.

From 1,024 rows on, a product with random signs x also finds errors in the other entries (Freivalds' algorithm). The
root mean square of |Kx - W(Wᵀx)| over all x is the Frobenius norm of the error of K. One x is used, and the
difference counts only if it is clearly above the rounding of the products with x. Smaller matrices are checked by the
64 rows alone.
"""

import contextlib
import functools
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from .costs import BLOCK_COLUMNS
from .dequantize import Weights
from .device import Device
from .precision import Precision
from .switches import Setting, Switches, switched

# The lower triangle of K is computed in bands of rows: at most _BANDS, each of at least _BAND_ROWS rows, or one band
# if K is smaller. 8 bands take 56 % of the multiplications of the full product. More bands gain little, and thinner
# bands gain nothing (measured with MKL).
_BAND_ROWS = 128
_BANDS = 8
# The columns of a partial sum that is added in float64.
_PARTIAL_COLUMNS = 256
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# K is compared with float64 in this many runs of adjacent rows. They spread over the bands, and adjacent rows of a
# transposed matrix share cache lines.
_RUNS = 4
_RUN_ROWS = 16
# The product with random signs has its own rounding, of up to 20 units of the norms of its factors. So a difference
# counts only above this many units. The product is used from the second number of rows on: with fewer rows it takes
# more than 3 % of the time, and the sampled rows are a larger share of K.
_UNSEEN = 64
_UNSEEN_FROM = 1024
# The rows of W, and the numbers of K, that are squared and summed at a time. They stay in the cache.
_SQUARED_ROWS = 64
_SUMMED_NUMEL = 1 << 19
# The probe of bfloat16 products: the shape of W, the number of runs, and the least speedup for their use.
_PROBE_SHAPE = (512, 2048)
_PROBE_RUNS = 3
_FASTER = 1.2


@dataclass(frozen=True, slots=True)
class Rounding:
    """The measured rounding of a K, in relative numbers.

    Attributes:
        noise: the root mean square of the errors E_ij / (|w_i| |w_j|) off the diagonal. So the Frobenius norm of E is
            about noise times the trace of K. If the product with random signs shows a larger norm, noise follows from
            that norm.
        bias: the slope of the errors over the entries, <E, K> / <K, K>, off the diagonal.
        shift: the mean error of the diagonal.
        aligned: the relative error of sums of terms of one sign. It is measured on the diagonal of the matrix
            product, relative to the norm of the diagonal.
    """

    noise: float
    bias: float
    shift: float
    aligned: float


@dataclass(frozen=True, slots=True)
class Gram:
    """A batch of K = W Wᵀ.

    Attributes:
        k: (batch, n, n) on the device, finite or not. Only the lower triangles are valid.
        traces: float64, (batch,): the sums of the diagonals.
        squares: float64, (batch,): the squared Frobenius norms, in units of the squared traces. NaN if a trace is 0.
        roundings: one for each K.
    """

    k: torch.Tensor
    traces: np.ndarray
    squares: np.ndarray
    roundings: list[Rounding]


def gram(ws: Sequence[Weights], precision: Precision, device: Device) -> Gram:
    """Compute K = W Wᵀ of each W (n, m), n <= m, and measure its rounding.

    Args:
        ws: matrices of one shape and dtype, on the CPU.
        precision: FP32, MIXED or FP64.
    """
    n = ws[0].shape[0]
    dtype = torch.float32 if precision is Precision.FP32 else torch.float64
    factor = torch.float64 if precision is Precision.FP64 else torch.float32
    k = torch.zeros(len(ws), n, n, dtype=dtype, device=device.torch_device)
    diagonal = torch.zeros(len(ws), n, dtype=_widest_dtype(k), device=k.device)
    on_tensor_cores = device.torch_device.type == "cuda" and factor is torch.float32 and ws[0].dtype in _SIXTEEN_BITS
    signs = _draw_signs(n).to(device.torch_device, dtype) if n >= _UNSEEN_FROM else None
    image = torch.zeros(len(ws), n, dtype=dtype, device=device.torch_device)
    with _multiplying(ws[0].dtype, device):
        for part, block in device.blocks(ws, None if on_tensor_cores else factor):
            diagonal[part] += _sum_squares(block, diagonal.dtype)
            if signs is not None:
                image[part] += _multiply_twice(block.to(dtype), signs)
            for piece in [block] if dtype is factor else torch.split(block, _PARTIAL_COLUMNS, dim=2):
                _add_product(k[part], piece)
    diagonal_of_k = k.diagonal(dim1=1, dim2=2)
    # In units of the norm, because squares of valid numbers may overflow.
    norms = torch.linalg.vector_norm(diagonal, dim=1)
    aligned = torch.linalg.vector_norm((diagonal_of_k - diagonal) / norms[:, None], dim=1)
    diagonal_of_k.copy_(diagonal)
    # These are rounded to the dtype of K.
    diagonals = diagonal_of_k.cpu().double().numpy()
    traces = diagonals.sum(1)
    unseen = np.zeros(len(ws))
    if signs is not None:
        unseen = _find_unseen(_multiply_lower(k, signs), image, signs, traces)
    roundings = _measure_roundings(ws, k, aligned.tolist(), unseen.tolist())
    return Gram(k, traces, _find_squared_norms(k, diagonals, traces), roundings)


# In the bfloat16 mode, products of all other weights are inexact. So a thread that needs the other mode waits.
_MODE = Switches()
_PROBING = threading.Lock()


def products_in(mode: str) -> Setting:
    """Return the setting for float32 products in oneDNN."""
    return torch.backends.mkldnn.matmul, "fp32_precision", mode  # type: ignore[attr-defined]


def _multiplying(dtype: torch.dtype, device: Device) -> contextlib.AbstractContextManager[None]:
    """Return a context for exact and fast float32 products of weights of this dtype."""
    if not device.is_cpu or not has_fast_bfloat16():
        return contextlib.nullcontext()
    return _MODE.hold(products_in("bf16" if dtype is torch.bfloat16 else "ieee"))


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 products on the CPU are faster and as exact as in float32.

    The first call measures this. Every thread calls this before it multiplies, so no product disturbs the
    measurement.
    """
    with _PROBING:
        return _probe_bfloat16()


@functools.cache
def _probe_bfloat16() -> bool:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    ieee = measure_products("ieee")
    return measure_products("bf16").is_better(ieee)


@dataclass(frozen=True, slots=True)
class ProductQuality:
    """The speed and the error of float32 products of bfloat16 numbers on the CPU.

    Attributes:
        seconds: of one product.
        noise: the root mean square of the errors of its entries.
    """

    seconds: float
    noise: float

    def is_better(self, other: "ProductQuality") -> bool:
        """Whether these products are clearly faster and at least as exact as the others."""
        return _FASTER * self.seconds < other.seconds and self.noise <= other.noise


def measure_products(mode: str) -> ProductQuality:
    """Measure the products of bfloat16 numbers in a mode of oneDNN.

    No other thread may multiply meanwhile.
    """
    n, m = _PROBE_SHAPE
    w = torch.randn(n, m, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16).float()
    with switched(products_in(mode)):
        seconds = min(_time_product(w) for _ in range(_PROBE_RUNS))
        found = w @ w.T
    errors = (found - w.double() @ w.double().T).tril(-1)
    return ProductQuality(seconds, float(errors.square().mean().sqrt()))


def _time_product(w: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(w, w.T)
    return time.perf_counter() - started


def bands_of(n: int) -> list[tuple[int, int]]:
    """Return the bands of rows of an n x n matrix, as the first row and the end of each."""
    bands = min(_BANDS, max(1, n // _BAND_ROWS))
    return list(pairwise(n * i // bands for i in range(bands + 1)))


def _add_product(k: torch.Tensor, block: torch.Tensor) -> None:
    """Add the lower triangle of block @ blockᵀ to K, (batch, n, n)."""
    for top, bottom in bands_of(k.shape[1]):
        rows, columns = block[:, top:bottom], block[:, :bottom].mT
        target = k[:, top:bottom, :bottom]
        if block.dtype in _SIXTEEN_BITS:
            # Without out_dtype the product of 16-bit factors would be rounded to 16 bits.
            target += torch.bmm(rows, columns, out_dtype=torch.float32)
        elif k.dtype is not block.dtype:
            target += torch.bmm(rows, columns)
        elif len(block) == 1:
            target[0].addmm_(rows[0], columns[0])
        else:
            target.baddbmm_(rows, columns)


def _draw_signs(n: int) -> torch.Tensor:
    """Return n random signs, (n, 1); the same for each matrix of n rows."""
    return torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(n)).mul_(2).sub_(1)


def _multiply_twice(block: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Compute block @ (blockᵀ @ x): (batch, n, columns) and (n, 1) to (batch, n)."""
    y = block.mT @ x
    if y.dtype is torch.float32:
        # Products may round their factors to bfloat16. These three terms are exact in bfloat16, and their sum is y.
        high = y.bfloat16().float()
        middle = (y - high).bfloat16().float()
        y = torch.cat([high, middle, y - high - middle], dim=2)
    result: torch.Tensor = (block @ y).sum(2)
    return result


def _multiply_lower(k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Compute K @ x from lower triangles: (batch, n, n) and (n, 1) to (batch, n)."""
    result = torch.zeros(len(k), k.shape[1], 1, dtype=k.dtype, device=k.device)
    for top, bottom in bands_of(k.shape[1]):
        # The block of the band at the diagonal is complete, with its upper triangle.
        result[:, top:bottom] += k[:, top:bottom, :bottom] @ x[:bottom]
        result[:, :top] += k[:, top:bottom, :top].mT @ x[top:bottom]
    return result[:, :, 0]


def _find_unseen(kx: torch.Tensor, image: torch.Tensor, x: torch.Tensor, traces: np.ndarray) -> np.ndarray:
    """Estimate the Frobenius norm of the error of each K, relative to its trace.

    The estimate is 0 if the rounding of the products with x may explain the difference.

    Args:
        kx, image: (batch, n): K x, and W(Wᵀx).
        x: (n, 1), signs.
    """
    unit = torch.finfo(image.dtype).eps / 2
    kx, image, x = (y.cpu().double() for y in (kx, image, x))
    with np.errstate(all="ignore"):
        off = (kx - image).norm(dim=1).numpy() / traces
        # The squared norm of Wᵀx is xᵀW(Wᵀx).
        allowed = _UNSEEN * unit * np.sqrt(np.abs((image @ x)[:, 0].numpy()) / traces)
        return np.where((off > allowed) & np.isfinite(off), off, 0.0)


def _widest_dtype(k: torch.Tensor) -> torch.dtype:
    """Return the dtype for sums on the device of K. Metal has no float64."""
    return torch.float32 if k.device.type == "mps" else torch.float64


def _sum_squares(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum the squares of each row in this dtype: (batch, n, columns) to (batch, n)."""
    if block.device.type == "cuda":
        norms: torch.Tensor = torch.linalg.vector_norm(block, dim=2, dtype=torch.float64)
        return norms.square()
    return torch.cat([rows.square().sum(2, dtype=dtype) for rows in torch.split(block, _SQUARED_ROWS, dim=1)], dim=1)


def _find_squared_norms(k: torch.Tensor, diagonals: np.ndarray, traces: np.ndarray) -> np.ndarray:
    """Return the squared Frobenius norms of matrices over their squared traces.

    Args:
        k: (batch, n, n), symmetric. Only the entries below the diagonals are read.
        diagonals: float64, (batch, n).
        traces: float64, (batch,).
    """
    n = k.shape[1]
    with np.errstate(all="ignore"):
        # In units near the trace, because squares of float32 numbers may overflow. A power of two adds no rounding.
        scale = np.exp2(np.round(np.log2(traces)))
        unit = torch.from_numpy(1 / scale).to(k.device, k.dtype)[:, None, None]
        lower = np.zeros(len(k))
        height = max(1, _SUMMED_NUMEL // n)
        for first in range(0, n, height):
            rows = (k[:, first : first + height, : first + height] * unit).tril_(first - 1)
            lower += np.square(torch.linalg.vector_norm(rows, dim=2, dtype=_widest_dtype(k)).cpu().numpy()).sum(1)
        both = 2 * lower + np.square(diagonals / scale[:, None]).sum(1)
        relative: np.ndarray = both * np.square(scale / traces)
        return relative


def _choose_runs(n: int) -> list[slice]:
    """Choose the rows of K that are compared with float64."""
    if n <= _RUNS * _RUN_ROWS:
        return [slice(0, n)]
    starts = [(n - _RUN_ROWS) * i // (_RUNS - 1) for i in range(_RUNS)]
    return [slice(start, start + _RUN_ROWS) for start in starts]


def _measure_roundings(
    ws: Sequence[Weights], k: torch.Tensor, aligned: Sequence[float], unseen: Sequence[float]
) -> list[Rounding]:
    """Compare entries of each K, in a few rows and the same columns, with float64."""
    runs = _choose_runs(ws[0].shape[0])
    chosen = torch.cat([torch.arange(run.start, run.stop) for run in runs]).to(k.device)
    # Metal has no float64.
    found = k[:, chosen[:, None], chosen].cpu().double().numpy()
    roundings = []
    for w, sample, *errors in zip(ws, found, aligned, unseen, strict=True):
        exact = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
        for c in range(0, w.shape[1], BLOCK_COLUMNS):
            rows = torch.cat([w[run, c : c + BLOCK_COLUMNS] for run in runs]).double()
            exact.addmm_(rows, rows.T)
        roundings.append(_compare(sample, exact.numpy(), *errors))
    return roundings


def _compare(found: np.ndarray, exact: np.ndarray, aligned: float, unseen: float) -> Rounding:
    """Compare a principal submatrix of K with the exact one.

    Only the lower triangle of `found` is valid.
    """
    i, j = _list_below_diagonal(len(exact))
    # Weights that are zero or not finite give NaN, and the means leave NaN out.
    with np.errstate(all="ignore"):
        diagonal = exact.diagonal()
        # The squares of valid numbers may overflow.
        largest = diagonal.max()
        entries, lengths = exact[i, j] / largest, diagonal / largest
        errors = found[i, j] / largest - entries
        noise = math.sqrt(_mean(np.square(errors) / (lengths[i] * lengths[j])))
        return Rounding(
            noise=max(noise, unseen),
            bias=_mean(errors * entries) / (_mean(np.square(entries)) or 1.0),
            shift=_mean(found.diagonal() / diagonal - 1),
            aligned=aligned if math.isfinite(aligned) else 0.0,
        )


@functools.cache
def _list_below_diagonal(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tril_indices(n, -1)


def _mean(values: np.ndarray) -> float:
    mean = float(values.mean()) if len(values) else 0.0
    if math.isfinite(mean):
        return mean
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else 0.0
