"""The value of each metric on noise alone: `python -m benchmarks.noise`.

A metric that tells signal from noise has the same value on all noise. Prints the README's tables in Markdown: medians
over matrices of independent normal entries, with the standard deviation of a trained model's weights. With
`--result FILE` it counts the matrices of a real model that have more signal than noise of their shape.
"""

import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from spectrum_stream.numerics.metrics import METRICS, marchenko_pastur, scale_free
from spectrum_stream.numerics.snr import score
from spectrum_stream.results.record import open_records, record_path

BETAS = [Fraction(1, 32), Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(3, 8), Fraction(1, 2)]
BETAS += [Fraction(3, 4), Fraction(1)]
_WEIGHT_STD = 0.02
_BLOCK = 4096

Row = dict[str, float | str]


def noise(short: int, long: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the singular values, (short,), of a short x long matrix of noise."""
    # The matrix is made in blocks to save memory. Noise has no small values that the squares would lose.
    gram = np.zeros((short, short))
    for start in range(0, long, _BLOCK):
        w = _WEIGHT_STD * rng.standard_normal((short, min(_BLOCK, long - start)))
        gram += w @ w.T
    values: np.ndarray = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0))
    return values


def by_ratio(short: int, draws: int, seed: int) -> list[Row]:
    """Make a row for each ratio: beta, the share above tau, and all medians."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for beta in BETAS:
        long = round(short / beta)
        drawn = [noise(short, long, rng) for _ in range(draws)]
        row: Row = {"beta": str(beta)}
        row["above tau"] = float(np.median([score(s, short, long).above / short for s in drawn]))
        for metric in METRICS.values():
            if metric.of_spectrum is not None:
                values = [metric.of_spectrum(s, short, long) for s in drawn]
                row[metric.name] = float(np.median([np.nan if value is None else value for value in values]))
        rows.append(row)
    return rows


def against_noise(result: Path, draws: int, seed: int) -> list[Row]:
    """Count the matrices of each group and shape with more signal than noise."""
    rng = np.random.default_rng(seed)
    members: dict[tuple[str, int, int], list[np.ndarray]] = defaultdict(list)
    with open_records(record_path(result)) as records:
        for record in records.rows:
            if record.score is not None and min(record.n, record.m) > 1:
                members[record.group, record.n, record.m].append(record.singular_values)
    rows: list[Row] = []
    for (group, n, m), spectra in members.items():
        drawn = [noise(min(n, m), max(n, m), rng) for _ in range(draws)]
        row: Row = {"group": f"`{group}`", "shape": f"{n} x {m}", "matrices": len(spectra)}
        for name, share in (("Spectrum's tau", scale_free), ("Marchenko-Pastur's", marchenko_pastur)):
            of_noise = float(np.median([share(s, n, m) for s in drawn]))
            row[f"{name}: noise"] = of_noise
            row[f"{name}: more than noise"] = sum(share(s, n, m) > of_noise for s in spectra)
        rows.append(row)
    return rows


def main(
    short: Annotated[int, typer.Option(min=2, help="Short side of the matrices")] = 512,
    draws: Annotated[int, typer.Option(min=1, help="Matrices of each shape")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers")] = 0,
    result: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare the matrices of this result with noise instead")
    ] = None,
) -> None:
    """Print the value of each metric on noise alone, for matrices of several shapes"""
    rows = by_ratio(short, draws, seed) if result is None else against_noise(result, draws, seed)
    print(f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|", sep="\n")
    for row in rows:
        print(f"| {' | '.join(x if isinstance(x, str) else f'{x:.3g}' for x in row.values())} |")
    print(f"medians of {draws}, seed {seed}" + ("" if result else f", short side {short}"), file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
