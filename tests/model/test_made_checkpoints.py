"""Plans and scans of random checkpoints give a result or an error of the package."""

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrum_stream import plan, scan
from spectrum_stream.errors import SpectrumStreamError

from ..support.made_checkpoints import make_checkpoint, write_shard


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_plan_and_scan_give_a_result_or_an_error_of_the_package(data: st.DataObject) -> None:
    # A scan also writes into the working folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        model = make_checkpoint(Path(folder, "m"), lambda count: data.draw(st.integers(0, count - 1)))
        names = data.draw(st.sampled_from(["transformers-v5", "transformers-v4", "checkpoint"]))
        experts = data.draw(st.sampled_from(["separate", "pooled"]))
        try:
            plan(str(model), names=names, experts=experts).to_dict()
            scan(str(model), names=names, experts=experts, out=Path(folder, "results"))
        except SpectrumStreamError:
            return


@pytest.mark.parametrize("name", [".q_proj", ".input_layernorm", "..", ".weight", ""])
def test_names_that_begin_with_a_dot_have_a_plan(name: str, tmp_path: Path) -> None:
    tensors = {
        name + ending: (dtype, [4, 4])
        for ending, dtype in ((".weight", "BF16"), (".qweight", "I32"), ("_scale", "F32"), (".weight_scale", "F32"))
    }
    write_shard(tmp_path / "model.safetensors", {**tensors, "a.weight": ("BF16", [4, 4])}, None)
    assert "a" in {w.module for w in plan(str(tmp_path)).matrices}
