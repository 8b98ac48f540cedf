"""The README's recipe "Add a metric", followed in a copy of the package."""

import json
from pathlib import Path

import pytest

from spectrum_stream import scan

from ..support.checkpoints import Save, llama_tensors
from ..support.recipe import follow_recipe, run

pytestmark = pytest.mark.usefixtures("working_folder")


def test_recipe_adds_a_metric_to_select(save: Save, tmp_path: Path) -> None:
    result = scan(str(save(llama_tensors(4))), name="x")
    largest = {r.module: float(r.singular_values[0]) for r in result.records if r.group == "mlp.up_proj"}
    follow_recipe(tmp_path, "numerics", "Add a metric", "numerics", "metrics.py")
    command = ("select", result.written[0].resolve(), "--top-percent", "50", "--metric", "toy", "--json")
    chosen = json.loads(run(tmp_path, *command))["chosen"]["mlp.up_proj"]
    assert chosen == sorted(largest, key=lambda module: -largest[module])[:2]
