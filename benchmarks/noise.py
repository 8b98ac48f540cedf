"""What each measure says of noise alone, by the shape of the matrix: `python -m benchmarks.noise`.

A measure that tells signal from noise says the same of all noise. Prints the README's table, in Markdown: medians
over matrices with independent normal entries of the standard deviation that a trained model's weights have.
"""

import sys
from fractions import Fraction
from typing import Annotated

import numpy as np
import typer

from spectrum_stream.measures import MEASURES, Metric
from spectrum_stream.snr import score

BETAS = [Fraction(1, 32), Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(3, 8), Fraction(1, 2)]
BETAS += [Fraction(3, 4), Fraction(1)]
_WEIGHT_STD = 0.02


def noise(short: int, beta: Fraction, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """The singular values, (short,), of a short x long matrix of noise, and its long side."""
    long = round(short / beta)
    w = _WEIGHT_STD * rng.standard_normal((short, long))
    # Noise has no small singular value that the squares would lose, in float64.
    return np.sqrt(np.maximum(np.linalg.eigvalsh(w @ w.T)[::-1], 0)), long


def table(short: int, draws: int, seed: int) -> list[dict[str, float | str]]:
    """A row a ratio: beta, the share of S that Spectrum calls signal, and every measure's median over the draws."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, float | str]] = []
    for beta in BETAS:
        drawn = [noise(short, beta, rng) for _ in range(draws)]
        row: dict[str, float | str] = {"beta": str(beta)}
        row["above tau"] = float(np.median([score(s, short, long).above / short for s, long in drawn]))
        for metric, measure in MEASURES.items():
            if metric is not Metric.RANDOM and measure.of_spectrum is not None:
                values = [measure.of_spectrum(s, short, long) for s, long in drawn]
                row[str(metric)] = float(np.median([np.nan if value is None else value for value in values]))
        rows.append(row)
    return rows


def main(
    short: Annotated[int, typer.Option(min=2, help="The short side of the matrices.")] = 512,
    draws: Annotated[int, typer.Option(min=1, help="Matrices of each shape.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
) -> None:
    """Print what each measure says of noise alone, for matrices of several shapes."""
    rows = table(short, draws, seed)
    print(f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|", sep="\n")
    for row in rows:
        print(f"| {' | '.join(x if isinstance(x, str) else f'{x:.3g}' for x in row.values())} |")
    print(f"medians of {draws}, short side {short}, seed {seed}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
