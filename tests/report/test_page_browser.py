"""The page in a real browser: its display, its controls, and untrusted names."""

import csv
import io
import json
import math
import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spectrum_stream import scan, select
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.snr import Degeneracy
from spectrum_stream.report.data import Shown, read_shown
from spectrum_stream.report.page import render
from spectrum_stream.results.result import Module

from ..support.browser import CHROMIUM, Heard, launched, opened
from ..support.checkpoints import FUSED_EXPERTS, Save, fused_experts, llama_tensors, single_experts
from ..support.hostile import CORPUS
from ..support.programs import executable
from ..support.reports import make_entry

pytestmark = pytest.mark.slow


Show = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable(CHROMIUM)
    pytest.importorskip("playwright")
    pytest.importorskip("plotly")
    with launched() as running:
        yield running


@pytest.fixture
def show(browser: Any, working_folder: Path) -> Show:
    """Open the page of some results: `with show(*results, viewport=...) as tab`. When it is closed, it has logged
    nothing and requested nothing."""

    @contextmanager
    def open_page(*results: Shown, **settings: Any) -> Iterator[Any]:
        Path("page.html").write_text(render(results), "utf-8")
        heard = Heard()
        with opened(browser, Path("page.html"), heard, **settings) as tab:
            yield tab
        assert heard.console == [] and heard.requests == []

    return open_page


@pytest.fixture
def result(save: Save, working_folder: Path) -> Path:
    """Scan a small Llama with a norm, a degenerate head, and a matrix without a score."""
    weights = llama_tensors(layers=6)
    # Noise of this shape has no value below tau.
    weights["lm_head.weight"] = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = math.nan
    return scan(str(save(weights)), name="x").written[0]


@pytest.fixture
def tab(show: Show, result: Path) -> Iterator[Any]:
    with show(read_shown(result)) as page:
        yield page


def cell(tab: Any, module: str) -> Any:
    """Find the cell of a module by its accessible name."""
    return tab.locator(f'#maps td[aria-label^="{module},"]')


def outlined(tab: Any) -> set[str]:
    names: list[str] = tab.eval_on_selector_all(
        "#maps td.chosen", "cells => cells.map(td => td.getAttribute('aria-label').split(',')[0])"
    )
    return set(names)


def test_page_map_has_every_matrix_and_marks_flags(tab: Any, result: Path) -> None:
    assert tab.locator("#maps td[aria-label]").count() == len(json.loads(result.read_text())) + 1
    assert cell(tab, "lm_head").text_content() == "!"
    broken = cell(tab, "model.layers.2.mlp.up_proj")
    assert broken.text_content() == "×" and "NaN or infinite" in broken.get_attribute("aria-label")
    assert cell(tab, "model.layers.0.mlp.up_proj").text_content() == ""


def test_page_outline_is_the_selection(tab: Any, result: Path) -> None:
    # For some of these percentages, the number of modules is whole except for rounding.
    for percent in (1, 16.6, 20, 28.999999999999996, 33.4, 50, 57, 99.9, 100):
        tab.fill("#percent", str(percent))
        assert outlined(tab) == set(select(result, percent).chosen_names), percent
        assert tab.text_content("#summary").startswith(f"{len(select(result, percent).chosen_names)} of ")


def test_page_ranks_are_those_of_select(tab: Any) -> None:
    generator = random.Random(0)
    for _ in range(200):
        count = generator.randrange(1, 40)
        # There are few values, so that many are equal, and the values of foreign results.
        scores = [generator.choice([0.1, 0.1 + 2**-56, 0.3, 7.0, math.inf, -math.inf]) for _ in range(count)]
        groups = [generator.randrange(4) for _ in range(count)]
        percent = generator.choice([1, 7, 29, 50, 57, 58, 100, generator.uniform(0.1, 100)])
        modules = [Module(str(i), str(group), snr) for i, (group, snr) in enumerate(zip(groups, scores, strict=True))]
        chosen = tab.evaluate(
            """([groups, scores, percent]) => {
                const all = (value) => groups.map(() => value);
                const { rank, size } = rankings(groups, scores.map(Number), all(1), all(-1));
                return groups.map((_, i) => i).filter((i) => rank[i] <= countChosen(size[i], percent));
            }""",
            [groups, list(map(_in_javascript, scores)), percent],
        )
        assert {str(i) for i in chosen} == set(select(modules, percent).chosen_names)


def _in_javascript(value: float) -> float | str:
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def test_page_ignores_an_invalid_percentage(tab: Any) -> None:
    before = outlined(tab)
    for text in ("", "140", "-3"):
        tab.fill("#percent", text)
        assert outlined(tab) == before
    tab.locator("#slider").fill("25")
    assert tab.input_value("#percent") == "25" and outlined(tab) < before


def test_page_tip_shows_while_hovering(tab: Any, result: Path) -> None:
    module = "model.layers.3.mlp.down_proj"
    cell(tab, module).hover()
    text = tab.text_content("#tip")
    snr = json.loads(result.read_text())[module]["snr"]
    assert module in text and f"score {snr:.4g}"[:9] in text and re.search(r"rank \d of 6", text)
    tab.mouse.move(1, 1)
    assert tab.is_hidden("#tip")


def test_page_click_shows_the_singular_values(tab: Any, result: Path) -> None:
    module = "model.layers.3.self_attn.v_proj"
    assert tab.is_hidden("#detail")
    cell(tab, module).click()
    assert tab.text_content("#detail-title") == module
    drawn = tab.evaluate("document.getElementById('spectrum').data[0].y")
    entry = next(entry for entry in read_shown(result).entries if entry.module == module)
    assert entry.quantiles is not None and entry.largest is not None
    expected = [entry.largest * 2.0 ** (-int(steps) / 2048) for steps in entry.quantiles]
    # The largest value is written with six digits.
    assert drawn == pytest.approx(expected, rel=1e-5)
    (line,) = tab.evaluate("document.getElementById('spectrum').layout.shapes.map(s => s.y0)")
    assert line == pytest.approx(entry.tau, rel=1e-5)


def test_page_detail_follows_the_percentage_and_the_theme(tab: Any) -> None:
    cell(tab, "model.layers.3.self_attn.v_proj").click()
    color = "document.getElementById('spectrum').data[0].line.color"
    before = tab.evaluate(color)
    tab.fill("#percent", "100")
    assert ", chosen" in tab.text_content("#detail-facts")
    tab.fill("#percent", "0")
    assert ", not chosen" in tab.text_content("#detail-facts")
    tab.click("#theme")
    assert tab.evaluate(color) != before


def test_page_noise_curve_is_the_marchenko_pastur_law(tab: Any) -> None:
    # For n = m / 2, the area of the curve is 1, and its median is that of a large sample.
    law = tab.evaluate("(({x, f, median, edge}) => ({x, f, median, edge}))(marchenkoPastur(0.5))")
    area = sum(
        (b + a) / 2 * (y - x) for a, b, x, y in zip(law["f"], law["f"][1:], law["x"], law["x"][1:], strict=False)
    )
    assert area == pytest.approx(1, abs=1e-3) and law["edge"] == pytest.approx(1 + math.sqrt(0.5))
    generator = torch.Generator().manual_seed(0)
    sample = torch.linalg.svdvals(torch.randn(500, 1000, generator=generator, dtype=torch.float64)) / math.sqrt(1000)
    assert law["median"] == pytest.approx(float(sample.median()), rel=0.01)


def test_page_keyboard_reaches_and_opens_a_matrix(tab: Any) -> None:
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    # Tab stops once in the map. Arrow keys move in it and skip gaps.
    for _ in range(3):
        if tab.evaluate("document.activeElement.tagName") == "TD":
            break
        tab.keyboard.press("Tab")
    assert tab.locator("#maps td[tabindex='0']").count() == 1
    tab.keyboard.press("End")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    focused = tab.evaluate("document.activeElement.getAttribute('aria-label')").split(",")[0]
    assert focused.startswith("model.layers.4.") and tab.text_content("#tip").startswith(focused)
    tab.keyboard.press("Enter")
    assert tab.text_content("#detail-title") == focused


def test_page_log_ticks_are_neither_too_few_nor_too_many(tab: Any) -> None:
    for low, high in ((1.0, 1.5), (0.02, 106.0), (3e-12, 7e5), (5e-324, 1e308)):
        ticks = tab.evaluate("([low, high]) => logTicks(low, high, 4)", [low, high])
        inside = [tick for tick in ticks if low <= tick <= high]
        assert 1 <= len(inside) <= 16 and ticks == sorted(ticks) and ticks[0] > 0, (low, high)


def test_page_controls_have_accessible_names(tab: Any) -> None:
    nameless = tab.eval_on_selector_all(
        "button, input, select",
        "all => all.filter(e => !e.labels?.length && !e.textContent.trim() && !e.ariaLabel).map(e => e.outerHTML)",
    )
    assert nameless == []


def test_page_search_filters_while_typing(tab: Any, result: Path) -> None:
    tab.locator("#search").press_sequentially("V_PROJ")
    assert tab.locator("#table tbody tr").count() == 6
    tab.fill("#search", "empty_noise")
    assert tab.locator("#table tbody .name").first.text_content() == "lm_head"
    assert tab.get_attribute("#table tbody tr", "class") == "degenerate"
    tab.fill("#search", "nothing of the kind")
    assert tab.locator("#table tbody tr").count() == 0


def test_page_table_sorts_both_ways_with_missing_values_last(tab: Any) -> None:
    for is_down in (True, False):
        tab.click("#table th button[data-column=score]")
        texts = tab.eval_on_selector_all("#table tbody tr", "all => all.map(tr => tr.cells[3].textContent)")
        numbers = [float(text) for text in texts[:-1]]
        assert texts[-1] == "–" and numbers == sorted(numbers, reverse=is_down)


def test_page_metric_colors_the_map_and_has_a_column(tab: Any) -> None:
    def colors() -> list[str]:
        found: list[str] = tab.eval_on_selector_all("#maps td", "all => all.map(td => td.style.backgroundColor)")
        return found

    before = colors()
    tab.select_option("#metric", "stable rank")
    assert colors() != before and "stable rank" in tab.text_content("#table thead")
    assert tab.evaluate("document.getElementById('boxes').layout.xaxis.title.text") == "stable rank"
    tab.select_option("#metric", "rank")
    # The first of a row is the brightest, and the last the darkest.
    row = tab.locator("#maps tr", has=tab.locator("th", has_text="mlp.down_proj")).locator("td[aria-label]")
    by_rank = {
        int(re.search(r"rank (\d)", td.get_attribute("aria-label"))[1]): td.get_attribute("style")  # type: ignore[index]
        for td in row.all()
    }
    assert "254, 232, 56" in by_rank[1] and "0, 34, 78" in by_rank[6]


def test_page_csv_has_the_rows_found_with_all_columns(tab: Any, result: Path) -> None:
    tab.fill("#search", "mlp.down_proj")
    with tab.expect_download() as download:
        tab.click("#csv")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"))))
    scores = json.loads(result.read_text())
    assert {row["module"]: float(row["score"]) for row in rows} == {
        module: entry["snr"] for module, entry in scores.items() if entry["type"] == "mlp.down_proj"
    }
    chosen = set(select(result, 50).chosen_names)
    assert {row["module"] for row in rows if row["chosen"]} == {row["module"] for row in rows} & chosen
    assert all(float(row["stable rank"]) >= 1 for row in rows)


def test_page_experts_fold_into_a_row_that_opens(save: Save, show: Show) -> None:
    path = scan(str(save(fused_experts(experts=12))), name="x").written[0]
    with show(read_shown(path)) as tab:
        assert tab.locator("#maps tbody tr").count() == 3
        assert "12 fused experts" in cell(tab, FUSED_EXPERTS).get_attribute("aria-label")
        tab.click("button[aria-label='open mlp.experts.gate_up_proj']")
        names = tab.eval_on_selector_all("#expert-maps tbody th", "all => all.map(th => th.textContent)")
        assert names == [str(i) for i in range(12)]
        tab.locator("#expert-maps tbody td").first.click()
        assert tab.text_content("#detail-title") == f"{FUSED_EXPERTS}.0"
        tab.click("#close-experts")
        assert tab.is_hidden("#experts") and tab.locator("#expert-maps td").count() == 0


def test_page_fused_experts_with_a_broken_one_have_no_score(save: Save, show: Show) -> None:
    weights = fused_experts(experts=3)
    weights[FUSED_EXPERTS][1] = math.nan
    path = scan(str(save(weights)), name="x").written[0]
    with show(read_shown(path)) as tab:
        fused = tab.locator("#maps td[aria-label*='3 fused experts without a score']")
        assert fused.text_content() == "×"
        assert "missing" in fused.get_attribute("class")
        fused.click()
        experts = tab.locator(f"#expert-maps td[aria-label^='{FUSED_EXPERTS}']").all()
        assert [td.text_content() for td in experts] == ["", "×", ""]


def test_page_marks_missing_and_degenerate_scores_differently(show: Show) -> None:
    flags = [*NoScore, *(why for why in Degeneracy if why is not Degeneracy.VECTOR)]
    entries = [
        make_entry(f"l.{i}.a", "a", None if isinstance(why, NoScore) else 1.0 + i, flag=str(why))
        for i, why in enumerate(flags)
    ]
    with show(Shown("x", (), (), tuple(entries))) as tab:
        for i, why in enumerate(flags):
            found = cell(tab, f"l.{i}.a")
            assert found.text_content() == ("×" if isinstance(why, NoScore) else "!"), why
            assert why.sentence in found.get_attribute("aria-label"), why


def test_page_folded_cell_counts_its_separate_experts(show: Show) -> None:
    entries = [
        make_entry(f"l.{i}.experts.{e}.up", f"experts.{e}.up", 1.0 + (i + e) % 3)
        for i in range(3)
        for e in range(300)
    ]
    with show(Shown("x", (), (), tuple(entries))) as tab:
        (label,) = {td.get_attribute("aria-label") for td in tab.locator("#maps td[aria-label*='layer 0']").all()}
        assert "median score 2" in label and "100 of 300 chosen" in label
        tab.click("button[aria-label^=open]")
        assert tab.locator("#expert-maps tbody tr").count() == 64
        tab.click("#expert-maps button:has-text('later rows')")
        assert tab.text_content("#expert-maps tbody th") == "64"


def test_page_of_two_results_shows_them_side_by_side(result: Path, show: Show) -> None:
    scores = json.loads(result.read_text())
    for i, entry in enumerate(scores.values()):
        entry["snr"] *= 1 + i % 3
    Path("other.json").write_text(json.dumps(scores))
    results = [read_shown(result), read_shown(Path("other.json"))]
    with show(*results, viewport={"width": 1280, "height": 800}) as tab:
        first, second = (tab.locator("#maps > div").nth(i).bounding_box() for i in range(2))
        assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]
        chosen = [set(select(path, 50).chosen_names) for path in (result, Path("other.json"))]
        text = tab.text_content("#overlap")
        assert f"{len(chosen[0])} chosen in A, {len(chosen[1])} in B, {len(chosen[0] & chosen[1])} in both" in text
        assert "B: there is no scan record" in tab.text_content("#notes")
        tab.locator("#maps > div").nth(1).locator("td[aria-label]").first.click()
        assert "Only a scan record" in tab.text_content("#detail-note") and tab.is_hidden("#spectrum")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_theme_follows_the_system_and_can_be_switched(result: Path, show: Show, scheme: str) -> None:
    with show(read_shown(result), color_scheme=scheme) as tab:
        assert tab.get_attribute("html", "data-theme") == scheme
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.click("#theme")
        assert tab.get_attribute("html", "data-theme") != scheme
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_page_text_has_enough_contrast_in_both_themes(tab: Any) -> None:
    """WCAG 2 AA requires a contrast of 4.5 to 1."""
    for _ in range(2):
        pairs = tab.evaluate(
            """() => ["--ink", "--faint", "--accent", "--second", "--threshold"].flatMap((name) =>
                ["--paper", "--sheet"].map((ground) => [inked(name), inked(ground)]))"""
        )
        for ink, ground in pairs:
            light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)
        tab.click("#theme")


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("width", [320, 390])
def test_page_body_fits_a_phone(result: Path, show: Show, width: int) -> None:
    shown = read_shown(result)
    with show(shown, shown, viewport={"width": width, "height": 800}) as tab:
        tab.locator("#maps td[aria-label]").nth(20).click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_page_shows_untrusted_names_as_text(show: Show) -> None:
    """A page with hostile modules, groups, files and facts is compared with a page of plain names."""

    def shown(names: list[str]) -> Shown:
        entries = [
            make_entry(f"{name}.{i}.{name}" if i else name, name, 1.0 + i, n=4, m=4, tau=0.5, above=1, largest=1.0)
            for name in names
            for i in range(3)
        ]
        extra = [make_entry(f"l.0.{name}.{e}", f"{name}.{e}", 2.0) for name in names for e in range(2)]
        return Shown(names[-1], tuple((name, name) for name in names), tuple(names), (*entries, *extra))

    def visited(names: list[str]) -> tuple[dict[str, int], dict[str, str]]:
        # Names appear in tips, details, opened rows, the table, axes, and labels of points.
        with show(shown(names), shown(names)) as tab:
            for td in tab.locator("#maps td[aria-label]").all()[::7]:
                td.focus()
                td.click()
            for i in range(min(5, tab.locator("#maps th button").count())):
                tab.locator("#maps th button").nth(i).click()
            while tab.is_visible("#more"):
                tab.click("#more")
            tab.fill("#search", names[0])
            tab.fill("#search", "")
            # Plotly checks a point again after 50 ms at the earliest.
            points = tab.evaluate(
                """async (names) => {
                    const texts = [], known = $("scatter").data[1].customdata;
                    for (const name of names) {
                        const pointNumber = known.indexOf(unmarked(name, 70));
                        Plotly.Fx.hover("scatter", [{ curveNumber: 1, pointNumber }]);
                        await new Promise((done) => setTimeout(done, 120));
                        texts.push(document.querySelector("#scatter .hoverlayer").textContent);
                    }
                    return texts.join("\\n"); }""",
                names[:6],
            )
            kinds = tab.evaluate(
                """() => { const found = {}; for (const e of document.querySelectorAll("*"))
                    found[e.tagName] = (found[e.tagName] || 0) + 1; return found; }"""
            )
            axis = tab.text_content("#boxes")
            return kinds, {"body": tab.evaluate("document.body.innerText"), "axis": axis, "points": points}

    marked = [
        "<img src=x onerror=alert(1)>",
        "<b>bold</b>",
        "$x^2$",
        "%{y}",
        "&lt;i&gt;",
        "<a href='javascript:alert(1)'>",
    ]
    payloads = [*marked, *(payload for payload in CORPUS.values() if payload not in marked)]
    kinds, texts = visited(payloads)
    plain, _ = visited([f"name{i}" for i in range(len(payloads))])
    assert kinds.keys() == plain.keys()
    for kind in ("SCRIPT", "A", "B", "STYLE", "META", "FORM", "INPUT"):
        assert kinds[kind] == plain[kind], kind
    for place, text in texts.items():
        for payload in marked:
            assert payload in text, place
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", text), place


def test_page_policy_stops_an_injected_script(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render([Shown("x", (), (), (make_entry("l.0.a", "a", 1.0),))]), "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server, opened(browser, page) as tab:
        tab.evaluate(
            """(address) => {
                const script = document.createElement("script");
                script.textContent = "window.owned = 1";
                document.body.append(script, Object.assign(new Image(), { src: `${address}/x.png` }));
                document.body.insertAdjacentHTML("beforeend", "<b onclick='window.owned = 1' id=bait>x</b>");
                bait.click();
                fetch(address).catch(() => {});
            }""",
            f"http://127.0.0.1:{server.getsockname()[1]}",
        )
        assert tab.evaluate("window.owned") is None
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.accept()


def test_page_csv_defuses_formulas(show: Show) -> None:
    names = [CORPUS["CSV formula"], CORPUS["CSV plus"], "-1", "@x", ";=1", "\t=1", 'a"b,c\nd']
    with show(Shown("x", (), (), tuple(make_entry(name, name, -math.inf) for name in names))) as tab:
        with tab.expect_download() as download:
            tab.click("#csv")
        rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"), newline="")))
    assert [row["module"] for row in rows] == [f"'{name}" for name in names[:4]] + ["';'=1", "'\t'=1", names[6]]
    assert {row["score"] for row in rows} == {"'-Infinity"}


def test_page_draws_infinities_and_very_many_layers(show: Show) -> None:
    entries = [make_entry(f"l.{i}.a", "a", 1.0 + i % 7) for i in range(1000)]
    entries += [
        make_entry(f"l.{'9' * 400}.a", "a", math.inf, flag="infinite"),
        make_entry("l.5.b", "b", -math.inf, flag="not_a_number"),
        *(make_entry(f"group{i}", f"group{i}", 0.0) for i in range(200)),
    ]
    with show(Shown("x", (), (), tuple(entries))) as tab:
        assert tab.locator("#maps tbody tr").count() == 64
        assert tab.text_content("#maps .pager").count("1 to") == 2
        for direction in ("later layers", "later layers", "later rows"):
            tab.click(f"#maps button:has-text('{direction}')")
        tab.select_option("#scale", "all")
        tab.select_option("#metric", "rank")
        assert tab.text_content("#summary") == "500 of 1202 chosen"


def test_page_pooled_experts_are_chosen_like_select(show: Show, save: Save) -> None:
    path = scan(str(save(single_experts())), name="pooled", experts="pooled").written[0]
    with show(read_shown(path)) as page:
        for percent in (25, 40, 50, 99, 100):
            page.fill("#percent", str(percent))
            chosen = page.evaluate("() => results[0].module.filter((_, i) => isChosen(results[0], i))")
            assert set(chosen) == set(select(path, percent).chosen_names), percent


def test_page_pooled_experts_are_the_parts_of_a_cell(show: Show, save: Save) -> None:
    """The first expert is not the cell, and a row opens to experts by layers."""
    tensors = single_experts()
    path = scan(str(save(tensors)), name="pooled", experts="pooled").written[0]
    ups = [m for m in json.loads(path.read_text()) if re.search(r"experts\.\d+\.up_proj$", m)]
    layers = {m.split(".experts.")[0] for m in ups}
    count = len(ups) // len(layers)
    assert count > 1
    with show(read_shown(path)) as page:
        cells = page.evaluate("() => [...results[0].cells.values()].map(c => [c.own, c.parts.length])")
        assert [own for own, parts in cells if parts] == [-1] * sum(parts > 0 for _, parts in cells)
        row = page.locator("#maps tbody tr", has_text="up_proj").first
        assert f"of {count} chosen" in row.locator("td[aria-label]").first.get_attribute("aria-label")
        row.locator("button").click()
        names = page.eval_on_selector_all("#expert-maps tbody th", "all => all.map(th => th.textContent)")
        assert names == [str(i) for i in range(count)]
        assert page.locator("#expert-maps td[aria-label]").count() == len(ups)


LARGEST = 1.7976931348623157e308
EXTREMES = (math.inf, -math.inf, LARGEST, -1.7e308, 1e308, 5e-324, 1e-320, -0.0, 0.0, 1e101, 1e-101, 1.0)


def broken_attributes(tab: Any) -> list[str]:
    """Return the attributes of drawings that hold no finite number."""
    found: list[str] = tab.evaluate(
        """() => [...document.querySelectorAll("svg *")].flatMap((node) => [...node.attributes])
            .filter((a) => /NaN|Infinity/.test(a.value)).map((a) => `${a.name}=${a.value}`)"""
    )
    return found


def test_page_shows_numbers_of_any_size(show: Show) -> None:
    quantiles = np.array([0, 1, 2048, 30_000, 65_535], dtype=np.uint16)
    entries = [
        make_entry(
            f"l.{i}.{group}", group, value, n=5, m=7, tau=tau, above=1, largest=largest, quantiles=quantiles,
            metrics={"condition": largest, "estimated error": tau},
        )
        for group in ("a", "b")
        for i, value in enumerate(EXTREMES)
        for tau, largest in [(EXTREMES[i - 2 if group == "a" else 0], EXTREMES[-i if group == "a" else i])]
    ]  # fmt: skip
    # The experts of a cell: their median, and a row of large numbers of both signs.
    entries += [make_entry(f"l.{i % 2}.experts.{i}.w", f"experts.{i}.w", v) for i, v in enumerate(EXTREMES)]
    shown = Shown("x", (), (), tuple(entries))
    for results in ((shown,), (shown, shown)):
        with show(*results) as tab:
            for metric in ("score", "condition", "estimated error", "rank"):
                tab.select_option("#metric", metric)
                for scale in ("all", "row"):
                    tab.select_option("#scale", scale)
                    styles = tab.eval_on_selector_all("#maps td", "all => all.map((td) => td.getAttribute('style'))")
                    assert not any("NaN" in (style or "") for style in styles)
            assert "out of range and not drawn" in tab.text_content("#boxes-note")
            for td in tab.locator("#maps td[aria-label]").all()[:24]:
                td.click()
                assert broken_attributes(tab) == []
            assert "NaN" not in tab.text_content("#overlap") + tab.text_content("#detail-note")


def test_page_numerals_and_medians_hold_any_number(tab: Any) -> None:
    assert tab.evaluate("numeral(1.7976931348623157e308)") == "1.798e308"
    assert tab.evaluate("median([1e308, 1.7e308])") == 1.35e308
    assert tab.evaluate("median([5e-324, 5e-324])") == 5e-324
    assert tab.evaluate("String(median([-Infinity, Infinity]))") == "-Infinity"
    assert tab.evaluate("scaleOf([-1.7e308, 0, 1.7e308]).at(0)") == 0.5


def test_page_csv_neutralizes_full_width_signs_and_every_separator(show: Show) -> None:
    leads = ("", " ", '"', "\u200b", "a;", "a\t", "a|", 'a;"')
    names = [f"{lead}{sign}1" for sign in "=+-@＝＋－＠" for lead in leads]
    names += ["a\r\n=1", "safe;name", "a-b+c=d@e", "a,b"]
    with show(Shown("x", (), (), tuple(make_entry(name, name, 1.0) for name in names))) as tab:
        with tab.expect_download() as download:
            tab.click("#csv")
        text = Path(download.value.path()).read_bytes().decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["module"].replace("'", "") for row in rows] == names
    assert [row["module"] for row in rows[-3:]] == ["safe;name", "a-b+c=d@e", "a,b"]
    for delimiter in ";\t|":
        fields = [field for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) for field in row]
        assert not [field for field in fields if re.match(r'["\s\u200b]*[=+\-@＝＋－＠]', field)]
