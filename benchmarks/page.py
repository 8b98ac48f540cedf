"""The cost of the page of a large model: `python -m benchmarks.page`.

For a made-up record of a 671B mixture of experts, 45,337 matrices with spectra of up to 2048 values: the time to make
the page, its size, and the time from opening it in Chromium to the map and to the last plot.
Targets: a file under 25 MB that shows its map in under 3 s.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.snr import score
from spectrum_stream.report.data import read_shown
from spectrum_stream.report.page import render
from spectrum_stream.results.journal import Journal
from spectrum_stream.results.record import Record, record_path
from spectrum_stream.results.result import write_results
from tests.support.browser import CHROMIUM, launched, opened

_MAX_NBYTES = 25_000_000
_MAX_S = 3.0
_IDENTITY = {"path": "hf://org/large", "commit": "0" * 40, "shards": {}, "versions": {}, "engine": 3}
_LAYERS, _DENSE, _EXPERTS = 61, 3, 256


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description="The page of a large model.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="a folder to leave the result, the record and the page in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        result = folder / "snr_results_large.json"
        if not result.exists():
            _make(result)
        started = time.perf_counter()
        shown = read_shown(result)
        read = time.perf_counter()
        html = render([shown])
        made = time.perf_counter()
        page = folder / "large.html"
        page.write_text(html, "utf-8")
        figures: dict[str, float] = {
            "matrices": len(shown.entries),
            "record_nbytes": record_path(result).stat().st_size,
            "read_s": read - started,
            "render_s": made - read,
            "page_nbytes": page.stat().st_size,
            "cores": os.cpu_count() or 0,
        }
        if shutil.which(CHROMIUM):
            times = [_open(page) for _ in range(arguments.repetitions)]
            figures |= {name: statistics.median(one[name] for one in times) for name in times[0]}
            figures["slowest_map_s"] = max(one["map_s"] for one in times)
            figures["within_targets"] = (
                figures["page_nbytes"] < _MAX_NBYTES and max(one["map_painted_s"] for one in times) < _MAX_S
            )
        print(json.dumps(figures, indent=2))


def _open(page: Path) -> dict[str, float]:
    """Measure the seconds from opening the page to its marks and their frames."""
    with launched() as browser, opened(browser, page) as tab:
        marks: dict[str, float] = tab.evaluate(
            """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
                const at = (name) => performance.getEntriesByName(name)[0]?.startTime / 1000;
                done({map_s: at("map"), map_painted_s: at("map painted"), all_s: at("all"),
                      all_painted_s: performance.now() / 1000});
            })))"""
        )
        return marks


def _make(result: Path) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with Journal(record_path(result), _IDENTITY) as store:
        for record in _records():
            store.add(record)
            records.append(record)
    write_results(result, records)


def _records() -> Iterator[Record]:
    generator = np.random.default_rng(0)
    yield _record(generator, "model.embed_tokens", "model.embed_tokens", 1024, 7168)
    for layer in range(_LAYERS):
        projections = [
            ("self_attn.q_a_proj", 1536, 7168), ("self_attn.q_b_proj", 1536, 24576),
            ("self_attn.kv_a_proj_with_mqa", 576, 7168), ("self_attn.kv_b_proj", 512, 32768),
            ("self_attn.o_proj", 2048, 16384),
            ("input_layernorm", 1, 7168), ("post_attention_layernorm", 1, 7168),
            ("self_attn.q_a_layernorm", 1, 1536), ("self_attn.kv_a_layernorm", 1, 512),
        ]  # fmt: skip
        names = ("gate_proj", "up_proj", "down_proj")
        if layer < _DENSE:
            projections += [(f"mlp.{name}", 2048, 7168) for name in names]
        else:
            projections += [(f"mlp.shared_experts.{name}", 2048, 7168) for name in names] + [("mlp.gate", 256, 7168)]
            projections += [(f"mlp.experts.{e}.{name}", 2048, 7168) for e in range(_EXPERTS) for name in names]
        for group, n, m in projections:
            yield _record(generator, f"model.layers.{layer}.{group}", group, n, m)
    yield _record(generator, "model.norm", "model.norm", 1, 7168)
    yield _record(generator, "lm_head", "lm_head", 1024, 7168)


def _record(generator: np.random.Generator, module: str, group: str, n: int, m: int) -> Record:
    count = min(n, m)
    # Real spectra have a few large values, and then a bulk that ends at an edge.
    bulk = np.sort(generator.beta(2, 2.5, count) + 0.15 * generator.random())
    spikes = 2.0 ** (4 * generator.random() * np.exp(-np.arange(count) / (1 + 0.02 * count)))
    values = np.sort(bulk * spikes[::-1]).astype(np.float32)[::-1].copy()
    return Record(
        module=module, parameter=f"{module}.weight", group=group, tensor=f"{module}.weight", n=n, m=m, dtype="BF16",
        no_score=None, detail="", precision=Precision.FP32, device="cpu", score=score(values, n, m),
        singular_values=values, compute_s=0.01,
    )  # fmt: skip


if __name__ == "__main__":
    main()
