"""The recipe "Add a quantization format" of the README, followed literally in a copy of the package."""

import json
from pathlib import Path

import pytest
import torch

from spectrum_stream import plan
from spectrum_stream.model.no_score import NoScore

from ..support.checkpoints import Save, reference_score
from ..support.recipe import follow_recipe, run

pytestmark = pytest.mark.usefixtures("working_folder")


def test_recipe_adds_a_quantization_format_to_scan(save: Save, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (40, 60), dtype=torch.uint8, generator=generator)
    scales = torch.rand(40, 1, generator=generator)
    folder = save({"a.weight": stored, "a.toy_scale": scales, "b.weight": torch.randn(6, 9)})
    assert [s.no_score for s in plan(str(folder)).failures] == [NoScore.UNSUPPORTED_DTYPE]
    follow_recipe(tmp_path, "model", "Add a quantization format", "model/schemes")
    run(tmp_path, "scan", folder, "--name", "x", "--out", "results")
    found = json.loads((tmp_path / "results" / "snr_results_x.json").read_text())
    assert found["a"]["snr"] == pytest.approx(reference_score(stored.float() * scales), rel=1e-5)
