"""Sections of `python -m benchmarks.gpu`: the machine and single steps.

The steps are eigenvalues and products.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch

from spectrum_stream.numerics import costs
from spectrum_stream.numerics.device import open_device

from .gpu_bench import ELEMENTS_LIMIT, Bench, Findings, Measured, Row, gram_on_matrix_units, random_weight
from .hardware import matrix_units, processor
from .spectra import Kind, draw

_ROOT = Path(__file__).parent.parent


def machine(bench: Bench, findings: Findings) -> None:
    """Describe the machine and the versions, and measure the rates of copies."""
    findings.facts |= {
        "system": platform.platform(),
        "processor": processor(),
        "matrix_units": matrix_units(Path("/proc/cpuinfo")),
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
    for f in fields(bench.opened):
        if f.repr:
            value = getattr(bench.opened, f.name)
            findings.facts[f.name] = value if isinstance(value, bool | int | float | str) else str(value)
    if bench.opened.problem:
        findings.problems.append(bench.opened.problem)
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
    """Measure time, memory and error of the eigenvalues of known matrices.

    cuSOLVER, the memory or the time of this section limits the largest batch.
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
                    continue
                run = partial(_time_eigenvalues, bench, findings, n, chosen, dtype, limit)
                if row := bench.attempt(findings, what, 2 * needs * chosen, run):
                    latest[n, dtype] = row


def _guess_seconds(latest: Mapping[tuple[int, torch.dtype], Row], n: int, dtype: torch.dtype) -> float:
    """Guess the seconds a matrix from this side, or from the next smaller one."""
    same = {side: row["seconds_a_matrix"] for (side, other), row in latest.items() if other is dtype and side <= n}
    return same[max(same)] * (n / max(same)) ** 3 if same else 0.0


def _largest_batch(bench: Bench, n: int, dtype: torch.dtype, earlier: Row | None) -> tuple[int, str]:
    """Return the largest batch, and the name of the limit that it reaches."""
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
    return max(limits[limit], 0), limit


def _time_eigenvalues(bench: Bench, findings: Findings, n: int, batch: int, dtype: torch.dtype, limit: str) -> Row:
    spectrum = draw(Kind.BULK_AND_SPIKES, n, 3 * n, np.random.default_rng(n))[::-1] ** 2
    exact = torch.from_numpy(spectrum.copy())
    k = _known_symmetric(exact, bench.device).to(dtype).expand(batch, -1, -1).contiguous()
    found = bench.measure(lambda: torch.linalg.eigvalsh(k))
    loop_s = None
    if 1 < batch <= 8 and n <= 4096:
        loop_s, _ = bench.time_once(lambda: [torch.linalg.eigvalsh(one) for one in k])
    error = (found.value.double().cpu() - exact).abs()
    in_units = float(error.max() / exact[-1]) / torch.finfo(dtype).eps
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
        "worst_relative_error": float((error / exact).max()),
        "worst_error_in_units_of_the_largest": in_units,
    }
    findings.add_row("eigenvalues", **row)
    bench.say(f"{batch} of {n} x {n}, {str(dtype)[6:]}: {found.seconds:.3g} s")
    # Rounding makes an error of a few units. A backward stable routine stays below this.
    if not in_units < n:
        name = f"{batch} of {n} x {n} in {str(dtype)[6:]}"
        findings.problems.append(f"eigenvalues of {name} are wrong by {in_units:.2g} units of the largest")
    return row


def _known_symmetric(eigenvalues: torch.Tensor, device: str) -> torch.Tensor:
    """Make a dense symmetric float64 matrix (n, n) from its eigenvalues (n,).

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
    """Measure rate and error of W Wᵀ of bfloat16 matrices, by each arithmetic.

    The errors are those of 64 rows of K against float64 on the CPU, in units of sqrt(K_ii K_jj). The shift is the
    mean relative error of the diagonal, which truncation makes negative.
    """
    grid = [(2, 48, 96)] if bench.quick else [
        (1, 1024, 4096), (128, 768, 2048), (16, 2048, 7168), (1, 4096, 14336), (1, 8192, 28672),
    ]  # fmt: skip
    # Seconds a flop, by arithmetic. The first guess is for float64 on a slow card.
    taken: dict[str, float] = {}
    for batch, n, m in grid:
        if not bench.has_time(findings, f"products of {batch} of {n} x {m}", 0):
            continue
        w = torch.stack([random_weight(n, m, bench.device, seed) for seed in range(min(batch, 4))])
        w = w.repeat(-(-batch // len(w)), 1, 1)[:batch].contiguous()
        rows = torch.arange(0, n, max(1, n // 64))[:64]
        first = w[0].cpu().double()
        exact = first[rows] @ first.mT
        scale = first.square().sum(1).sqrt()
        scale = scale[rows, None] * scale
        flops = 2 * batch * n * n * m
        for name, product in _PRODUCTS.items():
            what = f"{batch} of {n} x {m}, {name}"
            found = bench.attempt(findings, what, 3 * flops * taken.get(name, 1e-12), partial(product, bench, w))
            if found is None:
                continue
            taken[name] = found.seconds / flops
            error = (found.value[0].double().cpu()[rows] - exact) / scale
            findings.add_row(
                "products",
                batch=batch,
                n=n,
                m=m,
                arithmetic=name,
                seconds=found.seconds,
                tflop_per_s=flops / found.seconds / 1e12,
                worst_error=float(error.abs().max()),
                rms_error=float(error.square().mean().sqrt()),
                shift=float(error[torch.arange(len(rows)), rows].mean()),
            )
            bench.say(f"{what}: {flops / found.seconds / 1e12:.3g} TFLOP/s")


def _in_float32(bench: Bench, w: torch.Tensor) -> Measured[torch.Tensor]:
    wide = w.float()
    return bench.measure(lambda: wide @ wide.mT)


def _in_float64(bench: Bench, w: torch.Tensor) -> Measured[torch.Tensor]:
    wide = w.double()
    return bench.measure(lambda: wide @ wide.mT)


def _on_matrix_units(bench: Bench, w: torch.Tensor) -> Measured[torch.Tensor]:
    return bench.measure(lambda: gram_on_matrix_units(w))


def _in_blocks(columns: int, bench: Bench, w: torch.Tensor) -> Measured[torch.Tensor]:
    """Add the products of blocks of columns in float64."""

    def add() -> torch.Tensor:
        k = torch.zeros(len(w), w.shape[1], w.shape[1], dtype=torch.float64, device=w.device)
        for start in range(0, w.shape[2], columns):
            k += gram_on_matrix_units(w[:, :, start : start + columns])
        return k

    return bench.measure(add)


_PRODUCTS: dict[str, Callable[[Bench, torch.Tensor], Measured[torch.Tensor]]] = {
    "float32": _in_float32,
    "matrix units": _on_matrix_units,
    "matrix units, blocks of 2048": partial(_in_blocks, 2048),
    "matrix units, blocks of 512": partial(_in_blocks, 512),
    "float64": _in_float64,
}
