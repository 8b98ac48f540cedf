from pathlib import Path

import pytest
import yaml

from spectrum_stream.errors import ResultError
from spectrum_stream.results.result import Module
from spectrum_stream.selection.select import select
from spectrum_stream.trainers.axolotl import ALWAYS, Pattern, matches, patterns, read_patterns, render, whole_names

from ..support.checkpoints import GOLDEN


def test_the_yaml_is_spectrums_byte_for_byte() -> None:
    expected = (GOLDEN / "smollm2_unfrozenparameters_50percent.yaml").read_bytes()
    assert render(select(GOLDEN / "snr_results_smollm2.json", 50)).encode() == expected


def test_only_a_name_that_others_start_with_is_written_whole() -> None:
    names = [f"h.{i}.{module}" for i in (1, 10) for module in ("gate", "gate_proj", "up")]
    lines = [Module(name, name.split(".", 2)[2], 1.0) for name in names]
    selection = select(lines, 100)
    assert whole_names(selection) == ("h.1.gate.weight$", "h.10.gate.weight$")
    assert set(patterns(selection)) == {
        *ALWAYS, "h.1.gate.weight$", "h.10.gate.weight$", "h.1.gate_proj", "h.10.gate_proj", "h.1.up", "h.10.up",
    }  # fmt: skip
    # Of what is not in the result only the list of names can tell.
    assert not whole_names(select([lines[2]], 100))
    assert whole_names(select([lines[2]], 100), ["h.1.up.weight", "h.1.up.bias"]) == ()
    assert whole_names(select([lines[2]], 100), ["h.1.up.weight", "h.1.up_proj.weight"]) == ("h.1.up.weight$",)


def test_a_tied_head_alone_trains_the_embedding_that_it_is() -> None:
    wte = Module("transformer.wte", "wte", 1.0, "transformer.wte.weight")
    head = Module("lm_head", "lm_head", 1.0, "lm_head.weight", shares="transformer.wte")
    # A model has the parameter under the embedding's name, which none of Spectrum's entries is.
    names = ["transformer.wte.weight", "transformer.wte.weight_scale"]
    selection = select([wte, head], 100, groups=["lm_head"])
    assert matches(render(selection), names) == {"transformer.wte.weight"}
    names.append("lm_head_2.weight")
    assert matches(render(selection, names), names) == {"transformer.wte.weight"}


def test_what_is_rendered_is_yaml_and_reads_back(tmp_path: Path) -> None:
    selection = select(GOLDEN / "snr_results_smollm2.json", 25)
    path = tmp_path / "s.yaml"
    path.write_text(render(selection))
    assert read_patterns(path) == patterns(selection)
    assert yaml.safe_load(path.read_text())["unfrozen_parameters"][:2] == list(ALWAYS)


@pytest.mark.parametrize(
    ("pattern", "parameter", "matches"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight", True),
        ("model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj.weight", False),
        ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj.weight", True),  # not anchored at the end
        ("mlp.up_proj", "model.layers.1.mlp.up_proj.weight", False),  # anchored at the start
        ("model.layers.1.mlp", "model.layers.1xmlp", False),  # a dot is a dot
        ("model.layers.+mlp", "model.layers.7.mlp.up_proj.weight", True),  # but for .+
        ("model.layers.*mlp", "model.layers.7.mlp.up_proj.weight", False),
        ("model.layers.(?:1|3).mlp", "model.layers.3.mlp.up_proj.weight", True),
        ("^lm_head.weight$", "lm_head.weight", True),
        ("^lm_head.weight$", "lm_head.weight_scale", False),
        ("^model.embed_tokens.weight$[:32000]", "model.embed_tokens.weight", True),
        ("^model.embed_tokens.weight$[7]", "model.embed_tokens.weight", True),
    ],
)
def test_patterns_match_as_axolotl_matches_them(pattern: str, parameter: str, matches: bool) -> None:
    assert Pattern(pattern).matches(parameter) is matches


def test_row_ranges_are_recognized() -> None:
    assert Pattern("a$[:10]").names_rows and Pattern("a[3]").names_rows
    assert not Pattern("a[b]").names_rows and not Pattern("a.b").names_rows


@pytest.mark.parametrize(
    "name",
    [
        "a\n- b",
        "a: b",
        "a #b",
        "*a",
        "!tag",
        "a|b",
        "a'b",
        "{a}",
        "a[0]",
        "a\x1b[31m",
        "\u202ea",
        "a b",
        "a+",
        "2",
        "null",
        "no",
        "1.5",
    ],
)
def test_a_name_that_would_mean_something_else_is_refused(name: str) -> None:
    with pytest.raises(ResultError) as error:
        render(select([Module(name, "group", 1.0)], 100))
    assert error.value.reason == "unsafe_name"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "a: 1", "unfrozen_parameters:", "unfrozen_parameters: [1]", "unfrozen_parameters: a", "a: [", "\t"],
)
def test_a_file_that_is_no_selection(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ResultError) as error:
        read_patterns(tmp_path / "s.yaml")
    assert error.value.reason == "not_a_selection"


def test_a_selection_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ResultError) as error:
        read_patterns(tmp_path / "s.yaml")
    assert error.value.reason == "no_such_result"
    with pytest.raises(ResultError) as error:
        read_patterns(tmp_path)
    assert error.value.reason == "unreadable"
