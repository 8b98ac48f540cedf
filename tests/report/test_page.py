"""The report: places on the map, entries, spectra, the page as text, and the map in a terminal."""

import base64
import io
import json
import math
import re
import sqlite3
import statistics
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rich.console import Console

from spectrum_stream import scan, select
from spectrum_stream.errors import FileError, UsageError
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.snr import Degeneracy
from spectrum_stream.report import page
from spectrum_stream.report.data import FLAGS, INFINITE, NOT_A_NUMBER, Shown, quantiles_of, read_shown
from spectrum_stream.report.grid import lay, place_of
from spectrum_stream.report.page import island, page_data, render
from spectrum_stream.report.terminal import TerminalMap

from ..support.checkpoints import FUSED_EXPERTS, Save, fused_experts, llama_tensors
from ..support.cli import Cli, reason
from ..support.families import tiny
from ..support.hostile import CORPUS, inert
from ..support.reports import make_entry

pytestmark = pytest.mark.usefixtures("working_folder")


def result_of(save: Save, weights: dict[str, torch.Tensor]) -> Path:
    """Scan a checkpoint and return its result file."""
    return scan(str(save(weights)), name="x").written[0]


def published(path: Path, scores: dict[str, tuple[str, float]]) -> Path:
    path.write_text(json.dumps({module: {"type": group, "snr": snr} for module, (group, snr) in scores.items()}))
    return path


def drawn(shown: Shown, chosen: tuple[str, ...] = (), width: int = 100, **console: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **console).print(TerminalMap(shown, chosen))
    return out.getvalue()


# Places


def test_place_of_experts_shares_the_row_of_their_projection() -> None:
    place = place_of("model.layers.12.mlp.experts.7.up_proj", "mlp.experts.7.up_proj")
    assert (place.tower, place.family, place.layer, place.index) == (
        "model.layers",
        "mlp.experts.*.up_proj",
        "12",
        "7",
    )
    head = place_of("lm_head", "lm_head")
    assert (head.family, head.layer, head.index) == ("lm_head", "", "")


def test_place_of_one_of_fused_experts_is_in_their_cell() -> None:
    group = "mlp.experts.gate_up_proj"
    fused, expert = place_of(FUSED_EXPERTS, group), place_of(f"{FUSED_EXPERTS}.11", group, FUSED_EXPERTS)
    assert (expert.row, expert.layer, expert.index) == (fused.row, fused.layer, "11")
    assert fused.index == ""


def test_lay_keeps_towers_apart_and_orders_layers_by_number() -> None:
    names = ["vision.blocks.0.fc", "text.layers.0.fc", "text.layers.10.fc", "text.layers.2.fc", "fc"]
    grid = lay(place_of(name, "fc") for name in names)
    assert grid.labels() == ["vision.blocks · fc", "text.layers · fc", "fc"]
    assert grid.columns == ("", "0", "2", "10")


@given(st.lists(st.text(alphabet="a0.²٣", max_size=12), max_size=20), st.data())
def test_lay_has_a_row_and_a_column_for_every_name(names: list[str], data: st.DataObject) -> None:
    places = [place_of(name, data.draw(st.sampled_from([name, "", "mlp.3.up"]))) for name in names]
    grid = lay(places)
    assert {place.row for place in places} == set(grid.rows) and len(set(grid.rows)) == len(grid.rows)
    assert {place.layer for place in places} == set(grid.columns)


# Spectra


@given(arrays(np.float32, st.integers(1, 300), elements=st.floats(2.0**-20, 2.0**20, width=32)), st.integers(2, 64))
def test_quantiles_of_keeps_the_ends_the_order_and_four_digits(values: np.ndarray, keep: int) -> None:
    values = np.sort(values)[::-1]
    # The scale ends 32 halvings below the largest value.
    values = values[values >= values[0] * 2.0**-31]
    steps = quantiles_of(values, keep)
    assert steps.dtype == np.uint16 and len(steps) == min(len(values), keep)
    back = values[0] * 2.0 ** (-steps.astype(np.float64) / 2048)
    assert steps[0] == 0 and back[-1] == pytest.approx(values[-1], rel=2e-4)
    assert (np.diff(steps.astype(int)) >= 0).all()
    if len(values) <= keep:
        assert back == pytest.approx(values, rel=2e-4)


def test_quantiles_of_keeps_zeros_apart_from_small_values() -> None:
    assert quantiles_of(np.array([1.0, 1e-30, 0.0]), 8).tolist() == [0, 65535, 65535]
    assert quantiles_of(np.zeros(3), 8).tolist() == [65535] * 3


# Entries


def test_read_shown_reads_metrics_spectra_and_source_from_the_record(save: Save) -> None:
    path = result_of(save, llama_tensors())
    shown = read_shown(path)
    assert [entry.module for entry in shown.entries] == list(json.loads(path.read_text()))
    assert all(entry.quantiles is not None and entry.metrics for entry in shown.entries)
    facts = dict(shown.facts)
    assert facts["checkpoint"] == "model" and facts["matrices"] == str(len(shown.entries))
    assert str(Path.cwd().parent) not in json.dumps(page_data([shown], top_percent=50))
    head = next(entry for entry in shown.entries if entry.module == "lm_head")
    with sqlite3.connect(path.with_suffix(".sqlite")) as db:
        (blob,) = db.execute("SELECT singular_values FROM matrices WHERE module = 'lm_head'").fetchone()
    db.close()
    values = np.frombuffer(blob, "<f4").astype(float)
    assert head.metrics["stable rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-5)


@pytest.mark.parametrize("fault", ["none", "garbage", "empty", "others", "open"])
def test_read_shown_without_a_matching_record_has_scores_only(save: Save, fault: str) -> None:
    path = result_of(save, llama_tensors())
    record = path.with_suffix(".sqlite")
    holder = None
    if fault == "none":
        record.unlink()
    elif fault == "garbage":
        record.write_bytes(b"x" * 5000)
    elif fault == "empty":
        record.write_bytes(b"")
    elif fault == "others":
        data = json.loads(path.read_text())
        data["lm_head"]["snr"] += 1
        path.write_text(json.dumps(data))
    else:
        # This locks the record like a scan.
        holder = sqlite3.connect(record, isolation_level=None)
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("PRAGMA journal_mode = WAL")
        holder.execute("UPDATE matrices SET detail = ''")
    shown = read_shown(path)
    if holder is not None:
        holder.close()
    assert len(shown.notes) == 1 and len(shown.entries) == len(json.loads(path.read_text()))
    assert all(entry.quantiles is None and not entry.metrics for entry in shown.entries)


def test_read_shown_does_not_change_the_record(save: Save) -> None:
    path = result_of(save, llama_tensors(layers=1))
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    read_shown(path)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_read_shown_ranks_fused_experts_as_one_module(save: Save) -> None:
    path = result_of(save, fused_experts(experts=3))
    shown = read_shown(path)
    ranked = [entry for entry in shown.entries if entry.is_ranked]
    assert [entry.module for entry in ranked] == list(json.loads(path.read_text()))
    experts = [entry for entry in shown.entries if entry.fused == FUSED_EXPERTS]
    assert [entry.module for entry in experts] == [f"{FUSED_EXPERTS}.{i}" for i in range(3)]
    fused = next(entry for entry in shown.entries if entry.module == FUSED_EXPERTS)
    ranks = [entry.metrics["stable rank"] for entry in experts]
    assert fused.metrics["stable rank"] == statistics.median(r for r in ranks if r is not None)


def test_read_shown_keeps_matrices_and_fused_experts_without_a_score(save: Save) -> None:
    weights = fused_experts(experts=3, layers=1)
    weights[FUSED_EXPERTS][1] = math.nan
    weights["model.layers.0.mlp.router.weight"][0, 0] = math.inf
    shown = read_shown(result_of(save, weights))
    missing = [entry for entry in shown.entries if entry.snr is None]
    assert {entry.module for entry in missing} == {f"{FUSED_EXPERTS}.1", "model.layers.0.mlp.router"}
    assert {entry.flag for entry in missing} == {"not_finite"}
    assert f"{FUSED_EXPERTS}.0" in {entry.module for entry in shown.entries}
    rows = {line.split()[0]: line.split()[1:] for line in drawn(shown, color_system=None).splitlines()[1:5]}
    assert rows["mlp.experts.gate_up_proj"] == rows["mlp.router"] == ["x"] and rows["mlp.experts.down_proj"] == ["5"]


def test_read_shown_flags_infinity_and_nan_of_a_foreign_result(tmp_path: Path) -> None:
    path = tmp_path / "foreign.json"
    path.write_text('{"l.0.a": {"snr": Infinity, "type": "a"}, "l.1.a": {"snr": NaN, "type": "a"}}')
    shown = read_shown(path)
    assert [entry.flag for entry in shown.entries] == ["infinite", "not_a_number"]
    data, _ = page_data([shown], top_percent=50)
    assert data["results"][0]["snr"] == ["Infinity", "-Infinity"]


# Flags


def test_flags_have_words_for_every_reason_and_mark_missing_scores() -> None:
    data, _ = page_data([Shown("x", (), (), (make_entry("a", "a", 1.0),))], top_percent=50)
    assert set(data["flags"]) == {*NoScore, *Degeneracy, INFINITE, NOT_A_NUMBER} == set(FLAGS)
    assert set(data["missing"]) == {*NoScore, NOT_A_NUMBER}
    for why in (*NoScore, *Degeneracy):
        assert why.sentence in data["flags"][why]
    # The page gets its words from Python, so no script has a list of them.
    for script in page._SCRIPTS:
        assert not [why for why in (*NoScore, *Degeneracy) if f"{why}:" in page._asset(script)]


# The page as text


def scripts_of(html: str) -> list[tuple[str, str]]:
    return re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)


@pytest.mark.parametrize("payload", [*CORPUS.values(), "\ud800", "<!--<script>", "]]>", "&lt;b&gt;"])
def test_island_cannot_end_its_script_element(payload: str) -> None:
    text = island({payload: [payload]})
    assert not re.search("[<>&\u2028\u2029]", text) and text.isascii()
    assert json.loads(text) == {payload: [payload]}


def test_page_policy_allows_only_its_own_scripts_and_no_loading(tmp_path: Path) -> None:
    shown = read_shown(published(tmp_path / "a.json", {"l.0.a": ("a", 1.0)}))
    html = render([shown])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    run = [body for attributes, body in scripts_of(html) if "json" not in attributes]
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == " ".join(page._hash(body) for body in run) and "connect-src" not in rules
    assert "unsafe" not in rules["script-src"] + rules["style-src-elem"]
    assert not re.search(r'<(link|img|iframe|object|embed|base)\b|\b(src|href)="(?!#)', html.split("<script", 1)[0])


def test_render_is_a_pure_function_of_its_results(tmp_path: Path) -> None:
    shown = read_shown(published(tmp_path / "a.json", {"l.0.a": ("a", 1.0)}))
    assert render([shown]) == render([shown])
    assert "${" not in scripts_of(render([shown]))[0][1]


def test_page_data_puts_each_spectrum_at_its_stride() -> None:
    spectra = [np.array([0, 5, 9], np.uint16), None, np.arange(7, dtype=np.uint16)]
    shown = Shown(
        "x", (), (), tuple(make_entry(f"l.{i}.a", "a", 1.0, quantiles=values) for i, values in enumerate(spectra))
    )
    data, (text,) = page_data([shown], top_percent=50)
    stride = data["results"][0]["stride"]
    assert "=" not in text and len(text) == 3 * stride
    for i, (values, points) in enumerate(zip(spectra, data["results"][0]["points"], strict=True)):
        decoded = np.frombuffer(base64.b64decode(text[i * stride : (i + 1) * stride]), "<u2")[:points]
        assert decoded.tolist() == ([] if values is None else values.tolist())


def test_page_data_keeps_every_digit_of_a_score() -> None:
    shown = Shown(
        "x", (), (), (make_entry("l.0.a", "a", 1 / 3), make_entry("l.1.a", "a", float(np.nextafter(1 / 3, 1))))
    )
    data, _ = page_data([shown], top_percent=50)
    first, second = json.loads(island(data))["results"][0]["snr"]
    assert first == 1 / 3 < second


def test_render_without_plotly_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        render([Shown("x", (), (), (make_entry("a", "a", 1.0),))])
    assert error.value.reason == "missing_extra" and "[report]" in (error.value.hint or "")


# The terminal


def rows_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("up")]


def test_terminal_map_scales_a_row_from_its_lowest_to_its_highest_score(tmp_path: Path) -> None:
    scores = {f"l.{i}.up": ("up", 1.0 + i) for i in range(11)}
    shown = read_shown(published(tmp_path / "a.json", scores))
    (row,) = rows_of(drawn(shown, select(tmp_path / "a.json", 20).chosen_names, color_system=None))
    assert row == "up 0 1 2 3 4 5 6 7 8 9*9*"


def test_terminal_map_breaks_layers_into_bands_if_it_is_narrow(tmp_path: Path) -> None:
    scores = {f"l.{i}.up": ("up", 1.0 + i) for i in range(100)}
    shown = read_shown(published(tmp_path / "a.json", scores))
    text = drawn(shown, width=40, color_system=None)
    assert max(map(len, text.splitlines())) <= 40 + len("each row, from its lowest score to its highest: ")
    assert sum(len(row.split()) - 1 for row in rows_of(text)) == 100 and len(rows_of(text)) == math.ceil(100 / 18)


def test_terminal_map_leaves_degenerate_scores_out_of_the_scale() -> None:
    scores = [1.0, 2.0, 1e9]
    entries = [make_entry(f"l.{i}.up", "up", s, flag="empty_noise" if s > 5 else "") for i, s in enumerate(scores)]
    (row,) = rows_of(drawn(Shown("x", (), (), tuple(entries)), ("l.2.up",), color_system=None))
    assert row == "up 0 9 !*"


@pytest.mark.parametrize(
    ("system", "no_color"), [("truecolor", False), ("256", False), ("256", True), ("standard", False)]
)
def test_terminal_map_has_digits_where_it_has_no_colors(tmp_path: Path, system: Any, no_color: bool) -> None:
    shown = read_shown(published(tmp_path / "a.json", {f"l.{i}.up": ("up", 1.0 + i) for i in range(3)}))
    text = drawn(shown, ("l.2.up",), force_terminal=True, color_system=system, no_color=no_color)
    colors = system != "standard" and not no_color
    assert bool(re.search(r";48;[25];", text)) is colors
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert rows_of(plain) == ["up      *" if colors else "up 0 5 9*"]


def test_terminal_map_folds_experts_and_marks_partial_choice(tmp_path: Path) -> None:
    scores = {f"l.{i}.experts.{e}.up": (f"experts.{e}.up", 1.0 + i * (-1) ** e) for i in range(2) for e in range(2)}
    shown = read_shown(published(tmp_path / "a.json", scores))
    text = drawn(shown, select(tmp_path / "a.json", 50).chosen_names, color_system=None)
    (row,) = [line for line in text.splitlines() if line.startswith("experts")]
    assert row == "experts.*.up 5+5+"


@pytest.mark.parametrize("payload", CORPUS.values(), ids=CORPUS)
def test_terminal_map_prints_untrusted_names_inertly(tmp_path: Path, payload: str) -> None:
    module = f"layers.0.{payload}"
    shown = read_shown(published(tmp_path / "a.json", {module: (payload, 1.0), f"{payload}.1.a": ("a", 2.0)}))
    assert inert(drawn(shown, (module,), color_system=None))


# The command


def test_report_writes_one_file_and_ends_with_the_next_command(cli: Cli, save: Save) -> None:
    path = result_of(save, llama_tensors())
    done = cli("report", path, "-o", "page.html", "--top-percent", "25")
    html = Path("page.html").read_text("utf-8")
    assert json.loads(scripts_of(html)[0][1])["top_percent"] == 25
    assert done.stdout.splitlines()[-1].startswith("next: spectrum-stream select")
    assert list(Path().glob("*.tmp")) == []


def test_report_json_has_the_selection_of_select(cli: Cli, save: Save) -> None:
    path = result_of(save, fused_experts(experts=3))
    done = cli("report", path, "--top-percent", "50", "--json")
    (result,) = json.loads(done.stdout)["results"]
    assert {m["module"] for m in result["modules"] if m["chosen"]} == set(select(path, 50).chosen_names)
    assert len([m for m in result["modules"] if m["fused"] == FUSED_EXPERTS]) == 3
    assert cli("report", path, "-q").stdout == ""


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["x.json", "x.json", "x.json"], 2, "too_many_results"),
        (["x.json", "-o", "./x.json"], 2, "conflicting_options"),
        (["x.json", "--top-percent", "140"], 2, "bad_percent"),
        (["missing.json"], 1, "no_such_result"),
        (["empty.json"], 1, "not_a_result"),
        (["x.json", "-o", "x.json/page.html"], 1, "unwritable"),
    ],
)
def test_report_fails_with_a_reason(cli: Cli, words: list[str], code: int, why: str) -> None:
    published(Path("x.json"), {"l.0.a": ("a", 1.0)})
    Path("empty.json").write_text("{}")
    assert reason(cli("report", *words, code=code)) == why
    assert json.loads(Path("x.json").read_text())


def test_read_shown_of_an_unreadable_result_fails(tmp_path: Path) -> None:
    with pytest.raises(FileError) as error:
        read_shown(tmp_path)
    assert error.value.reason == "not_a_file"


def test_page_uses_and_packages_every_asset() -> None:
    assets = Path(page.__file__).parent / "assets"
    wanted = {*page._SCRIPTS, "page.html", "page.css"}
    assert {p.name for p in assets.iterdir()} == wanted
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["spectrum_stream.report"]
    assert all(any(fnmatch(f"assets/{name}", pattern) for pattern in patterns) for name in wanted)


def test_read_shown_finds_the_spectrum_of_a_renamed_parameter(working_folder: Path) -> None:
    tiny("llava").save_pretrained(working_folder / "saved")
    result = scan(str(working_folder / "saved"), name="x", names="transformers-v5")
    shown = read_shown(result.written[0])
    assert shown.name == result.written[0].name
    assert not shown.notes and {entry.module for entry in shown.entries} == {module.name for module in result.modules}
    assert all(entry.fused is None and entry.quantiles is not None and entry.n for entry in shown.entries)
