import json

from spectrum_stream.selection.select import select
from spectrum_stream.trainers.spectrum import render_sorted

from ..support.checkpoints import GOLDEN


def test_render_sorted_equals_spectrum_byte_for_byte() -> None:
    rendered = render_sorted(select(GOLDEN / "snr_results_smollm2.json", 100))
    assert rendered == (GOLDEN / "smollm2_sorted.json").read_text()
    assert list(json.loads(rendered)["lm_head"]) == ["lm_head"]
