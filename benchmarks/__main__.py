"""`python -m benchmarks`: what to measure, where to put the numbers, and whether they have become worse."""

import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from spectrum_stream import SpectrumStreamError

from .measuring import Settings, machine, measure_checkpoint, measure_workload
from .regression import NotComparable, load, regressions
from .report import tables
from .results import RunResult
from .worker import WorkerError
from .workloads import Suite, Workload, workloads

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command(epilog="Exit codes: 0 done, 1 a regression or a failure, 2 usage.")
def main(
    suite: Annotated[
        Suite, typer.Option(help="ci takes less than three minutes, full about half an hour.")
    ] = Suite.CI,
    model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", exists=True, help="Measure on this checkpoint instead of a suite."),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only these workloads of the suite: names or globs; repeat it."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save all numbers as JSON.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare with a saved run; exit with 1 if a ratio is worse.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="By what share a ratio may be worse.")] = 0.2,
    repetitions: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 3,
    numpy: Annotated[bool, typer.Option(help="Whether numpy takes part.")] = True,
    device: Annotated[
        str, typer.Option(help="Where to compute, ours and Spectrum's precision alike: cpu, cuda, cuda:N.")
    ] = "cpu",
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the checkpoint from the page cache before every turn (Linux).")
    ] = False,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Make checkpoints here, keep them, and use those of an earlier run."),
    ] = None,
) -> None:
    """Time a scan beside Spectrum's precision and numpy's, and check its scores against known ones."""
    # In a file or a CI log there is no terminal whose width must be kept to.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    if cold and not hasattr(os, "posix_fadvise"):
        raise typer.BadParameter("this system cannot drop a file from its page cache", param_hint="--cold")
    try:
        # Before the minutes that the measurement takes.
        baseline = load(against) if against else None
        with ExitStack() as stack:
            folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-checkpoints-")))
            settings = Settings(
                repetitions, numpy, device, cold, folder.resolve(), lambda line: progress.print(line, markup=False)
            )
            if model is not None:
                results = [measure_checkpoint(str(model.resolve()), model.name, settings, numpy_turns=1)]
            else:
                results = [measure_workload(w, settings) for w in _chosen(suite, workload)]
        run = RunResult(
            machine(),
            {
                "suite": model.name if model else suite,
                "repetitions": repetitions,
                "numpy": numpy,
                "device": device,
                "cold": cold,
            },
            results,
        )
        if output is not None:
            run.save(output)
        console.print(tables(run))
        worse = regressions(baseline, run.to_dict(), tolerance) if baseline else []
    except NotComparable as error:
        raise typer.BadParameter(str(error), param_hint="--against") from error
    except (SpectrumStreamError, WorkerError) as error:
        progress.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error
    for sentence in worse:
        console.print(f"worse: {sentence}", style="red", markup=False)
    if worse:
        raise typer.Exit(1)


def _chosen(suite: Suite, patterns: list[str] | None) -> list[Workload]:
    found = [w for w in workloads(suite) if not patterns or any(fnmatchcase(w.name, p) for p in patterns)]
    if not found:
        names = ", ".join(w.name for w in workloads(suite))
        raise typer.BadParameter(f"the suite has none of that name: {names}", param_hint="--workload")
    return found


# A worker's process imports this file again.
if __name__ == "__main__":
    # A job that is cancelled leaves no checkpoints behind: the exit unwinds the contexts that remove them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()
