"""Sections of `python -m benchmarks.gpu`: whole computations.

They are Spectrum's loop, single shapes, a scan, and projected models.
"""

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from spectrum_stream import plan
from spectrum_stream.numerics.dequantize import Scaled, Weights
from spectrum_stream.numerics.schedule import Computed, compute_all
from spectrum_stream.numerics.snr import score

from . import contenders
from .checkpoints import make_checkpoint
from .contenders import Task
from .gpu_bench import Bench, Findings, Row, gram_on_matrix_units, random_weight
from .gpu_projection import MODELS, Rates, Shape, project
from .gpu_proofs import counted, experts, how, layer, scan_here
from .matrices import describe

_PIECE_NBYTES = 1 << 24
# The largest size of the weights in a measurement of our program, and the time that this measurement should take.
_ITEMS_NBYTES = 1_000_000_000
_ITEMS_S = 1.0


def against_spectrum(bench: Bench, findings: Findings) -> None:
    """Compare this program with Spectrum's loop, on the same matrices in memory.

    The times are seconds a matrix. Spectrum copies a matrix to the device, takes `svdvals` of a float32 copy, and
    copies the values back. Its default driver is gesvdj.
    """
    grid = [(768, 2048), (1024, 4096), (4096, 4096), (14336, 4096), (8192, 28672)]
    grid = [(24, 64), (48, 96)] if bench.quick else grid
    drivers = {"gesvdj": None, "gesvd": "gesvd"} if bench.is_cuda else {"gesvdj": None}
    taken: dict[str, float] = {}
    for n, m in grid:
        if not bench.has_time(findings, f"{n} x {m}", 0):
            continue
        w = random_weight(n, m, bench.device).cpu()
        ours = _time_ours(bench, findings, (n, m, "BF16"))
        row: Row = {"n": n, "m": m, "ours_s": ours[0] if ours else None}
        for driver, option in drivers.items():
            work = min(n, m) ** 2 * max(n, m)
            run = partial(_time_svdvals, bench, w, option)
            what = f"svdvals ({driver}) of {n} x {m}"
            if seconds := bench.attempt(findings, what, work * taken.get(driver, 0.0), run):
                row[f"{driver}_s"] = seconds
                taken[driver] = seconds / work
        for driver in drivers:
            if row["ours_s"] and f"{driver}_s" in row:
                row[f"times_{driver}"] = row[f"{driver}_s"] / row["ours_s"]
        findings.add_row("against Spectrum's loop", **row)
        bench.say(f"{n} x {m}: {', '.join(f'{k} {v:.3g}' for k, v in row.items() if k not in 'nm' and v)}")
    add_layer_ratios(findings)


def _time_svdvals(bench: Bench, w: torch.Tensor, driver: str | None) -> float:
    run = partial(_spectrums_score, w, bench.device, driver)
    seconds, _ = bench.time_once(run)
    # The first call also loads libraries.
    return bench.time_once(run)[0] if seconds < _ITEMS_S else seconds


def _spectrums_score(w: torch.Tensor, device: str, driver: str | None) -> float:
    values = torch.linalg.svdvals(w.to(device).float(), driver=driver).cpu().numpy()
    return score(values, *w.shape).snr


def add_layer_ratios(findings: Findings) -> None:
    """Add the ratios of a whole layer, from the seconds of its shapes."""
    counts = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 3}
    rows = {(row["n"], row["m"]): row for row in findings.tables.get("against Spectrum's loop", ())}
    for driver in ("gesvdj", "gesvd"):
        if all(f"times_{driver}" in rows.get(shape, ()) for shape in counts):
            theirs, ours = (sum(c * rows[s][k] for s, c in counts.items()) for k in (f"{driver}_s", "ours_s"))
            findings.facts[f"times_{driver}_for_a_layer_of_llama_3_8b"] = theirs / ours


def ours_by_shape(bench: Bench, findings: Findings) -> None:
    """Time this program on every shape of the projected models.

    The times are seconds a matrix, from memory to the score. The batches have up to 1 GB of weights. Quantized
    weights are dequantized on the way.
    """
    shapes = {shape: None for model in MODELS for shape in model.shapes}
    for n, m, dtype in shapes:
        if bench.quick:
            n, m = max(8, n // 64), max(8, m // 64)
        if found := _time_ours(bench, findings, (n, m, dtype)):
            seconds, computed = found
            findings.add_row(
                "ours by shape", n=n, m=m, dtype=dtype, seconds_a_matrix=seconds, computed=counted(map(how, computed))
            )
            bench.say(f"ours, {n} x {m} {dtype}: {seconds:.3g} s")


def _time_ours(bench: Bench, findings: Findings, shape: Shape) -> tuple[float, list[Computed]] | None:
    """Return our seconds a matrix of a shape, and the matrices of the timed batch."""
    n, m, dtype = shape
    # The eigenvalues of 8192 x 8192 take seconds on a slow card.
    if not bench.has_time(findings, f"ours, {n} x {m} {dtype}", min(n, m) ** 3 / 5e11):
        return None
    distinct = [_weights(n, m, dtype, bench.device, seed) for seed in range(2)]
    seconds, computed = _compute(bench, distinct, shape)
    if seconds < _ITEMS_S:
        # The first call also loads libraries.
        seconds, computed = _compute(bench, distinct, shape)
    count = int(min(_ITEMS_NBYTES / (2 * n * m), 2 * min(_ITEMS_S, bench.left_s) / seconds, 512))
    if count > 2 and not bench.quick:
        seconds, computed = _compute(bench, [distinct[i % 2] for i in range(count)], shape)
    return seconds / len(computed), computed


def _weights(n: int, m: int, dtype: str, device: str, seed: int) -> Weights:
    w = random_weight(n, m, device, seed)
    if dtype == "BF16":
        return w.cpu()
    # The scales of blocks of 128 x 128, as in DeepSeek-V3.
    scales = torch.full((-(-n // 128), -(-m // 128)), 0.01)
    return Scaled((w.float() * 100).to(torch.float8_e4m3fn).cpu(), scales, (128, 128))


def _compute(bench: Bench, ws: list[Weights], shape: Shape) -> tuple[float, list[Computed]]:
    """Compute matrices as a scan does, from memory; return seconds and the results."""
    n, m, dtype = shape
    items = [(describe(f"m{i}", dtype, n, m, nbytes=2 * n * m), w) for i, w in enumerate(ws)]
    return bench.time_once(lambda: [computed for _, computed in compute_all(items, device=bench.opened)])


def overlap(bench: Bench, findings: Findings) -> None:
    """Compare a scan with its parts: reading, copying and computing alone.

    The other parts can be hidden behind the slowest one. The overlap is the share of their time that is hidden: 1 if
    the scan takes as long as the slowest part, 0 if it takes as long as all parts together. Reading uses a warm page
    cache. Copying goes from pinned memory to the device. Kernels are products and eigenvalues of weights on the
    device, by torch alone. Computing is this program's, from memory to the scores, with its copies and kernels.
    """
    # At toy sizes one workload is enough, because the overlap means nothing and each workload takes a second.
    for workload in (layer(bench),) if bench.quick else (layer(bench), experts(bench)):
        if not bench.has_time(findings, workload.name, 0):
            continue
        folder = make_checkpoint(workload, workload.timed_dtype, bench.folder)
        nbytes = plan(str(folder)).read_nbytes
        cold_s = _read_cold(folder)
        parts = contenders.parts(Task(str(folder), bench.device))
        copying_s = _copy(bench, nbytes)
        kernels_s = _kernels(bench, Counter((min(w.n, w.m), max(w.n, w.m)) for w in workload.weights))
        scan_s = min(bench.time_once(partial(scan_here, bench, folder, bench.device))[0] for _ in range(2))
        alone = [parts.reading, copying_s, kernels_s]
        findings.add_row(
            "a scan and its parts",
            workload=workload.name,
            nbytes=nbytes,
            reading_s=parts.reading,
            copying_s=copying_s,
            kernels_s=kernels_s,
            computing_s=parts.computing,
            scan_s=scan_s,
            scan_over_slowest=scan_s / max(alone),
            overlap=(sum(alone) - scan_s) / (sum(alone) - max(alone)),
            scan_over_parts=scan_s / max(parts.reading, parts.computing),
            reading_gb_per_s=nbytes / parts.reading / 1e9,
            cold_gb_per_s=None if cold_s is None else nbytes / cold_s / 1e9,
        )
        bench.say(f"{workload.name}: scan {scan_s:.3g} s; parts {', '.join(f'{part:.3g} s' for part in alone)}")


def _read_cold(folder: Path) -> float | None:
    """Copy every byte of a checkpoint from the disk; return seconds.

    Return None where the page cache cannot be emptied.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        with shard.open("rb") as file:
            # Pages that are not on the disk yet would stay in the cache.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(_PIECE_NBYTES)
    started = time.perf_counter()
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def _copy(bench: Bench, nbytes: int) -> float:
    """Copy this many bytes from pinned memory to the device; return seconds."""
    piece = min(_PIECE_NBYTES, nbytes)
    source = torch.zeros(piece, dtype=torch.uint8, pin_memory=bench.is_cuda)
    target = torch.empty(piece, dtype=torch.uint8, device=bench.device)

    def copy() -> None:
        for _ in range(nbytes // piece):
            target.copy_(source, non_blocking=True)

    return bench.measure(copy).seconds


def _kernels(bench: Bench, shapes: Mapping[tuple[int, int], int]) -> float:
    """Compute K and its eigenvalues on the device, by torch alone; return seconds."""
    total = 0.0
    for (n, m), count in shapes.items():
        batch = min(count, 64)
        w = torch.stack([random_weight(n, m, bench.device, seed) for seed in range(batch)])
        found = bench.measure(lambda: torch.linalg.eigvalsh(gram_on_matrix_units(w)))  # noqa: B023
        total += found.seconds * count / batch
    return total


def projection(findings: Findings, earlier: Mapping[str, Findings]) -> None:
    """Project scans of whole models.

    This is arithmetic, and these models were not scanned.

    computing = sum over shapes of count * seconds a matrix, from "ours by shape". The time of a shape that was not
    measured is the time of the eigenvalues of its short side, interpolated, + 2 short² long / rate of the product.
    scan = overhead * max(computing, bytes / rate of reading). The overhead is the time of a measured scan over that
    of the slower of reading and computing alone.
    """
    ours, eigen, product, whole = (
        [row for rows in earlier[name].tables.values() for row in rows] if name in earlier else []
        for name in ("ours by shape", "eigenvalues", "products", "overlap")
    )
    if not whole:
        findings.left_out.append("all: the rate of reading was not measured")
        return
    eigenvalue_s: dict[int, float] = {}
    for row in eigen:
        if row["dtype"] == "float32":
            eigenvalue_s[row["n"]] = min(eigenvalue_s.get(row["n"], float("inf")), row["seconds_a_matrix"])
    rates = Rates(
        seconds={(row["n"], row["m"], row["dtype"]): row["seconds_a_matrix"] for row in ours},
        eigenvalues=eigenvalue_s,
        product=max((row["tflop_per_s"] for row in product if row["arithmetic"] == "matrix units"), default=0) * 1e12,
        reading=max(row["cold_gb_per_s"] or row["reading_gb_per_s"] for row in whole) * 1e9,
        overhead=max(1.0, min(row["scan_over_parts"] for row in whole)),
    )
    findings.facts |= {
        "product_tflop_per_s": rates.product / 1e12,
        "reading_gb_per_s": rates.reading / 1e9,
        "overhead": rates.overhead,
    }
    for model in MODELS:
        if not rates.suffice(model):
            findings.left_out.append(f"{model.name}: a shape was not measured, nor eigenvalues and products")
            continue
        numbers = asdict(project(model, rates))
        (n, m, dtype), seconds = numbers.pop("costliest")
        findings.add_row(
            "projections",
            model=model.name,
            matrices=model.matrices,
            nbytes=model.nbytes,
            **numbers,
            costliest=f"{n} x {m} {dtype}: {seconds:.3g} s",
        )
