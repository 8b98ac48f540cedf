"""Records of matrices as a scan writes them, and the identity of the checkpoint that they belong to."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.snr import score
from spectrum_stream.results.record import Record, open_records

IDENTITY: dict[str, Any] = {
    "path": "/models/a",
    "commit": None,
    "shards": {"model.safetensors": 10},
    "versions": {"model.safetensors": [20, 30]},
    "files": "0" * 64,
    "engine": 3,
    "names": "checkpoint",
    "names_sha256": None,
}


def record(
    module: str = "layers.0.up",
    group: str = "up",
    *,
    s: np.ndarray | None = None,
    snr: float | None = None,
    parameter: str | None = None,
) -> Record:
    """Make the record of a matrix with singular values `s`, (k,), of shape k x (k + 2)."""
    values = np.array([3.0, 2.0, 1.0, 0.5]) if s is None else s
    n, m = len(values), len(values) + 2
    found = score(values, n, m)
    return Record(
        module=module,
        parameter=parameter or f"{module}.weight",
        group=group,
        tensor=f"{module}.weight",
        n=n,
        m=m,
        dtype="BF16",
        no_score=None,
        detail="",
        precision=Precision.FP32,
        device="cpu",
        score=found if snr is None else replace(found, snr=snr),
        singular_values=values.astype(np.float32),
        compute_s=0.5,
    )


def read_all(path: Path, *, spectra: bool = True) -> dict[str, Record]:
    """Read the records of a file, by module."""
    with open_records(path, spectra=spectra) as records:
        return {record.module: record for record in records.rows}


def change_record(path: Path, statement: str, *values: object) -> int:
    """Change a record without this program; return the number of changed rows."""
    db = sqlite3.connect(path)
    with db:
        changed = db.execute(statement, values).rowcount
    db.close()
    return changed


def change_scores(result: Path, factors: dict[str, float]) -> None:
    """Multiply the scores of some modules of a result file."""
    data = json.loads(result.read_text())
    for module, factor in factors.items():
        data[module]["snr"] *= factor
    result.write_text(json.dumps(data))
