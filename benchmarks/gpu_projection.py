"""Project scans of whole models from measured seconds a matrix.

This is arithmetic only.

    computing = sum over shapes of count * seconds a matrix
    reading   = bytes / rate of reading
    scan      = overhead * max(computing, reading)

The shapes are those of published models, as stored (out features, in features). The time of a shape that was not
measured is estimated:

    eigenvalues of its short side, interpolated between measured sides as a power of n
    + 2 short² long / rate of the product
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# The nominal rate of a fast NVMe disk, in bytes a second.
NVME_RATE = 7e9
_ITEMSIZES = {"BF16": 2, "F8_E4M3": 1}

Shape = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Model:
    """A model: the number of its matrices of each (n, m, dtype)."""

    name: str
    shapes: Mapping[Shape, int]

    @property
    def matrices(self) -> int:
        return sum(self.shapes.values())

    @property
    def weights(self) -> int:
        return sum(n * m * count for (n, m, _), count in self.shapes.items())

    @property
    def nbytes(self) -> int:
        """Bytes to read, without scales."""
        return sum(n * m * _ITEMSIZES[dtype] * count for (n, m, dtype), count in self.shapes.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The measured times and rates of a device.

    Attributes:
        seconds: seconds a matrix by (n, m, dtype), with all steps of a scan but reading.
        eigenvalues: seconds for the eigenvalues of one n x n matrix in float32, by n.
        product: flop/s of the product of a matrix with its transpose.
        reading: bytes a second.
        overhead: the time of a measured scan over the slower of its parts.
    """

    seconds: Mapping[Shape, float]
    eigenvalues: Mapping[int, float]
    product: float
    reading: float
    overhead: float

    def measured(self, shape: Shape) -> float | None:
        """Return the seconds of a shape, or of its transpose, or None."""
        n, m, dtype = shape
        return self.seconds.get(shape, self.seconds.get((m, n, dtype)))

    def suffice(self, model: Model) -> bool:
        """Whether the seconds of every shape of a model are measured, or can be estimated."""
        return bool(self.eigenvalues and self.product) or None not in map(self.measured, model.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The projected scan of a model.

    Attributes:
        computing_s: seconds to compute.
        measured_share: the part of `computing_s` from shapes that were measured.
        reading_s, nvme_s: seconds to read at the measured rate, and at `NVME_RATE`.
        scan_s, scan_nvme_s: the slower of computing and reading, at both rates, times the overhead.
        costliest: the shape that takes most of the computing, and its seconds.
    """

    computing_s: float
    measured_share: float
    reading_s: float
    nvme_s: float
    scan_s: float
    scan_nvme_s: float
    costliest: tuple[Shape, float]


def _llama3(hidden: int, wide: int, layers: int) -> dict[Shape, int]:
    return {
        (hidden, hidden, "BF16"): 2 * layers,
        (1024, hidden, "BF16"): 2 * layers,
        (wide, hidden, "BF16"): 2 * layers,
        (hidden, wide, "BF16"): layers,
        (128256, hidden, "BF16"): 2,
    }


MODELS = (
    Model("Llama-3-8B", _llama3(4096, 14336, 32)),
    Model(
        "Qwen3-30B-A3B",
        {
            (4096, 2048, "BF16"): 48,
            (512, 2048, "BF16"): 2 * 48,
            (2048, 4096, "BF16"): 48,
            (128, 2048, "BF16"): 48,
            (768, 2048, "BF16"): 2 * 128 * 48,
            (2048, 768, "BF16"): 128 * 48,
            (151936, 2048, "BF16"): 2,
        },
    ),
    Model("Llama-3-70B", _llama3(8192, 28672, 80)),
    Model(
        "DeepSeek-V3-671B",
        {
            (1536, 7168, "F8_E4M3"): 61,
            (24576, 1536, "F8_E4M3"): 61,
            (576, 7168, "F8_E4M3"): 61,
            (32768, 512, "F8_E4M3"): 61,
            (7168, 16384, "F8_E4M3"): 61,
            (18432, 7168, "F8_E4M3"): 2 * 3,
            (7168, 18432, "F8_E4M3"): 3,
            # 256 experts and a shared one, in the layers after the first three.
            (2048, 7168, "F8_E4M3"): 2 * 257 * 58,
            (7168, 2048, "F8_E4M3"): 257 * 58,
            (256, 7168, "BF16"): 58,
            (129280, 7168, "BF16"): 2,
        },
    ),
)


def project(model: Model, rates: Rates) -> Projection:
    """Project the scan of a model."""
    measured = {shape: rates.measured(shape) for shape in model.shapes}
    parts = {
        shape: count * (_estimate(shape, rates) if (seconds := measured[shape]) is None else seconds)
        for shape, count in model.shapes.items()
    }
    computing = sum(parts.values())
    costliest = max(parts, key=lambda shape: parts[shape])
    reading, nvme = model.nbytes / rates.reading, model.nbytes / NVME_RATE
    return Projection(
        computing_s=computing,
        measured_share=sum(s for shape, s in parts.items() if measured[shape] is not None) / computing,
        reading_s=reading,
        nvme_s=nvme,
        scan_s=rates.overhead * max(computing, reading),
        scan_nvme_s=rates.overhead * max(computing, nvme),
        costliest=(costliest, parts[costliest]),
    )


def _estimate(shape: Shape, rates: Rates) -> float:
    short, long = sorted(shape[:2])
    return interpolate(short, rates.eigenvalues) + 2 * short**2 * long / rates.product


def interpolate(n: int, seconds: Mapping[int, float]) -> float:
    """Interpolate seconds by side: a power of n between measured sides, n³ beyond."""
    below = max((side for side in seconds if side <= n), default=None)
    above = min((side for side in seconds if side >= n), default=None)
    if below is None or above is None:
        nearest = above if below is None else below
        assert nearest is not None
        return seconds[nearest] * (n / nearest) ** 3
    if below == above:
        return seconds[below]
    power = math.log(seconds[above] / seconds[below]) / math.log(above / below)
    return seconds[below] * math.pow(n / below, power)
