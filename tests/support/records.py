"""Rows of a record as a scan writes them, without a scan."""

from typing import Any

import numpy as np

from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.snr import score
from spectrum_stream.results.record import Record

# What a journal was opened with: which checkpoint it is a record of.
IDENTITY: dict[str, Any] = {
    "path": "/models/a",
    "shards": [["model.safetensors", 10, 20]],
    "engine": 1,
    "names": "checkpoint",
    "names_sha256": None,
}


def record(module: str = "layers.0.up", group: str = "up", snr: float | None = None) -> Record:
    values = np.array([3.0, 2.0, 1.0, 0.5])
    result = score(values, 4, 6)
    return Record(
        module=module,
        parameter=f"{module}.weight",
        group=group,
        tensor=f"{module}.weight",
        n=4,
        m=6,
        dtype="BF16",
        no_score=None,
        detail="",
        precision=Precision.FP32,
        device="cpu",
        score=result if snr is None else type(result)(**{**dataclass_items(result), "snr": snr}),
        singular_values=values.astype(np.float32),
        compute_s=0.5,
    )


def dataclass_items(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
