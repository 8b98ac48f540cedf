"""Sections of `python -m benchmarks.gpu`: the proofs.

They are the tests, known spectra, limits, scores and memory.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import chdir
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spectrum_stream import plan, scan
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics import costs
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.schedule import Computed, compute_batch
from spectrum_stream.numerics.snr import score
from spectrum_stream.results.record import Record

from .checkpoints import known_scores, make_checkpoint
from .gpu_bench import ELEMENTS_LIMIT, Bench, Findings, failure_of_call, gram_on_matrix_units, random_weight
from .matrices import matrix
from .spectra import Kind, draw
from .workloads import Suite, Weight, Workload, workloads

_ROOT = Path(__file__).parent.parent
# Even if the section is late, the tests get this many seconds.
_LEAST_S = 1.0
_OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
# A matrix that is made from a known spectrum has these errors: of a value in units of sigma_1, and of a score.
_MADE_VALUE = 1e-14
_MADE_SCORE = 1e-12
# The rounding to float32 moves the score of a hard spectrum by at most this (see benchmarks/README.md), and that of a
# toy with few values by more.
_ROUNDED_SCORE, _ROUNDED_TOY_SCORE = 5e-7, 1e-5


def run_tests(bench: Bench, findings: Findings) -> None:
    """Run the project's tests with the mark `gpu` in a separate process."""
    # Other files of tests need packages that a bare machine lacks.
    files = [
        str(f) for f in sorted((_ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in f.read_text("utf-8")
    ]
    options = ["-m", "gpu", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-W", "default"]
    # With the variable CI, a skipped test is an error, but without a device all tests are skipped.
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"PYTHONUNBUFFERED": "1"}
    output, code = bench.folder / "tests.txt", None
    with output.open("w") as stream:
        try:
            code = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *files],
                cwd=_ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=max(bench.left_s, _LEAST_S),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            findings.left_out.append("the tests after the last one that is counted: the time was up")
    text = output.read_text("utf-8", "replace")
    outcomes = dict(_OUTCOME.findall(text))
    counts = Counter(outcomes.values())
    findings.facts |= {
        "files": len(files),
        "exit_code": code,
        **{outcome.lower(): counts[outcome] for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED")},
    }
    findings.problems += [
        f"{test}: {outcome.lower()}" for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")
    ]
    if code not in (0, None):
        findings.problems.append(f"pytest ended with {code}: {text[-3000:]}")


def known_spectra(bench: Bench, findings: Findings) -> None:
    """Compare singular values with known ones.

    The comparison covers every precision and dtype, and several batch sizes. float64 matrices are made from their
    spectra. The reference of a 16-bit matrix is its SVD in float64.
    """
    grid = (
        [(24, 60, 1), (48, 96, 3)]
        if bench.quick
        else [(256, 700, 1), (256, 700, 64), (1024, 3072, 8), (2048, 2048, 4)]
    )
    for n, m, batch in grid:
        if not bench.has_time(findings, f"{batch} of {n} x {m}", 0):
            continue
        made = [_made(n, m, seed) for seed in range(batch)]
        for precision in Precision:
            # The SVD of a large matrix takes long, and it never runs on the device.
            few = 2 if precision is Precision.SVD else batch
            if precision is Precision.SVD and n > 1024:
                continue
            _compare_spectra(bench, findings, [w for w, _ in made[:few]], [s for _, s in made[:few]], precision)
    for n, m, batch in [(48, 96, 2)] if bench.quick else [(256, 700, 4), (1024, 4096, 2)]:
        if not bench.has_time(findings, f"{batch} of {n} x {m} in 16 bits", 0):
            continue
        for dtype in (torch.bfloat16, torch.float16):
            ws = [_made(n, m, seed)[0].to(dtype) for seed in range(batch)]
            exact = [torch.linalg.svdvals(w.double()).numpy() for w in ws]
            # The SVD is the reference.
            for precision in (other for other in Precision if other is not Precision.SVD):
                _compare_spectra(bench, findings, ws, exact, precision)


def _made(n: int, m: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    kinds = (Kind.BULK_AND_SPIKES, Kind.POWER_LAW, Kind.HUGE_SIGMA1_1E2)
    rng = np.random.default_rng([n, m, seed])
    s = draw(kinds[seed % len(kinds)], min(n, m), max(n, m), rng)
    return matrix(s, n, m, torch.float64, rng), s


def _compare_spectra(
    bench: Bench, findings: Findings, ws: Sequence[torch.Tensor], known: Sequence[np.ndarray], precision: Precision
) -> None:
    n, m = ws[0].shape
    name = f"{str(ws[0].dtype)[6:]} {n} x {m}, batch of {len(ws)}, {precision}"
    seconds, computed = bench.time_once(lambda: compute_batch(ws, precision=precision, device=bench.opened))
    value_error = value_ratio = score_error = score_ratio = 0.0
    for i, (found, s) in enumerate(zip(computed, known, strict=True)):
        if isinstance(found.spectrum, NoScore) or found.score is None:
            findings.problems.append(f"{name}: matrix {i} has no score: {found.spectrum}")
            continue
        error = np.abs(found.spectrum.values - s)
        value_error = max(value_error, float((error / s).max()))
        value_ratio = max(value_ratio, float((error / (found.spectrum.errors + _MADE_VALUE * s[0])).max()))
        off = abs(found.score.snr / score(s, n, m).snr - 1)
        score_error = max(score_error, off)
        score_ratio = max(score_ratio, off / (found.score.error + _MADE_SCORE))
        if not off <= found.score.error + _MADE_SCORE:
            findings.problems.append(
                f"{name}: the score of matrix {i} is off by {off:.2g}, estimated {found.score.error:.2g}"
            )
    findings.add_row(
        "known spectra",
        dtype=str(ws[0].dtype)[6:],
        n=n,
        m=m,
        batch=len(ws),
        precision=str(precision),
        computed=counted(how(found) for found in computed),
        value_error=value_error,
        value_error_over_estimate=value_ratio,
        score_error=score_error,
        score_error_over_estimate=score_ratio,
        seconds=seconds,
    )
    bench.say(f"{name}: score off by {score_error:.1e}, {score_ratio:.2g} of the estimate")


def batch_limit(bench: Bench, findings: Findings) -> None:
    """Compute the largest batch that cuSOLVER takes, and one matrix more.

    The limit is n * n * batch <= 2^31 - 1. All matrices of a batch are equal and have a known spectrum, so that a
    wrong result is seen.
    """
    n, m = (16, 32) if bench.quick else (2048, 2048)
    # A CPU has no such limit, so a toy size takes any number.
    limit = 8 if bench.quick else ELEMENTS_LIMIT // n**2
    w16 = _made(n, m, 0)[0].bfloat16()
    reference = torch.linalg.svdvals(w16.double()).numpy()
    findings.facts |= {"n": n, "limit": limit}
    trial = min(8, limit)
    compute = partial(compute_batch, precision=Precision.FP32, device=bench.opened)
    # The first call also loads libraries.
    each = min(bench.time_once(partial(compute, [w16] * trial))[0] for _ in range(2))
    for batch in (limit + 1, limit):
        if bench.has_time(findings, f"ours, a batch of {batch}", each / trial * batch):
            seconds, computed = bench.time_once(partial(compute, [w16] * batch))
            wrong = sum(not _is_near(found, reference) for found in computed)
            places = counted(how(found) for found in computed)
            findings.add_row("batches", by="ours", batch=batch, seconds=seconds, wrong=wrong, outcome=places)
            if wrong:
                findings.problems.append(f"{wrong} of a batch of {batch} through this program are wrong: {places}")
    k = gram_on_matrix_units(w16.to(bench.device)[None])
    each = bench.measure(lambda: torch.linalg.eigvalsh(k.expand(trial, -1, -1))).seconds
    for batch in (limit + 1, limit):
        if 3 * batch * n * n * 4 > bench.free_nbytes():
            findings.left_out.append(f"torch, a batch of {batch}: too little memory")
        elif bench.has_time(findings, f"torch, a batch of {batch}", each / trial * batch):
            # If torch alone fails or is wrong with one matrix more, this is not a problem of this program.
            findings.add_row("batches", by="torch alone", batch=batch, **_try_eigenvalues(bench, k, batch, reference))


def _is_near(found: Computed, reference: np.ndarray) -> bool:
    if isinstance(found.spectrum, NoScore):
        return False
    return bool(np.abs(found.spectrum.values - reference).max() <= 1e-4 * reference[0])


def _try_eigenvalues(bench: Bench, k: torch.Tensor, batch: int, reference: np.ndarray) -> dict[str, object]:
    try:
        many = k.expand(batch, -1, -1).contiguous()
        seconds, values = bench.time_once(lambda: torch.linalg.eigvalsh(many))
    except RuntimeError as error:
        return {"seconds": None, "wrong": None, "outcome": failure_of_call(error)}
    largest = torch.from_numpy(reference[::-1] ** 2).to(values)
    right = (values - largest).abs().amax(1) <= 1e-4 * largest[-1]
    wrong = len(right) - int(right.sum())
    return {"seconds": seconds, "wrong": wrong, "outcome": "values"}


def scores(bench: Bench, findings: Findings) -> None:
    """Compare scores on the device with scores on the CPU, within both estimates.

    The matrices are a layer of Llama-3-8B, experts as separate and as fused parameters, and the hard spectra.
    """
    results: dict[str, dict[str, Record]] = {}
    for workload in (layer(bench), experts(bench), hard(bench)):
        if not bench.has_time(findings, workload.name, 0):
            continue
        seconds, folder = bench.time_once(partial(make_checkpoint, workload, workload.timed_dtype, bench.folder))
        bench.say(f"{workload.name}: {len(workload.weights)} matrices made in {seconds:.1f} s")
        timed = {name: bench.time_once(partial(scan_here, bench, folder, name)) for name in (bench.device, "cpu")}
        (device_s, on_device), (cpu_s, on_cpu) = timed[bench.device], timed["cpu"]
        results[workload.name] = on_cpu
        _compare_scores(findings, workload.name, on_device, on_cpu, device_s, cpu_s)
        if workload.timed_dtype == "float32":
            rounding = _ROUNDED_TOY_SCORE if bench.quick else _ROUNDED_SCORE
            _compare_with_known(findings, workload, on_device, rounding)
        bench.say(f"{workload.name}: {device_s:.2f} s on {bench.device}, {cpu_s:.2f} s on the CPU")
    name = experts(bench).name
    if name not in results or not bench.has_time(findings, "fused experts", 0):
        return
    folder = _fuse_experts(bench.folder / f"{name}-bfloat16", bench.folder / "fused")
    fused_s, fused = bench.time_once(lambda: scan_here(bench, folder, bench.device))
    by_number = {f"model.layers.{module.rsplit('.', 1)[1]}.mlp.experts.0.gate_proj": r for module, r in fused.items()}
    _compare_scores(findings, f"{name}, fused", by_number, results[name], fused_s, None)


def scan_here(bench: Bench, folder: Path, device: str) -> dict[str, Record]:
    """Scan a checkpoint; return the records by module."""
    # A scan writes two of its files into the working folder.
    with chdir(bench.folder):
        result = scan(str(folder), name="check", out="results", fresh=True, device=device)
    return {record.module: record for record in result.records}


def _compare_scores(
    findings: Findings,
    name: str,
    found: Mapping[str, Record],
    reference: Mapping[str, Record],
    device_s: float,
    cpu_s: float | None,
) -> None:
    worst, ratio, beyond = 0.0, 0.0, 0
    for module, there in reference.items():
        here = found[module]
        if here.score is None or there.score is None:
            findings.problems.append(f"{name}: {module} has no score: {here.no_score}, on the CPU {there.no_score}")
            continue
        off = abs(here.score.snr / there.score.snr - 1)
        estimate = here.score.error + there.score.error
        worst, ratio = max(worst, off), max(ratio, off / estimate if estimate else 0.0)
        if not off <= estimate:
            beyond += 1
            findings.problems.append(
                f"{name}: the score of {module} is off by {off:.2g}, estimated {here.score.error:.2g}"
                f" and {there.score.error:.2g} ({here.precision} on {here.device}, {there.precision} on the CPU)"
            )
    findings.add_row(
        "device against CPU",
        workload=name,
        matrices=len(found),
        worst_difference=worst,
        over_both_estimates=ratio,
        beyond=beyond,
        computed=counted(map(_how_recorded, found.values())),
        on_the_cpu=counted(map(_how_recorded, reference.values())),
        device_s=device_s,
        cpu_s=cpu_s,
    )


def _compare_with_known(findings: Findings, workload: Workload, found: Mapping[str, Record], rounding: float) -> None:
    kinds = {weight.module: weight.kind for weight in workload.weights}
    for module, known in known_scores(workload).items():
        record = found[module]
        if record.score is not None:
            off, allowed = abs(record.score.snr / known - 1), record.score.error + rounding
            findings.add_row(
                "hard spectra against known scores",
                kind=str(kinds[module]),
                n=record.n,
                m=record.m,
                precision=str(record.precision),
                device=record.device,
                error=off,
                estimate=record.score.error,
            )
            if not off <= allowed:
                findings.problems.append(
                    f"{module}: the score is off by {off:.2g}, estimated {record.score.error:.2g}"
                )


def memory(bench: Bench, findings: Findings) -> None:
    """Compare the peak of the device memory with the plan and with the limit.

    The peak of a single matrix is compared with the figure of the plan: the memory of the largest matrix at the most
    exact precision that runs on the device. A scan computes as many matrices at once as the limit allows, so its peak
    is compared with the limit. torch allocates a part of the used memory. The rest belongs to the libraries and to
    the cache of torch.
    """
    workload = layer(bench)
    folder = make_checkpoint(workload, workload.timed_dtype, bench.folder)
    largest = max(workload.weights, key=lambda w: costs.work(w.n, w.m))
    w = random_weight(largest.n, largest.m, bench.device).cpu()
    alone = partial(compute_batch, [w], precision=Precision.FP64, device=bench.opened)
    planned = plan(str(folder)).device_nbytes
    _add_peak(bench, findings, f"{largest.n} x {largest.m} alone, fp64", planned, alone)
    for workload in (layer(bench), experts(bench)):
        folder = make_checkpoint(workload, workload.timed_dtype, bench.folder)
        whole = partial(scan_here, bench, folder, bench.device)
        _add_peak(bench, findings, f"scan of {workload.name}", bench.opened.batch_nbytes, whole)


def _add_peak(bench: Bench, findings: Findings, what: str, limit: int, run: Callable[[], object]) -> None:
    allocated, used = bench.peak_nbytes(run)
    findings.add_row("device memory", what=what, limit_nbytes=limit, allocated_nbytes=allocated, used_nbytes=used)
    if allocated > limit:
        findings.problems.append(f"{what}: {allocated} bytes of device memory, the limit is {limit}")


def layer(bench: Bench) -> Workload:
    """Return the layer of Llama-3-8B."""
    return _sized(bench, "llama3-8b-layer")


def experts(bench: Bench) -> Workload:
    """Return 128 experts."""
    return _sized(bench, "experts-768x2048")


def hard(bench: Bench) -> Workload:
    """Return two matrices of each hard spectrum, small enough for a second on a CPU."""
    workload = _sized(bench, "hard-spectra")
    weights = (
        w for w in workload.weights if w.n < w.m and w.module.startswith(("model.layers.0.", "model.layers.1."))
    )
    return replace(workload, weights=tuple(weights))


def _sized(bench: Bench, name: str) -> Workload:
    found = next(w for w in workloads(Suite.FULL) if w.name == name)
    if not bench.quick:
        return found
    tiny = (Weight(w.module, w.n // 32, w.m // 32, w.kind) for w in found.weights)
    return replace(found, weights=tuple(tiny)[:24])


def _fuse_experts(separate: Path, fused: Path) -> Path:
    """Write the experts of a checkpoint as one fused parameter; return the folder.

    Expert i comes from layer i.
    """
    index = json.loads((separate / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for shard in set(index.values()):
        with safe_open(separate / shard, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    in_order = [tensors[key] for key in sorted(tensors, key=lambda key: int(key.split(".")[2]))]
    fused.mkdir(exist_ok=True)
    save_file({"model.layers.0.mlp.experts.gate_proj": torch.stack(in_order)}, fused / "model.safetensors")
    return fused


def how(found: Computed) -> str:
    """Describe how a matrix was computed: `fp32 refined on cuda`."""
    if isinstance(found.spectrum, NoScore):
        return f"{found.spectrum} on {found.device}"
    return _in_words(found.spectrum.precision, found.spectrum.refined, found.device)


def _how_recorded(record: Record) -> str:
    return _in_words(record.precision or record.no_score, record.refined, record.device)


def _in_words(precision: Precision | NoScore | None, refined: int, device: str) -> str:
    return f"{precision}{' refined' if refined else ''} on {device}"


def counted(things: Iterable[str]) -> str:
    """Count equal words: `12 fp32 on cuda, 1 fp64 on cuda`."""
    return ", ".join(f"{count} {thing}" for thing, count in Counter(things).most_common())
