"""Results published with Spectrum: our selection equals the one by Spectrum's rules, byte for byte."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from spectrum_stream.results.result import Result
from spectrum_stream.selection.select import select
from spectrum_stream.trainers import DEFAULT, TRAINERS

from ..support.checkpoints import GOLDEN

FILES = sorted((GOLDEN / "published").glob("*.json"))
FILES += sorted(Path(os.environ["SPECTRUM_PUBLISHED"]).glob("*.json")) if "SPECTRUM_PUBLISHED" in os.environ else []


def by_spectrums_rules(data: dict[str, Any], percent: int) -> str:
    """Write Spectrum's YAML by its rules, without this package."""
    types: dict[str, list[tuple[float, str]]] = {}
    for module, entry in data.items():
        types.setdefault(entry["type"], []).append((entry["snr"], module))
    text = "unfrozen_parameters:\n- ^lm_head.weight$\n- ^model.embed_tokens.weight$\n"
    for name, pairs in types.items():
        # Python's sort is stable, also in reverse, so equal scores keep the order of the file.
        best = sorted(pairs, key=lambda pair: pair[0], reverse=True)
        text += f"# {name} layers\n" + "".join(
            f"- {module}\n" for _, module in best[: int(len(best) * percent / 100)]
        )
    return text


def in_plain_schema(data: dict[str, Any]) -> dict[str, Any]:
    if all("type" in entry for entry in data.values()):
        return data
    return {module: {"snr": snr, "type": group} for group, modules in data.items() for module, snr in modules.items()}


@pytest.mark.parametrize("percent", [25, 50, 75])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_select_writes_the_yaml_of_spectrums_rules(path: Path, percent: int) -> None:
    data = json.loads(path.read_text())
    expected = by_spectrums_rules(in_plain_schema(data), percent)
    selection = select(path, percent)
    assert DEFAULT.render(selection) == expected
    # The selection is the same for the schema that Spectrum cannot read, with a note.
    is_sorted = in_plain_schema(data) is not data
    assert bool(selection.result.notes) == is_sorted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_format_trains_the_chosen_parameters_of_a_published_result(path: Path) -> None:
    selection = select(path, 50)
    names = [module.parameter_name for module in Result.open(path).modules]
    chosen = {module.parameter_name for module in selection.trained}
    for name in ("lines", "ms-swift", "distillkit", "soup", "python", "json"):
        assert TRAINERS[name].matches(TRAINERS[name].render(selection), names) == chosen
