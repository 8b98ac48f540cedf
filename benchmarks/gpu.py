"""Prove and measure a GPU: `python -m benchmarks.gpu -o FOLDER`.

The command takes at most six minutes. It runs from a checkout on a machine with torch, numpy, safetensors, typer,
huggingface_hub, pyyaml, pytest and hypothesis, and writes `gpu.json` and `gpu.md`. Both are written after every
section, so that a killed run keeps its sections. `--device cpu --quick` tries everything at toy sizes in a few
seconds.
"""

import gc
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spectrum_stream.errors import UsageError
from spectrum_stream.numerics.device import open_device
from spectrum_stream.text import si_bytes

from . import gpu_proofs, gpu_speed, gpu_steps
from .gpu_bench import Bench, Findings, Row

# Endings of names, and the units that they stand for in tables. Sizes in bytes are shown with their own unit.
_UNITS = {
    "gb_per_s": "GB/s", "gflop_per_s": "GFLOP/s", "tflop_per_s": "TFLOP/s", "_nbytes": "", "seconds": "s",
    "seconds_a_matrix": "s a matrix", "_s": "(s)",
}  # fmt: skip

Measure = Callable[[Bench, Findings], None]


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the run.

    Attributes:
        name: its name in the files.
        measure: the function that measures it; its docstring introduces the section in `gpu.md`.
        share: its share of the time, relative to the shares of the sections after it.
        least_s: the least time for the section, in seconds; with less, it is left out.
    """

    name: str
    measure: Measure
    share: float
    least_s: float


SECTIONS = (
    Section("machine", gpu_steps.machine, 10, 2),
    Section("tests", gpu_proofs.run_tests, 80, 20),
    Section("known spectra", gpu_proofs.known_spectra, 25, 5),
    Section("batch limit", gpu_proofs.batch_limit, 35, 5),
    Section("scores", gpu_proofs.scores, 60, 20),
    Section("memory", gpu_proofs.memory, 10, 5),
    Section("eigenvalues", gpu_steps.eigenvalues, 45, 5),
    Section("products", gpu_steps.products, 12, 3),
    Section("against Spectrum's loop", gpu_speed.against_spectrum, 55, 5),
    Section("ours by shape", gpu_speed.ours_by_shape, 35, 5),
    Section("overlap", gpu_speed.overlap, 15, 5),
)


def main(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for gpu.json and gpu.md")
    ] = Path("gpu"),
    device: Annotated[str, typer.Option(help="Device to prove: cuda, cuda:N, or cpu to try the command")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes, to try the command")] = False,
    budget_s: Annotated[float, typer.Option(min=1, help="Seconds for all sections together")] = 330,
) -> None:
    """Prove and measure a GPU: results, limits, memory, rates and projected scans"""
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)

    try:
        opened = open_device(device)
    except UsageError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    # From here on, calls of torch.cuda without a device use this one.
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    output.mkdir(parents=True, exist_ok=True)
    head = {
        "date": f"{datetime.now(UTC):%d %B %Y}".lstrip("0"),
        "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}",
        "device": device,
        "quick": quick,
        "budget_s": budget_s,
    }
    found: dict[str, Findings] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
        bench = Bench(device=device, opened=opened, quick=quick, folder=Path(folder), say=say)
        for i, section in enumerate(SECTIONS):
            left = budget_s - (time.monotonic() - started)
            allotted = left * section.share / sum(later.share for later in SECTIONS[i:])
            found[section.name] = run_section(section, bench, allotted)
            write(output, head, found)
    last = Section("projection", lambda bench, findings: gpu_speed.projection(findings, found), 1, 0)
    found[last.name] = run_section(last, bench, 1)
    write(output, head | {"took_s": time.monotonic() - started}, found)
    say(f"{output / 'gpu.md'}: {', '.join(summary(found))}")
    if any(findings.failed or findings.problems for findings in found.values()):
        raise typer.Exit(1)


def run_section(section: Section, bench: Bench, allotted_s: float) -> Findings:
    """Run a section within its time. A failure ends this section only."""
    findings = Findings(section=section.name)
    if allotted_s < section.least_s and not bench.quick:
        findings.left_out.append(f"all: it needs at least {section.least_s:g} s, and has {max(allotted_s, 0):.1f} s")
        bench.say(f"== {section.name}: left out")
        return findings
    bench.say(f"== {section.name}: about {allotted_s:.0f} s")
    started = time.monotonic()
    bench.deadline = started + allotted_s
    try:
        section.measure(bench, findings)
    except Exception as error:  # an error must not end the other sections
        findings.failed = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
        bench.say(f"failed: {type(error).__name__}: {str(error)[:300]}")
    # A traceback held the tensors of the section until here.
    gc.collect()
    findings.seconds = time.monotonic() - started
    for problem in findings.problems[:5]:
        bench.say(f"problem: {problem[:300]}")
    return findings


def summary(found: Mapping[str, Findings]) -> list[str]:
    """Count failed sections, problems and measurements that were left out, in words."""
    return [
        f"{len(found)} sections",
        f"{sum(bool(findings.failed) for findings in found.values())} failed",
        f"{sum(len(findings.problems) for findings in found.values())} problems",
        f"{sum(len(findings.left_out) for findings in found.values())} measurements left out",
    ]


def write(folder: Path, head: Row, found: Mapping[str, Findings]) -> None:
    """Write both files. Each replaces its predecessor as a whole."""
    data = head | {"sections": [asdict(findings) for findings in found.values()]}
    for name, text in (("gpu.json", json.dumps(data, indent=1)), ("gpu.md", markdown(head, found))):
        unfinished = folder / f"{name}.new"
        unfinished.write_text(text, "utf-8")
        unfinished.replace(folder / name)


def markdown(head: Row, found: Mapping[str, Findings]) -> str:
    """Render the findings as a dated result file."""
    lines = [f"# A GPU, {head['date']}", ""]
    if "machine" in found and (facts := found["machine"].facts):
        lines += [
            f"- Hardware: {facts.get('card', 'no GPU')}; {facts['processor']}, {facts['cores']} cores,"
            f" {facts['matrix_units']}, {si_bytes(facts['memory_nbytes'])}",
            f"- Versions: torch {facts['torch']}, CUDA {facts['cuda']}, driver {facts.get('driver', 'not known')},"
            f" Python {facts['python']}; commit {facts['commit']}",
        ]
    lines += [f"- Command: `{head['command']}`", "", f"{', '.join(summary(found))}."]
    if head["quick"]:
        lines += ["", "**Toy sizes: these numbers only show that the command works.**"]
    for section in (*SECTIONS, None):
        name = section.name if section else "projection"
        if name in found:
            measure: Callable[..., object] = section.measure if section else gpu_speed.projection
            lines += ["", f"## {name[0].upper()}{name[1:]}", "", *_introduction(measure)]
            lines += _findings(found[name])
    return "\n".join(lines) + "\n"


def _introduction(measure: Callable[..., object]) -> list[str]:
    return [line.strip() for line in (measure.__doc__ or "").strip().splitlines()]


def _findings(findings: Findings) -> list[str]:
    lines = ["", f"It took {findings.seconds:.1f} s."]
    if findings.facts:
        lines += ["", "| | |", "|---|---|"]
        lines += [f"| {_words(key)} | {_shown(key, value)} |" for key, value in findings.facts.items()]
    for name, rows in findings.tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"### {name[0].upper()}{name[1:]}", ""]
        lines += [f"| {' | '.join(map(_words, columns))} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(_shown(key, row.get(key)) for key in columns)} |" for row in rows]
    for title, sentences in (("Wrong", findings.problems), ("Left out", findings.left_out)):
        if sentences:
            lines += ["", f"{title}:", "", *(f"- {' '.join(sentence.split())}" for sentence in sentences)]
    if findings.failed:
        lines += ["", "**This section failed:**", "", *(f"    {line}" for line in findings.failed.splitlines())]
    return lines


def _words(key: str) -> str:
    for ending, unit in _UNITS.items():
        if key.endswith(ending):
            return f"{key.removesuffix(ending).rstrip('_')} {unit}".replace("_", " ").strip()
    return key.replace("_", " ")


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key.endswith("nbytes") and isinstance(value, int):
        return si_bytes(value)
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    # A canceled run leaves no checkpoints, because the exit unwinds the contexts that remove them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    typer.run(main)
