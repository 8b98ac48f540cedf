"""The command `python -m benchmarks`."""

import os
import shlex
import signal
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from spectrum_stream import SpectrumStreamError

from . import history
from .measuring import Settings, machine, measure_checkpoint, measure_workload
from .regression import NotComparable, load, regressions
from .report import markdown, tables
from .results import RunResult
from .worker import WorkerError
from .workloads import Suite, Workload, workloads

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command(epilog="Exit codes: 0 done, 1 a regression or a failure, 2 usage.")
def main(
    suite: Annotated[
        Suite, typer.Option(help="ci takes less than three minutes, full about half an hour")
    ] = Suite.CI,
    model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", exists=True, help="Checkpoint to measure on, instead of a suite"),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Workload of the suite, by name or glob; repeatable"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File for all numbers, as JSON")
    ] = None,
    history_file: Annotated[
        Path | None,
        typer.Option(
            "--history", metavar="FILE", help="File of ratios for github-action-benchmark (customBiggerIsBetter)"
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for benchmarks/results, as Markdown")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Saved run to compare with; a worse ratio exits with 1"),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Share by which a ratio may be worse")] = 0.2,
    repetitions: Annotated[int, typer.Option(min=1, help="Turns of each contender")] = 3,
    numpy: Annotated[bool, typer.Option(help="Time numpy too")] = True,
    device: Annotated[str, typer.Option(help="Device of our scan and of Spectrum's SVD: cpu, cuda, cuda:N")] = "cpu",
    cold: Annotated[
        bool, typer.Option("--cold", help="Empty the page cache of the checkpoint before every turn (Linux)")
    ] = False,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for checkpoints, which are kept and reused by later runs"),
    ] = None,
) -> None:
    """Time a scan against Spectrum's SVD and numpy's, and check its scores"""
    # A file or a CI log has no width.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    if cold and not hasattr(os, "posix_fadvise"):
        raise typer.BadParameter("this system cannot drop a file from its page cache", param_hint="--cold")
    try:
        # This comes first, so that a bad file fails before the measurement, which takes minutes.
        baseline = load(against) if against else None
        with ExitStack() as stack:
            folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-checkpoints-")))
            settings = Settings(
                repetitions=repetitions,
                with_numpy=numpy,
                device=device,
                cold=cold,
                folder=folder.resolve(),
                say=lambda line: progress.print(line, markup=False),
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
        if history_file is not None:
            history.save(run, history_file)
        if report is not None:
            command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
            report.write_text(markdown(run, command, date.today()), "utf-8")
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
        raise typer.BadParameter(f"no such workload in the suite: {names}", param_hint="--workload")
    return found


# The process of a worker imports this file again, and must not run it.
if __name__ == "__main__":
    # A canceled job leaves no checkpoints, because the exit unwinds the contexts that remove them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()
