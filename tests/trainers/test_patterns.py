"""Entries match many names exactly as in `re`, within limits."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.errors import ResultError
from spectrum_stream.trainers import expression_process, expressions, patterns
from spectrum_stream.trainers.expression_process import is_whole, runs
from spectrum_stream.trainers.expressions import Expressions
from spectrum_stream.trainers.patterns import Entry, Hits, How, Names, PatternError, alternatives

LOOK = {How.MATCH: "match", How.SEARCH: "search", How.WHOLE: "fullmatch"}


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("a|b", ["a", "b"]),
        (r"^(?:a\.b|c)$", [r"^(?:a\.b)$", "^(?:c)$"]),
        (r"(?:a|b)\Z", [r"(?:a)\Z", r"(?:b)\Z"]),
        ("a|", ["a", ""]),
        ("(?:a|)", ["(?:a)", "(?:)"]),
        (r"a\|b", [r"a\|b"]),
        ("a[|(]b", ["a[|(]b"]),
        ("(?:a|b)c|d", ["(?:a|b)c", "d"]),
        ("(?:a|b)(?:c|d)", ["(?:a|b)(?:c|d)"]),
        ("(?:a|b+)", ["(?:a)", "(?:b+)"]),
        (r"^(?:model\.x)$", [r"^(?:model\.x)$"]),
    ],
)
def test_alternatives_splits_only_the_whole_expression(pattern: str, parts: list[str]) -> None:
    assert alternatives(pattern) == parts


class NoProcess(Expressions):
    """Shows which expressions need a process."""

    def match(self, requests: Sequence[tuple[str, str]], names: Sequence[str]) -> Any:
        raise ResultError("", reason="no_process")


def hits_by_re(compiled: re.Pattern[str], how: How, names: Sequence[str]) -> Hits:
    """Return the hits by the rules of `re` only."""
    in_order = sorted(set(names))
    found = {i: match for i, name in enumerate(in_order) if (match := getattr(compiled, LOOK[how])(name))}
    partial = [in_order[i] for i, match in found.items() if match.end() and not is_whole(in_order[i], *match.span())]
    return Hits(tuple(runs(found)), tuple(partial[:3]), len(partial))


@pytest.mark.parametrize("is_indexed", [False, True])
@given(
    st.lists(st.sampled_from([*"ab12.|^$", r"\.", "(?:", ")", r"\d+", "[0-9]+", r"\Z"]), max_size=8),
    st.lists(st.text("ab12.-\u0663", max_size=7)),
)
def test_names_finds_the_matches_of_re(is_indexed: bool, pieces: list[str], names: list[str]) -> None:
    pattern = "".join(pieces)
    try:
        compiled = re.compile(pattern)
    except re.error:
        return
    with pytest.MonkeyPatch.context() as patch:
        if is_indexed:
            patch.setattr(patterns, "_FEW_PAIRS", -1)
            patch.setattr(patterns, "_CHUNK", 5)
            patch.setattr(patterns, "_MAX_ENDING", 2)
        for how in LOOK:
            try:
                (hits,) = Names(names, NoProcess()).search([Entry(pattern, pattern, how)])
            except ResultError:
                continue
            wanted = hits_by_re(compiled, how, names)
            covered = sorted(i for first, end in hits.spans for i in range(first, end))
            assert (tuple(runs(covered)), *hits[1:]) == wanted


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("[0-9]+x", "1" * 200),
        (".[0-9]+x", "1" * 200),
        ("1[0-9]+x", "1" * 200),
        ("a" + ".a" * 100 + "b", "a" * 300),
    ],
)
def test_entries_that_compare_too_many_characters_need_a_process(
    monkeypatch: pytest.MonkeyPatch, pattern: str, name: str
) -> None:
    monkeypatch.setattr(patterns, "MAX_STEPS", 20_000)
    entries = [Entry(pattern, pattern, How.SEARCH), Entry("ab.", "ab.", How.SEARCH)]
    names = [name, "ab12x"]
    with pytest.raises(ResultError) as error:
        Names(names, NoProcess()).search(entries)
    assert error.value.reason == "no_process"
    wanted = [hits_by_re(re.compile(entry.pattern), How.SEARCH, names) for entry in entries]
    assert list(Names(names).search(entries)) == wanted
    # An entry with few possible starts is found without a process.
    assert list(Names(names, NoProcess()).search(entries[1:])) == wanted[1:]


@given(st.text("ab.", max_size=4), st.lists(st.text("ab.", max_size=5)))
def test_names_finds_literal_entries(text: str, names: list[str]) -> None:
    wanted = {
        How.NAME: {name for name in names if name == text},
        How.START: {name for name in names if name.startswith(text)},
        How.END: {name for name in names if f".{name}".endswith(f".{text}")},
    }
    assert {how: Names(names).matched([Entry(text, text, how)]) for how in wanted} == wanted


NAMES = [f"model.layers.{i}.{kind}.weight" for i in range(12) for kind in ("mlp.up_proj", "mlp.gate", "norm")]
HARD = [r"model\.layers\.(?:1|3)\.", ".*mlp.*", "(?i)MODEL", r"(\w+)\.layers", "^(?!model)", "a{2,3}|norm", "$"]


def test_names_finds_the_matches_of_every_other_expression_in_a_process() -> None:
    names = [*NAMES, "with\nnewline", "with\n"]
    for how in LOOK:
        entries = [Entry(pattern, pattern, how) for pattern in [*HARD, "with", "with$", r"with\Z", "with."]]
        wanted = [hits_by_re(re.compile(entry.pattern), how, names) for entry in entries]
        assert list(Names(names).search(entries)) == wanted


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.1.mlp",
        r"^model\.layers\.[0-9]+\.mlp\.up_proj\.weight$",
        r"layers.\d+\.norm",
        "^(?:a|b)$",
        r"model.layers.3.mlp.gate|lm_head\Z",
    ],
)
def test_common_expressions_need_no_process(pattern: str) -> None:
    for how in LOOK:
        list(Names(NAMES, NoProcess()).search([Entry(pattern, pattern, how)]))


def test_names_reports_every_bad_expression_as_written() -> None:
    entries = [
        Entry("as written", "(", How.SEARCH),
        Entry("good", ".*"),
        Entry("[z-a]", "[z-a]"),
        Entry("a**", "a**"),
    ]
    with pytest.raises(PatternError) as error:
        Names(NAMES).search(entries)
    assert [text for text, _ in error.value.problems] == ["as written", "[z-a]", "a**"]


SLOW = [r"([a-z_0-9]+[a-z_.0-9]*)+!", r"(\w+\.?)+!", "(?:a{1,60000}){1,60000}x"]


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MAX_SECONDS_EACH", 0.5)
    monkeypatch.setattr(expressions, "MAX_SECONDS", 1.5)


@pytest.mark.usefixtures("short_limits")
def test_expressions_without_end_take_no_longer_than_the_limit() -> None:
    names = ["a" * 60 + "." + "b_1" * 20]
    started = time.monotonic()
    with pytest.raises(PatternError) as error:
        Names(names).search([Entry(pattern, pattern, How.SEARCH) for pattern in [SLOW[0], ".*", *SLOW * 10]])
    assert time.monotonic() - started < 20
    problems = dict(error.value.problems)
    assert ".*" not in problems
    assert "takes longer" in problems[SLOW[0]] and "takes longer" in problems[SLOW[1]]


@pytest.mark.usefixtures("short_limits")
def test_the_limit_is_shared_and_a_slow_expression_is_tried_once() -> None:
    shared = Expressions()
    # The third has only the rest of the time, so it may be quick.
    for problem in ("takes longer", "takes longer", "was not matched", "was not matched"):
        names = Names(["a" * 60], shared)
        for _ in range(4):
            with pytest.raises(PatternError) as error:
                names.search([Entry(SLOW[1], SLOW[1], How.SEARCH)])
            assert problem in str(error.value)


def test_expressions_are_matched_from_any_thread() -> None:
    found: list[Hits] = []
    thread = threading.Thread(target=lambda: found.extend(Names(NAMES).search([Entry(".*mlp", ".*mlp")])))
    thread.start()
    thread.join()
    assert found[0].spans


@pytest.mark.parametrize(
    ("name", "value"), [("executable", None), ("executable", ""), ("executable", "/bin/uwsgi"), ("frozen", True)]
)
def test_expressions_fail_with_a_reason_without_a_python_executable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(sys, name, value, raising=False)
    with pytest.raises(ResultError) as error:
        Names(NAMES).search([Entry(".*", ".*")])
    assert error.value.reason == "no_process"
    # The expressions that `select` writes need no process.
    assert Names(NAMES).matched([Entry("model.layers", r"model\.layers\.0")])


def test_process_of_expressions_imports_only_the_standard_library() -> None:
    requests = [["a.*", "match"], ["(", "search"]]
    given = json.dumps({"names": ["ab"], "requests": requests, "max_nbytes": 10**9, "max_seconds": 9}).encode()
    done = subprocess.run(
        [sys.executable, "-I", "-S", expression_process.__file__], input=given, capture_output=True, check=True
    )
    ready, good, bad = done.stdout.decode().splitlines()
    assert ready == expression_process.READY
    assert '"spans": [[0, 1]]' in good and "error" in bad and not done.stderr


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("MAX_EXPRESSIONS", [Entry(f"a*{i}", f"a*{i}") for i in range(4)]),
        ("MAX_FLOATING", [Entry(f"a{i}", f"a{i}", How.SEARCH) for i in range(4)]),
        ("MAX_MATCHES", [Entry(text, text, How.SEARCH) for text in ("m", "mo", "mod", "mode")]),
        ("MAX_VISITS", [Entry("", r"model\.layers\.[0-9]+\.x")]),
        ("MAX_VISITS", [Entry("", rf"model\.layers\.0\.[0-9]+{end}") for end in "xyz"]),
        ("MAX_MATCHES", [Entry(text, text, How.END) for text in ("weight", "norm.weight")]),
    ],
)
def test_names_fails_above_a_limit(monkeypatch: pytest.MonkeyPatch, name: str, entries: list[Entry]) -> None:
    monkeypatch.setattr(patterns, name, 3)
    with pytest.raises(ResultError) as error:
        list(Names(NAMES).search(entries))
    assert error.value.reason == "too_large"
