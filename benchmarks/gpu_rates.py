"""The sections of `python -m benchmarks.gpu` that measure: the machine, and the time and memory of every step."""

import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch

from spectrum_stream import plan
from spectrum_stream.model.matrix import Matrix
from spectrum_stream.numerics import costs
from spectrum_stream.numerics.dequantize import Scaled, Weights
from spectrum_stream.numerics.device import open_device
from spectrum_stream.numerics.schedule import compute_all
from spectrum_stream.numerics.snr import score

from . import contenders
from .checkpoints import make_checkpoint
from .contenders import Task
from .gpu_bench import ELEMENTS_LIMIT, Bench, Findings, Row, gram_on_matrix_units, random_weight
from .gpu_projection import MODELS, Rates, Shape, project
from .gpu_proofs import experts, layer, scan_here
from .hardware import processor
from .spectra import Kind, draw

_ROOT = Path(__file__).parent.parent
_PIECE_NBYTES = 1 << 24
# The weights of a measurement of our own, and the time that it should take.
_ITEMS_NBYTES = 1_000_000_000
_ITEMS_S = 1.0


def machine(bench: Bench, findings: Findings) -> None:
    """The machine, the versions, and the rates of its copies."""
    findings.facts |= {
        "system": platform.platform(),
        "processor": processor(),
        "cores": costs.count_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "commit": _output_of("git", "-C", str(_ROOT), "rev-parse", "HEAD"),
    }
    libraries = ("nvidia-cusolver", "nvidia-cublas")
    findings.facts |= {d.name: d.version for d in distributions() if (d.name or "").startswith(libraries)}
    if bench.is_cuda:
        properties = torch.cuda.get_device_properties(bench.device)
        findings.facts |= {
            "card": properties.name,
            "card_memory_nbytes": properties.total_memory,
            "card_free_nbytes": bench.free_nbytes(),
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _output_of("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"),
        }
    findings.facts["opening_the_device_s"], _ = bench.time_once(lambda: open_device(bench.device))
    # The probe's results, by their names.
    findings.facts |= {f.name: str(getattr(bench.opened, f.name)) for f in fields(bench.opened) if f.repr}
    nbytes = 1 << (20 if bench.quick else 28)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
    ways: dict[str, Callable[[], object]] = {"memory to memory": lambda: target.copy_(source)}
    if bench.is_cuda:
        pinned = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)
        ways |= {
            "memory to pinned memory": lambda: pinned.copy_(source),
            "pinned memory to device": lambda: on_device.copy_(pinned, non_blocking=True),
            "memory to device": lambda: on_device.copy_(source),
            "device to pinned memory": lambda: pinned.copy_(on_device, non_blocking=True),
        }
    for name, copy in ways.items():
        findings.add_row("copies", copy=name, gb_per_s=nbytes / bench.measure(copy).seconds / 1e9)


def _output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not known"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or "not known"


def eigenvalues(bench: Bench, findings: Findings) -> None:
    """Time, memory and error of the eigenvalues of known symmetric matrices.

    The largest batch is limited by cuSOLVER, by memory or by the time of this section.
    """
    sides = (24, 48) if bench.quick else (512, 1024, 2048, 4096, 8192)
    dtypes = (torch.float32, torch.float64)
    latest: dict[tuple[int, torch.dtype], Row] = {}
    for step, batch in enumerate((1, 8, None)):
        for n in sides:
            for dtype in dtypes:
                earlier = latest.get((n, dtype))
                needs = _guess_seconds(latest, n, dtype)
                chosen, limit = (batch, "") if batch else _largest_batch(bench, n, dtype, earlier)
                what = f"eigenvalues of {chosen or 'many'} of {n} x {n} in {str(dtype)[6:]}"
                if chosen <= 8 and step == 2:
                    findings.left_out.append(f"{what}: the batch is limited to {chosen} by {limit}")
                elif bench.has_time(findings, what, 2 * needs * chosen):
                    latest[n, dtype] = _time_eigenvalues(bench, findings, n, chosen, dtype, limit)


def _guess_seconds(latest: Mapping[tuple[int, torch.dtype], Row], n: int, dtype: torch.dtype) -> float:
    """Guess the seconds a matrix from this side, or from the next smaller one."""
    same = {side: row["seconds_a_matrix"] for (side, other), row in latest.items() if other is dtype and side <= n}
    return same[max(same)] * (n / max(same)) ** 3 if same else 0.0


def _largest_batch(bench: Bench, n: int, dtype: torch.dtype, earlier: Row | None) -> tuple[int, str]:
    """Return the largest batch, and the thing that limits it."""
    if earlier is None:
        return 0, "time"
    if bench.quick:
        return 9, "quickness"
    a_matrix = n * n * dtype.itemsize + earlier["extra_nbytes"] / earlier["batch"]
    limits = {
        "cuSOLVER": ELEMENTS_LIMIT // n**2,
        "memory": int(0.8 * bench.free_nbytes() / a_matrix),
        # The calls that are still to come share the time.
        "time": int(bench.left_s / 10 / earlier["seconds_a_matrix"]),
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _time_eigenvalues(bench: Bench, findings: Findings, n: int, batch: int, dtype: torch.dtype, limit: str) -> Row:
    spectrum = draw(Kind.BULK_AND_SPIKES, n, 3 * n, np.random.default_rng(n))[::-1] ** 2
    exact = torch.from_numpy(spectrum.copy())
    k = _known_symmetric(exact, bench.device).to(dtype).expand(batch, -1, -1).contiguous()
    found = bench.measure(lambda: torch.linalg.eigvalsh(k))
    loop_s = None
    if 1 < batch <= 8 and n <= 4096:
        loop_s, _ = bench.time_once(lambda: [torch.linalg.eigvalsh(one) for one in k])
    error = float(((found.value.double().cpu() - exact).abs() / exact).max())
    row: Row = {
        "n": n,
        "batch": batch,
        "limited_by": limit,
        "dtype": str(dtype)[6:],
        "seconds": found.seconds,
        "seconds_a_matrix": found.seconds / batch,
        "gflop_per_s": 4 / 3 * n**3 * batch / found.seconds / 1e9,
        "one_by_one_s": loop_s,
        "extra_nbytes": found.nbytes,
        "extra_over_matrices": found.nbytes / k.nbytes,
        "worst_relative_error": error,
    }
    findings.add_row("eigenvalues", **row)
    bench.say(f"{batch} of {n} x {n}, {str(dtype)[6:]}: {found.seconds:.3g} s")
    # An error of this size is no rounding.
    if error > 1e-2:
        findings.problems.append(f"eigenvalues of {batch} of {n} x {n} in {dtype} are wrong: by {error:.2g}")
    return row


def _known_symmetric(eigenvalues: torch.Tensor, device: str) -> torch.Tensor:
    """Make a dense symmetric (n, n) float64 matrix on the device with these (n,) eigenvalues.

    It is Q diag Qᵀ with Q a product of a few Householder reflections.
    """
    numbers = torch.Generator(device=device).manual_seed(len(eigenvalues))
    k = torch.diag(eigenvalues.to(device))
    for _ in range(4):
        v = torch.randn(len(k), 1, generator=numbers, device=device, dtype=k.dtype)
        v /= v.norm()
        k -= 2 * v @ (v.mT @ k)
        k -= 2 * (k @ v) @ v.mT
    return (k + k.mT) / 2


def products(bench: Bench, findings: Findings) -> None:
    """Rate and error of W Wᵀ of bfloat16 matrices, by each arithmetic.

    Errors are those of 64 rows of K against float64 on the CPU, in units of sqrt(K_ii K_jj). The shift is the mean
    relative error of the diagonal, which truncation makes negative.
    """
    grid = [(2, 48, 96)] if bench.quick else [
        (1, 1024, 4096), (128, 768, 2048), (16, 2048, 7168), (1, 4096, 14336), (1, 8192, 28672),
    ]  # fmt: skip
    for batch, n, m in grid:
        w = torch.stack([random_weight(n, m, bench.device, seed) for seed in range(min(batch, 4))])
        w = w.repeat(-(-batch // len(w)), 1, 1)[:batch].contiguous()
        rows = torch.arange(0, n, max(1, n // 64))[:64]
        first = w[0].cpu().double()
        exact = first[rows] @ first.mT
        scale = first.square().sum(1).sqrt()
        scale = scale[rows, None] * scale
        singles, doubles = w.float(), w.double()
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "float32": lambda: singles @ singles.mT,  # noqa: B023
            "matrix units": lambda: gram_on_matrix_units(w),  # noqa: B023
            "matrix units, blocks of 2048": lambda: _in_blocks(w, 2048),  # noqa: B023
            "matrix units, blocks of 512": lambda: _in_blocks(w, 512),  # noqa: B023
            "float64": lambda: doubles @ doubles.mT,  # noqa: B023
        }
        for name, run in ways.items():
            # A rate of 1 TFLOP/s is that of float64 on consumer cards.
            if not bench.has_time(findings, f"{name}, {batch} of {n} x {m}", 2 * batch * n * n * m / 5e11):
                continue
            found = bench.measure(run)
            error = (found.value[0].double().cpu()[rows] - exact) / scale
            findings.add_row(
                "products",
                batch=batch,
                n=n,
                m=m,
                arithmetic=name,
                seconds=found.seconds,
                tflop_per_s=2 * batch * n * n * m / found.seconds / 1e12,
                worst_error=float(error.abs().max()),
                rms_error=float(error.square().mean().sqrt()),
                shift=float(error[torch.arange(len(rows)), rows].mean()),
            )
            bench.say(f"{batch} of {n} x {m}, {name}: {findings.tables['products'][-1]['tflop_per_s']:.3g} TFLOP/s")


def _in_blocks(w: torch.Tensor, columns: int) -> torch.Tensor:
    """Add the products of blocks of columns in float64."""
    k = torch.zeros(len(w), w.shape[1], w.shape[1], dtype=torch.float64, device=w.device)
    for start in range(0, w.shape[2], columns):
        k += gram_on_matrix_units(w[:, :, start : start + columns])
    return k


def against_spectrum(bench: Bench, findings: Findings) -> None:
    """This program against Spectrum's loop, on the same matrices in memory, seconds a matrix.

    Spectrum copies a matrix to the device, takes `svdvals` of a float32 copy, and copies the values back. Its default
    driver is gesvdj.
    """
    grid = [(768, 2048), (1024, 4096), (4096, 4096), (14336, 4096), (8192, 28672)]
    grid = [(24, 64), (48, 96)] if bench.quick else grid
    drivers = {"gesvdj": None, "gesvd": "gesvd"} if bench.is_cuda else {"gesvdj": None}
    taken: dict[str, float] = {}
    for n, m in grid:
        w = random_weight(n, m, bench.device).cpu()
        row: Row = {"n": n, "m": m, "ours_s": _time_ours(bench, findings, (n, m, "BF16"))}
        for driver, option in drivers.items():
            work = min(n, m) ** 2 * max(n, m)
            if bench.has_time(findings, f"svdvals ({driver}) of {n} x {m}", taken.get(driver, 0.0) * work):
                row[f"{driver}_s"] = bench.time_once(lambda: _spectrums_score(w, bench.device, option))[0]  # noqa: B023
                if driver not in taken:
                    # The first call loads libraries.
                    row[f"{driver}_s"] = bench.time_once(lambda: _spectrums_score(w, bench.device, option))[0]  # noqa: B023
                taken[driver] = row[f"{driver}_s"] / work
        for driver in drivers:
            if row["ours_s"] and f"{driver}_s" in row:
                row[f"times_{driver}"] = row[f"{driver}_s"] / row["ours_s"]
        findings.add_row("against Spectrum's loop", **row)
        bench.say(f"{n} x {m}: {', '.join(f'{k} {v:.3g}' for k, v in row.items() if k not in 'nm' and v)}")
    _add_layer_ratios(bench, findings)


def _spectrums_score(w: torch.Tensor, device: str, driver: str | None) -> float:
    values = torch.linalg.svdvals(w.to(device).float(), driver=driver).cpu().numpy()
    return score(values, *w.shape).snr


def _add_layer_ratios(bench: Bench, findings: Findings) -> None:
    """Add the ratios of a whole layer, from the seconds of its shapes."""
    counts = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 3}
    rows = {(row["n"], row["m"]): row for row in findings.tables["against Spectrum's loop"]}
    for driver in ("gesvdj", "gesvd"):
        if not bench.quick and all(rows[shape].get(f"times_{driver}") for shape in counts):
            theirs, ours = (sum(c * rows[s][k] for s, c in counts.items()) for k in (f"{driver}_s", "ours_s"))
            findings.facts[f"times_{driver}_for_a_layer_of_llama_3_8b"] = theirs / ours


def ours_by_shape(bench: Bench, findings: Findings) -> None:
    """This program on every shape of the projected models, seconds a matrix from memory to the score.

    The batches have up to 1 GB of weights. Quantized weights are dequantized on the way.
    """
    shapes = {shape: None for model in MODELS for shape in model.shapes}
    for n, m, dtype in shapes:
        if bench.quick:
            n, m = max(8, n // 64), max(8, m // 64)
        seconds = _time_ours(bench, findings, (n, m, dtype))
        if seconds is not None:
            findings.add_row("ours by shape", n=n, m=m, dtype=dtype, seconds_a_matrix=seconds)
            bench.say(f"ours, {n} x {m} {dtype}: {seconds:.3g} s")


def _time_ours(bench: Bench, findings: Findings, shape: Shape) -> float | None:
    """Return our seconds a matrix of a shape, in as large a batch as is sensible."""
    n, m, dtype = shape
    # The eigenvalues of 8192 x 8192 take seconds on a slow card.
    if not bench.has_time(findings, f"ours, {n} x {m} {dtype}", min(n, m) ** 3 / 5e11):
        return None
    distinct = [_weights(n, m, dtype, bench.device, seed) for seed in range(2)]
    first_s = _compute(bench, distinct, shape)
    warm_s = first_s if first_s > _ITEMS_S else _compute(bench, distinct, shape)
    count = int(min(_ITEMS_NBYTES / (2 * n * m), 2 * min(_ITEMS_S, bench.left_s) / warm_s, 512))
    if count <= 2 or bench.quick:
        return warm_s / 2
    return _compute(bench, [distinct[i % 2] for i in range(count)], shape) / count


def _weights(n: int, m: int, dtype: str, device: str, seed: int) -> Weights:
    w = random_weight(n, m, device, seed)
    if dtype == "BF16":
        return w.cpu()
    # The scales of blocks of 128 x 128, as in DeepSeek-V3.
    scales = torch.full((-(-n // 128), -(-m // 128)), 0.01)
    return Scaled((w.float() * 100).to(torch.float8_e4m3fn).cpu(), scales, (128, 128))


def _compute(bench: Bench, ws: list[Weights], shape: Shape) -> float:
    """Compute matrices as a scan does, from memory; return seconds."""
    n, m, dtype = shape
    items = [
        (
            Matrix(
                module=f"m{i}", parameter=f"m{i}.weight", group="m", tensor=f"m{i}.weight", shard="", start=0,
                dtype=dtype, n=n, m=m, nbytes=0,
            ),
            w,
        )
        for i, w in enumerate(ws)
    ]  # fmt: skip
    return bench.time_once(lambda: sum(1 for _ in compute_all(items, device=bench.opened)))[0]


def overlap(bench: Bench, findings: Findings) -> None:
    """A scan against its parts: reading, copying and computing alone.

    The overlap is the share of the time that could be hidden behind the slowest part: 1 if the scan takes as long as
    the slowest part, 0 if it takes as long as all together. Reading is from a warm page cache, copying from pinned
    memory to the device, and kernels are products and eigenvalues of weights on the device, by torch alone. Computing
    is this program's, from memory: copies, kernels and all else.
    """
    # Toys show nothing, and each takes a second.
    for workload in (layer(bench),) if bench.quick else (layer(bench), experts(bench)):
        if not bench.has_time(findings, workload.name, 0):
            continue
        folder = make_checkpoint(workload, workload.timed_dtype, bench.folder)
        nbytes = plan(str(folder)).read_nbytes
        cold_s = _read_cold(folder)
        parts = contenders.parts(Task(str(folder), bench.device))
        copying_s = _copy(bench, nbytes)
        kernels_s = _kernels(bench, findings, Counter((min(w.n, w.m), max(w.n, w.m)) for w in workload.weights))
        scan_s = min(bench.time_once(lambda f=folder: scan_here(bench, f, bench.device))[0] for _ in range(2))  # type: ignore[misc]
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

    It is None where the page cache cannot be emptied.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        with shard.open("rb") as file:
            # Pages that are not on the disk yet would stay.
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
    """Copy so many bytes from pinned memory to the device, piece by piece; return seconds."""
    piece = min(_PIECE_NBYTES, nbytes)
    source = torch.zeros(piece, dtype=torch.uint8, pin_memory=bench.is_cuda)
    target = torch.empty(piece, dtype=torch.uint8, device=bench.device)

    def copy() -> None:
        for _ in range(nbytes // piece):
            target.copy_(source, non_blocking=True)

    return bench.measure(copy).seconds


def _kernels(bench: Bench, findings: Findings, shapes: Mapping[tuple[int, int], int]) -> float:
    """Compute K and its eigenvalues of weights that are on the device, by torch alone; return seconds."""
    total = 0.0
    for (n, m), count in shapes.items():
        batch = min(count, 16)
        w = torch.stack([random_weight(n, m, bench.device, seed) for seed in range(batch)])
        found = bench.measure(lambda: torch.linalg.eigvalsh(gram_on_matrix_units(w)))  # noqa: B023
        total += found.seconds * count / batch
    return total


def projection(findings: Findings, earlier: Mapping[str, Findings]) -> None:
    """Projected scans of whole models. This is arithmetic, and none of these models was scanned.

    computing = sum over shapes of count * seconds a matrix, from "ours by shape". A shape that is not there takes the
    eigenvalues of its short side, interpolated, + 2 short² long / rate of the product.
    scan = overhead * max(computing, bytes / rate of reading). The overhead is that of the measured scans over the
    slower of reading and computing alone.
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
