"""Every trainer rejects unreasonable texts with a reason, within limits."""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.errors import ResultError, SpectrumStreamError
from spectrum_stream.trainers import TRAINERS, reading
from spectrum_stream.trainers.parameters import Parameters
from spectrum_stream.trainers.reading import read_json, read_yaml
from spectrum_stream.trainers.trainer import Reason
from spectrum_stream.trainers.verify import MAX_FINDINGS, Verdict, verify

from ..support.selections import FRAGMENTS, SEEDS

NAMES = tuple(
    f"model.layers.{i}.{part}.weight"
    for i in range(32)
    for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj")
)


def check(folder: Path, text: str, trainer: str, names: Sequence[str] = NAMES) -> Verdict:
    path = folder / "selection.txt"
    path.write_text(text, "utf-8", newline="")
    return verify(path, Parameters(shapes=dict.fromkeys(names, (8, 4)), origin="given"), trainer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("trainer", TRAINERS)
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
        st.tuples(st.sampled_from(SEEDS), st.randoms(use_true_random=False)).map(lambda pair: changed(*pair)),
    )
)
def test_trainer_reads_or_rejects_any_text(folder: Path, trainer: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # A process for each example would take minutes. Without it such expressions are rejected.
        patch.setattr(sys, "executable", "")
        try:
            check(folder, text.encode("utf-8", "ignore").decode(), trainer)
        except SpectrumStreamError as error:
            assert error.reason


def changed(seed: str, random_: random.Random) -> str:
    """Replace parts of a good file with fragments of others."""
    for _ in range(random_.randint(0, 4)):
        start = random_.randint(0, len(seed))
        end = min(len(seed), start + random_.randint(0, 8))
        seed = seed[:start] + random_.choice(FRAGMENTS) + seed[end:]
    return seed


LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        LAUGHS + "? *a9\n: 1\n",
        MERGES,
        "a: &a [*a]",
        "[" * 1_000 + "]" * 1_000,
        "".join(" " * i + "a:\n" for i in range(300)),
        "x: 2001-99-99",
        "x: " + "9" * 5_000,
        "x: 0x" + "f" * 5_000,
        "x: 1" + ":1" * 20_000,
        "x: !!int '" + "9" * 5_000 + "'",
        "x: !!timestamp x",
        "x: !!bool x",
    ],
)
def test_read_yaml_rejects_text_that_no_config_has(text: str) -> None:
    with pytest.raises(ResultError) as error:
        read_yaml(text)
    assert error.value.reason == "not_a_selection"


def test_read_yaml_counts_values_and_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_YAML_VALUES", 12)
    monkeypatch.setattr(reading, "MAX_YAML_CHARACTERS", 60)
    assert read_yaml("a: &a [1, 2, 3]\nb: *a") == {"a": [1, 2, 3], "b": [1, 2, 3]}
    for text in ("a: &a [1, 2, 3]\nb: [*a, *a]", "x" * 61):
        with pytest.raises(ResultError):
            read_yaml(text)


def test_read_json_rejects_deep_nesting_and_long_numbers() -> None:
    for text in ("[" * 101 + "]" * 101, "9" * 5_000):
        with pytest.raises(ResultError) as error:
            read_json(text)
        assert error.value.reason == "not_a_selection"


@pytest.mark.parametrize(
    "value",
    [
        "-" * 100_000 + "1",
        "[" + "1+" * 100_000 + "1]",
        "not " * 100_000 + "1",
        "(" * 199 + "1" + ")" * 199,
        "lambda:" * 50_000 + "1",
        "a" + ".b" * 100_000,
        "a" + "[0]" * 100_000,
        "__import__('os').system('touch pwned')",
        "['a'] + ['b']",
        "[" * 300,
        "['unclosed]",
        "'not a list'",
        "f'{x}', 'a'",
        r"['\N{no such name}']",
    ],
)
def test_python_rejects_values_other_than_lists_of_texts(tmp_path: Path, value: str) -> None:
    with pytest.raises(SpectrumStreamError) as error:
        check(tmp_path, f"TRAINED = {value}\nTRAINED_IF_THERE = []\n", "python")
    assert error.value.reason == "not_a_selection"


@pytest.mark.parametrize(
    "value",
    [
        "['a', \"b\",]",
        "[\n    'a',  # the first\n    'b',\n]",
        "('a', 'b')",
        "'a', 'b'",
        "{'a', 'b'}",
        r"['\x61', '' 'b']",
        "[r'a', u'b']",
        "['''a''', \"\"\"b\"\"\"]",
    ],
)
def test_python_reads_lists_as_people_write_them(value: str) -> None:
    text = f"'''TRAINED = [1]'''\nif 1:\n    TRAINED = [2]\nTRAINED: list[str] = {value}\nTRAINED_IF_THERE = []\n"
    assert {entry.pattern for entry in TRAINERS["python"].entries(text)} == {"a", "b"}
    assert {entry.pattern for entry in TRAINERS["python"].entries(text.replace(": list[str]", ""))} == {"a", "b"}


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        ("axolotl", "unfrozen_parameters: ['model.layers.1.mlp[" + "9" * 1_000_000 + "]']\n"),
        ("axolotl", "unfrozen_parameters: ['model.layers.1.mlp[" + "9" * 1_000_000 + "]$']\n"),
        ("axolotl", "unfrozen_parameters: [" + ",".join(f"'.+x{i}[0:1]'" for i in range(2_000)) + "]\n"),
        ("lines", "- " + "[0" * 100_000 + "\n"),
        ("axolotl", "unfrozen_parameters: ['" + "|".join(f"a{i}" for i in range(100_000)) + "']\n"),
        ("ms-swift", "trainable_parameters_regex: '^(?:" + "|".join(f"l.{i}.x" for i in range(30_000)) + ")$'\n"),
        ("peft", json.dumps({"target_modules": "(" * 50_000})),
        ("soup", "training: {unfrozen_parameters: [" + ",".join(f"'{i}x'" for i in range(50_000)) + "]}"),
        ("distillkit", "frozen_res: ['^(?!(?:" + "|".join(f"a{i}" for i in range(50_000)) + ")$)']"),
        ("distillkit", "frozen_res: ['" + "(" * 20_000 + "']"),
        ("llama-factory", "finetuning_type: freeze\nfreeze_trainable_layers: -1000000000000"),
        ("llama-factory", "finetuning_type: freeze\nfreeze_trainable_modules: " + ",".join(map(str, range(20_000)))),
    ],
)
def test_long_entries_and_many_alternatives_take_seconds(tmp_path: Path, trainer: str, text: str) -> None:
    started = time.process_time()
    try:
        check(tmp_path, text, trainer)
    except SpectrumStreamError as error:
        assert error.reason in ("too_large", "not_a_selection")
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([f"[0-9]+x{i}" for i in range(20)], [f"{i:04}{'1' * 2_000}" for i in range(500)]),
        (["[0-9]+x"], ["1" * 100_000]),
        (["a" + ".a" * 5_000 + "b"], [f"{'a' * 60_000}{i}" for i in range(20)]),
    ],
)
def test_entries_that_backtrack_anywhere_in_long_names_take_seconds(
    tmp_path: Path, entries: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectrum_stream.trainers.expressions.MAX_SECONDS_EACH", 0.5)
    monkeypatch.setattr("spectrum_stream.trainers.expressions.MAX_SECONDS", 1.5)
    started = time.monotonic()
    text = "training: {unfrozen_parameters: " + json.dumps(entries) + "}"
    verdict = check(tmp_path, text, "soup", names)
    assert time.monotonic() - started < 10
    assert not verdict.is_good


def test_llama_factory_with_layers_that_do_not_exist_takes_no_time(tmp_path: Path) -> None:
    text = "finetuning_type: freeze\nfreeze_trainable_layers: -1000000000\nfreeze_trainable_modules: mlp\n"
    verdict = check(tmp_path, text, "llama-factory", ["m.999999999.mlp.weight", "m.0.mlp.weight", "lm_head.weight"])
    assert verdict.trained == ("m.999999999.mlp.weight", "m.0.mlp.weight")
    with pytest.raises(SpectrumStreamError):
        check(tmp_path, "finetuning_type: freeze\nuse_llama_pro: true\nfreeze_trainable_layers: 0\n", "llama-factory")


EXPRESSIONS = {
    "axolotl": "unfrozen_parameters:\n- '([a-z_0-9]+[a-z_.0-9]*)+!'\n",
    "axolotl-snr": '{"([a-z_0-9]+[a-z_.0-9]*)+!": {"snr": 1, "type": "a"}}',
    "lines": "- (\\w+\\.?)+!\n",
    "soup": 'training: {unfrozen_parameters: ["(\\\\w+\\\\.?)+!"]}',
    "ms-swift": 'freeze_parameters_ratio: 1\ntrainable_parameters_regex: "(\\\\w+\\\\.?)+!"',
    "distillkit": 'frozen_res: ["(\\\\w+\\\\.?)+!"]',
    "peft": json.dumps({"target_modules": "(\\w+\\.?)+!"}),
}


@pytest.mark.parametrize("trainer", EXPRESSIONS)
def test_verify_reports_an_expression_without_end(
    tmp_path: Path, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectrum_stream.trainers.expressions.MAX_SECONDS_EACH", 0.3)
    verdict = check(tmp_path, EXPRESSIONS[trainer], trainer, [f"{'a' * 40}.weight"])
    (finding,) = verdict.findings
    assert finding.reason == Reason.BAD_PATTERN and "takes longer" in finding.detail and not verdict.is_good


def test_verify_keeps_ten_thousand_findings_and_counts_the_rest(tmp_path: Path) -> None:
    verdict = check(tmp_path, "".join(f"- {i}x\n" for i in range(12_000)), "lines")
    # There is one more finding: nothing would be trained.
    assert (len(verdict.findings), verdict.more_findings) == (MAX_FINDINGS, 2_001)
    assert not verdict.is_good


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "before", "entry", "after"),
    [
        ("lines", "", "- {}\n", ""),
        ("json", '{"parameters": ["x"', ', "{}"', "]}"),
        ("peft", '{"target_modules": ["x"', ', "{}"', "]}"),
        ("python", "TRAINED = [\n", "    '{}',\n", "]\nTRAINED_IF_THERE = []\n"),
    ],
)
def test_verify_reads_a_million_entries_against_many_names(
    tmp_path: Path, trainer: str, before: str, entry: str, after: str
) -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(50) for j in range(1_000)]
    entries = (f"model.layers.{i}.mlp.experts.{i % 999}.up_proj.weight" for i in range(999_999))
    started = time.process_time()
    verdict = check(tmp_path, before + "".join(map(entry.format, entries)) + after, trainer, names)
    assert verdict.parameters == 50_000 and verdict.more_findings
    assert time.process_time() - started < 60
