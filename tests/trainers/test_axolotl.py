"""Axolotl: the YAML equals that of Spectrum, and patterns match like in Axolotl."""

from pathlib import Path

import pytest
import yaml

from spectrum_stream.errors import ResultError, SpectrumStreamError
from spectrum_stream.results.result import Module
from spectrum_stream.selection.select import select
from spectrum_stream.trainers.axolotl import (
    ALWAYS_PATTERNS,
    Axolotl,
    entry_of,
    names_rows,
    patterns,
    read_patterns,
    whole_names,
)
from spectrum_stream.trainers.trainer import find_matches

from ..support.checkpoints import GOLDEN

AXOLOTL = Axolotl()


def test_render_equals_spectrum_byte_for_byte() -> None:
    expected = (GOLDEN / "smollm2_unfrozenparameters_50percent.yaml").read_bytes()
    assert AXOLOTL.render(select(GOLDEN / "snr_results_smollm2.json", 50)).encode() == expected


def test_patterns_writes_a_whole_name_only_for_a_prefix_of_another() -> None:
    names = [f"h.{i}.{module}" for i in (1, 10) for module in ("gate", "gate_proj", "up")]
    modules = [Module(name, name.split(".", 2)[2], 1.0) for name in names]
    selection = select(modules, 100)
    assert whole_names(selection) == ("h.1.gate.weight$", "h.10.gate.weight$")
    assert set(patterns(selection)) == {
        *ALWAYS_PATTERNS,
        *("h.1.gate.weight$", "h.10.gate.weight$", "h.1.gate_proj", "h.10.gate_proj", "h.1.up", "h.10.up"),
    }


def test_patterns_uses_given_names_outside_of_the_result() -> None:
    selection = select([Module("h.1.up", "up", 1.0)], 100)
    assert whole_names(selection) == ()
    assert whole_names(selection, ["h.1.up.weight", "h.1.up.bias"]) == ()
    assert whole_names(selection, ["h.1.up.weight", "h.1.up_proj.weight"]) == ("h.1.up.weight$",)


def test_render_of_a_tied_head_alone_trains_its_embedding() -> None:
    wte = Module("transformer.wte", "wte", 1.0, "transformer.wte.weight")
    head = Module("lm_head", "lm_head", 1.0, "lm_head.weight", shares="transformer.wte")
    # The model lists the parameter under the name of the embedding, which no entry of Spectrum matches.
    names = ["transformer.wte.weight", "transformer.wte.weight_scale"]
    selection = select([wte, head], 100, groups=["lm_head"])
    assert AXOLOTL.matches(AXOLOTL.render(selection), names) == {"transformer.wte.weight"}
    names.append("lm_head_2.weight")
    assert AXOLOTL.matches(AXOLOTL.render(selection, names), names) == {"transformer.wte.weight"}


def test_read_patterns_reads_what_render_writes(tmp_path: Path) -> None:
    selection = select(GOLDEN / "snr_results_smollm2.json", 25)
    path = tmp_path / "s.yaml"
    path.write_text(AXOLOTL.render(selection))
    assert read_patterns(path) == patterns(selection)
    assert yaml.safe_load(path.read_text())["unfrozen_parameters"][:2] == list(ALWAYS_PATTERNS)


@pytest.mark.parametrize(
    ("pattern", "parameter", "matches"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight", True),
        ("model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj.weight", False),
        ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj.weight", True),  # the end is free
        ("mlp.up_proj", "model.layers.1.mlp.up_proj.weight", False),  # the start is not
        ("model.layers.1.mlp", "model.layers.1xmlp", False),  # a dot is literal
        ("model.layers.+mlp", "model.layers.7.mlp.up_proj.weight", True),  # except in .+
        ("model.layers.*mlp", "model.layers.7.mlp.up_proj.weight", False),
        ("model.layers.(?:1|3).mlp", "model.layers.3.mlp.up_proj.weight", True),
        ("^lm_head.weight$", "lm_head.weight", True),
        ("^lm_head.weight$", "lm_head.weight_scale", False),
        ("^model.embed_tokens.weight$[:32000]", "model.embed_tokens.weight", True),
        ("^model.embed_tokens.weight$[7]", "model.embed_tokens.weight", True),
    ],
)
def test_entry_matches_like_axolotl(pattern: str, parameter: str, matches: bool) -> None:
    assert find_matches([entry_of(pattern)], [parameter]) == ({parameter} if matches else set())


@pytest.mark.parametrize(("text", "by_rows"), [("a$[:10]", True), ("a[3]", True), ("a[b]", False), ("a.b", False)])
def test_names_rows_recognizes_row_ranges(text: str, by_rows: bool) -> None:
    assert names_rows(text) is by_rows


def test_render_writes_a_name_that_yaml_reads_as_a_number_with_its_parameter() -> None:
    # Medusa heads are `0.1.weight` in a group that is called 1.
    text = AXOLOTL.render(select([Module("0.1", "1", 1.0, "0.1.weight")], 100))
    assert AXOLOTL.matches(text, ["0.1.weight", "0.12.weight", "1.1.weight"]) == {"0.1.weight"}


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
        "-",
        "---",
        "...",
        "2001-02-30",
        "0x_",
        "9" * 5000,
    ],
)
def test_render_fails_for_names_with_a_meaning_in_yaml_or_patterns(name: str) -> None:
    with pytest.raises(ResultError) as error:
        AXOLOTL.render(select([Module(name, "group", 1.0)], 100))
    assert error.value.reason == "unsafe_name"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "a: 1", "unfrozen_parameters:", "unfrozen_parameters: [1]", "unfrozen_parameters: a", "a: [", "\t"],
)
def test_read_patterns_fails_for_other_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ResultError) as error:
        read_patterns(tmp_path / "s.yaml")
    assert error.value.reason == "not_a_selection"


@pytest.mark.parametrize(("name", "reason"), [("s.yaml", "no_such_result"), (".", "not_a_file")])
def test_read_patterns_fails_for_missing_files_and_folders(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(SpectrumStreamError) as error:
        read_patterns(tmp_path / name)
    assert error.value.reason == reason
