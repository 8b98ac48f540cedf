"""Checks of quantized checkpoints: the right scores, the reasons for other weights, and the same from the Hub."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from spectrum_stream import scan
from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.tensors import read_checkpoint
from spectrum_stream.model.config import ModelConfig
from spectrum_stream.model.inventory import take_inventory
from spectrum_stream.model.parameters import Names

from .checkpoints import reference_score
from .hub_server import REPO, HubServer, use, values


def assert_scores(path: Path, weights: Mapping[str, torch.Tensor], scheme: str | None = None) -> None:
    """Scan a checkpoint, and check that it has exactly these modules, with the scores of these weights.

    Args:
        weights: the dequantized weight of each module, or of each expert `module.0`.
        scheme: the format in the record of each, if it is the same for all.
    """
    result = scan(str(path), name=f"x-{path.stem}")
    assert result.plan.failures == () and result.complete
    found = {record.module: record for record in result.records}
    assert set(found) == set(weights)
    for module, weight in weights.items():
        score = found[module].score
        assert score is not None and score.snr == pytest.approx(reference_score(weight), rel=1e-5), module
        assert scheme is None or found[module].quantized == scheme


def assert_refused(path: Path, reasons: Mapping[str, tuple[str, str]]) -> None:
    """Check that exactly these tensors have no score.

    Args:
        reasons: the code of the reason for each tensor, and a text that is in its detail.
    """
    source = open_source(str(path))
    inventory = take_inventory(read_checkpoint(source), ModelConfig(source.config), Names.CHECKPOINT)
    failures = {s.tensor: (str(s.no_score), s.detail) for s in inventory.skipped if s.no_score.is_failure}
    assert failures.keys() == reasons.keys()
    for tensor, (code, text) in reasons.items():
        assert failures[tensor][0] == code and text in failures[tensor][1], failures[tensor]


def assert_same_from_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check that a repo read by range and by download has the values of a local scan."""
    local = values(scan(str(folder), name=f"local-{folder.name}"))
    assert local
    for fetch in ("range", "download"):
        with HubServer({REPO: folder}) as server:
            use(server.url, monkeypatch, tmp_path)
            assert values(scan(REPO, fetch=fetch, name=f"{fetch}-{folder.name}")) == local
