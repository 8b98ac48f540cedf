"""Large results of other programs: limits, linear time, numbers of any size."""

import io
import json
import math
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from spectrum_stream.cli.output import command_line
from spectrum_stream.errors import ResultError, SpectrumStreamError
from spectrum_stream.model.names import MAX_NAME_LENGTH
from spectrum_stream.report.data import read_shown
from spectrum_stream.report.page import island, page_data
from spectrum_stream.report.terminal import TerminalMap
from spectrum_stream.results import result as results
from spectrum_stream.results.check import check
from spectrum_stream.results.result import Module, Result, median_of
from spectrum_stream.selection.budget import fit
from spectrum_stream.selection.compare import compare, kendall, spearman
from spectrum_stream.selection.select import Rule, choose

from ..support.cli import Cli, reason
from ..support.hostile import CORPUS
from ..support.results import use_result

pytestmark = pytest.mark.usefixtures("working_folder")

RESULT = Path("snr_results_x.json")
OUT_OF_RANGE = (math.inf, -math.inf, 1.7e308, -1.7e308, 5e-324, -0.0, 0.0, 10**400, -(10**400))

names = st.one_of(st.sampled_from([*CORPUS.values(), "l.0.a", "l.1.a", "lm_head"]), st.text(max_size=12))
numbers = st.one_of(st.floats(), st.integers(), st.sampled_from(OUT_OF_RANGE))
leaves = st.none() | st.booleans() | numbers | names
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
contents = st.one_of(
    st.dictionaries(names, st.fixed_dictionaries({"snr": numbers, "type": names}), max_size=8),
    st.dictionaries(names, st.dictionaries(names, numbers, max_size=3), max_size=4),
    st.dictionaries(names, st.fixed_dictionaries({"snr": anything, "type": anything}), max_size=3),
    anything,
)


def write(entries: Mapping[str, tuple[float, str]]) -> Path:
    RESULT.write_text(json.dumps({name: {"snr": snr, "type": group} for name, (snr, group) in entries.items()}))
    return RESULT


@given(contents)
def test_foreign_result_is_used_or_rejected(content: Any) -> None:
    RESULT.write_text(json.dumps(content))
    check(RESULT)
    try:
        use_result(RESULT)
    except SpectrumStreamError as error:
        assert error.reason


@given(st.lists(numbers, min_size=1, max_size=9))
def test_report_of_numbers_of_any_size_is_json(values: list[float]) -> None:
    shown = read_shown(write({f"l.{i}.a": (value, "a") for i, value in enumerate(values)}))
    data, _ = page_data([shown], top_percent=50)
    read = json.loads(island(data))["results"][0]["snr"]
    assert all(isinstance(value, float) or value in ("Infinity", "-Infinity") for value in read)


def test_result_keeps_the_sign_of_an_integer_that_is_too_large() -> None:
    opened = Result.open(write({"l.0.a": (10**400, "a"), "l.1.a": (-(10**400), "a")}))
    assert [module.value for module in opened.modules] == [math.inf, -math.inf]


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=9))
def test_median_is_between_the_middle_values(values: list[float]) -> None:
    ordered, found = sorted(values), median_of(values)
    assert ordered[(len(values) - 1) // 2] <= found <= ordered[len(values) // 2]


def test_median_of_large_and_tiny_numbers_is_exact() -> None:
    assert median_of([1e308, 1.7e308]) == 1.35e308 and median_of([5e-324, 5e-324]) == 5e-324
    assert median_of([-math.inf, math.inf]) == -math.inf and median_of([1.0, math.inf]) == math.inf


def test_result_with_a_long_name_is_rejected() -> None:
    for entries in ({f"l.0.{'x' * 5_000}": (1.0, "a")}, {"l.0.a": (1.0, "x" * 5_000)}):
        with pytest.raises(ResultError) as error:
            Result.open(write(entries))
        assert error.value.reason == "too_large"
    name = "x" * MAX_NAME_LENGTH
    assert Result.open(write({name: (1.0, name)})).modules


def test_result_with_too_many_modules_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MAX_MODULES", 3)
    assert Result.open(write({f"l.{i}.a": (1.0, "a") for i in range(3)}))
    with pytest.raises(ResultError) as error:
        Result.open(write({f"l.{i}.a": (1.0, "a") for i in range(4)}))
    assert error.value.reason == "too_large"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 1.0, 2.0]), st.integers(0, 3)), max_size=30))
def test_correlations_of_all_groups_at_once_are_those_of_each(rows: list[tuple[str, float, int]]) -> None:
    a = [Module(f"l.{i}.{group}", group, x) for i, (group, x, _) in enumerate(rows)]
    b = [Module(f"l.{i}.{group}", group, float(y)) for i, (group, _, y) in enumerate(rows)]
    for name, group in (compare(a, b, 50).groups if rows else {}).items():
        x, y = (np.array([m.value for m in modules if m.group == name]) for modules in (a, b))
        assert (group.spearman, group.kendall) == (spearman(x, y), kendall(x, y))


def drawn(result: Path) -> str:
    out = io.StringIO()
    Console(width=100, file=out).print(TerminalMap(read_shown(result), ()))
    return out.getvalue()


def test_map_too_large_for_a_terminal_names_the_page() -> None:
    text = drawn(write({f"l.{i}.g{i}": (1.0, f"g{i}") for i in range(300)}))
    assert "300 groups and 300 layers" in text and "-o report.html" in text and len(text.splitlines()) == 2
    assert len(drawn(write({f"l.{i}.g": (1.0, "g") for i in range(300)})).splitlines()) > 2


def test_report_of_too_many_matrices_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrum_stream.report.data.MAX_ENTRIES", 2)
    with pytest.raises(ResultError) as error:
        read_shown(write({f"l.{i}.a": (1.0, "a") for i in range(3)}))
    assert error.value.reason == "too_many"


@pytest.mark.parametrize("name", [*CORPUS.values(), "-rf", "--help", "~", "a'b\n", "\udce9", "é", "$HOME", "*", "!x"])
def test_command_line_is_the_same_words_in_a_shell(name: str) -> None:
    if "\0" in name:
        # No argument of a program has a NUL, so none came from outside.
        return
    line = command_line("select", Path(name))
    assert line.isprintable()
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    found = words.removesuffix(b"\0").decode("utf-8", "surrogateescape").split("\0")
    assert found[:2] == ["spectrum-stream", "select"]
    assert Path(found[2]) == Path(name) and not found[2].startswith("-")


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "count"), [("g{i}", 30_000), ("l.{i}.g{i}", 100_000), ("l.{i}.g", 20_000)])
def test_commands_on_many_modules_take_seconds_of_the_processor(cli: Cli, pattern: str, count: int) -> None:
    modules = [pattern.format(i=i) for i in range(count)]
    write({name: (i * 7919 % 100_003, name.split(".")[-1]) for i, name in enumerate(modules)})
    commands: tuple[tuple[list[str | Path], int], ...] = (
        (["select", RESULT, "--top-percent", "50", "-o", "s.yaml"], 0),
        (["select", RESULT, "--top-percent", "100", "--format", "json", "-o", "s.json", "--json"], 0),
        (["select", RESULT, "--top-percent", "20", "--groups", "g*=50", "--min-per-group", "1", "-o", "t.yaml"], 0),
        (["compare", RESULT, "--metric", "random"], 0),
        (["compare", RESULT, "--metric", "random", "--json"], 0),
        (["report", RESULT], 0),
        (["report", RESULT, "--json"], 0),
        (["report", RESULT, "-o", "report.html"], 0),
        (["check", RESULT], 1),
    )
    for words, code in commands:
        started = time.process_time()
        done = cli(*words, code=code)
        assert time.process_time() - started < count / 5_000, words
        assert "--json" in words or len(done.stdout.splitlines()) < 9_000


@pytest.mark.slow
def test_budget_of_100_000_groups_takes_seconds_of_the_processor() -> None:
    modules = [Module(f"l.{i}.g{i // 2}", f"g{i // 2}", float(i), f"l.{i}.w", 100) for i in range(100_000)]
    started = time.process_time()
    selection = fit(modules, Rule(100), max_nbytes=10**8)
    assert selection.chosen_names and time.process_time() - started < 10


def test_long_lists_end_in_the_number_of_further_lines(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrum_stream.cli.tables.MAX_ROWS", 3)
    write({f"l.{i}.g{j}": (float(i * j % 5), f"g{j}") for i in range(4) for j in range(1, 9)})
    assert "and 5 more groups; --json lists all" in cli("select", RESULT, "--top-percent", "50").stdout
    assert "and 5 more groups; --json lists all" in cli("compare", RESULT, "--metric", "random").stdout
    assert re.search(r"and \d+ more; --json lists all", cli("compare", RESULT, "--metric", "random").stdout)
    with_choice = choose(Result.open(RESULT), Rule(50))
    data = json.loads(cli("select", RESULT, "--top-percent", "50", "--json").stdout)
    assert data["chosen"] == {name: list(chosen) for name, chosen in with_choice.chosen.items()}


def test_select_of_a_long_name_names_the_limit(cli: Cli) -> None:
    write({"l.0." + "x" * 100_000: (1.0, "a")})
    assert reason(cli("select", RESULT, "--top-percent", "50", code=1)) == "too_large"
