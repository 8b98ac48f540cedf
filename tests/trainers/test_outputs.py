"""Every reader reads names in trainers' files unchanged, or the export fails."""

import importlib
import io
import time
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from spectrum_stream.errors import ResultError
from spectrum_stream.results.result import Module
from spectrum_stream.selection.select import Rule, choose
from spectrum_stream.trainers import TRAINERS
from spectrum_stream.trainers.yaml_text import is_plain, listing, scalar

from ..support.hostile import CORPUS

# Texts that some YAML reader reads as another type, and characters that end a line or a stream in some reader.
TYPED = (
    "...", "---", "-", "--", "2001-02-30", "2001-01-01", "2001-01-01T00:00:00Z", "0x_", "0o_", "0b_", "0x1F", "0o17",
    "017", "1:1:1", "190:20:30", "=", "<<", "y", "Y", "n", "no", "On", "~", "null", "Null", "true", "FALSE",
    "1" * 5000,
    ".inf", "-.INF", ".nan", "nan", "inf", "1_000", "_1", "1e3", "1E+3", "12e03", "1e", ".5", "5.", "+1", "-1", "!!x",
    "!x", "? x", ": x", "x:", "x #y", "#x", "&a", "*a", "%TAG", "@x", "`x", "[x", "]", "{x", "}", ",x", "|", ">", "'",
    '"', "\\", "", " ", " x", "x ", "\t", "x\x85y", "x\u2028y", "x\u2029y", "\ufeffx", "x\ufeff", "\x7f", "\x80",
    "\x9f",
    "\0", "\x1b", "\r", "\n", "x\n", "\r\n", "\ufffe", "\uffff", "\U0001f999", "é", "${x}", "$x",
    "${oc.env:HOME}", "\\n", "''", "a'b", "{trained}", "{0}", "%s",
)  # fmt: skip
samples = st.sampled_from([*TYPED, *CORPUS.values()])
# Neither a header nor a result has names with half of a surrogate pair.
whole = st.characters(codec="utf-8")
texts = st.one_of(samples, st.text(max_size=20, alphabet=whole))


def read_by_pyyaml(text: str) -> Any:
    return yaml.safe_load(text)


def read_by_ruamel(text: str) -> Any:
    return importlib.import_module("ruamel.yaml").YAML(typ="safe", pure=True).load(text)


def read_by_omegaconf(text: str) -> Any:
    omegaconf = importlib.import_module("omegaconf")
    # A `${x}` in a config refers to another setting, in any quotes.
    return omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(io.StringIO(text)), resolve=False)


@pytest.mark.parametrize(
    ("module", "read"), [("yaml", read_by_pyyaml), ("ruamel.yaml", read_by_ruamel), ("omegaconf", read_by_omegaconf)]
)
def test_yaml_text_is_read_back_by_every_reader(module: str, read: Any) -> None:
    pytest.importorskip(module)

    @given(st.lists(texts, max_size=5))
    @example(list(TYPED))
    def check(wanted: list[str]) -> None:
        text = f"{listing('key', wanted)}scalar: {scalar(wanted[0] if wanted else 'x')}\n"
        assert text.isascii() and read(text) == {"key": wanted, "scalar": wanted[0] if wanted else "x"}
        assert read(f"outer:\n{listing('key', wanted, '  ')}") == {"outer": {"key": wanted}}

    check()


def test_yaml_text_of_usual_names_has_no_quotes() -> None:
    for name in ("model.layers.0.mlp.down_proj", "0.auto_model.encoder", "lm_head", "h.0", "a-b.1.up", "norm", "_x"):
        assert is_plain(name) and scalar(name) == name
    assert scalar("^lm_head.weight$") == "'^lm_head.weight$'"


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_name_in_a_file_is_read_back_or_rejected(trainer: Any) -> None:
    @given(texts, texts, st.booleans(), st.booleans())
    def check(name: str, group: str, has_record: bool, has_names: bool) -> None:
        parameter = f"{name}.weight"
        modules = [
            Module(name, group, 2.0, parameter if has_record else None, 4 if has_record else None),
            Module("model.layers.99.ok.proj", "ok.proj", 1.0),
        ]
        all_names = [parameter, "model.layers.99.ok.proj.weight", "lm_head.weight", "other.weight"]
        rule = Rule(100, percents={"ok.proj": 0} if group != "ok.proj" else {})
        selection = choose(modules if name != modules[1].name else modules[1:], rule)
        try:
            text = trainer.render(selection, all_names if has_names else None)
        except ResultError as error:
            assert error.reason and "\n" not in str(error)
            return
        matched = trainer.matches(text, all_names)
        assert {*selection.chosen_names} <= {n.removesuffix(".weight") for n in matched}
        assert "other.weight" not in matched

    check()


def test_python_file_with_any_name_runs_and_names_it() -> None:
    @given(texts)
    def check(name: str) -> None:
        # The file is ours, and no name of it may run.
        text = TRAINERS["python"].render(choose([Module(name, "g", 1.0, f"{name}.weight", 4)], Rule(100)))
        scope: dict[str, Any] = {}
        exec(compile(text, "x.py", "exec"), scope)
        assert scope["TRAINED"] == [f"{name}.weight"]

    check()


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "llama-factory"])
def test_file_of_many_modules_takes_seconds_of_the_processor(name: str) -> None:
    # Every name is the beginning of many others, and every group has one module.
    modules = [Module(f"l.{i}.mlp.up", f"g{i}", 1.0, f"l.{i}.mlp.up.weight", 4) for i in range(20_000)]
    modules += [Module("x" * i, "x", 1.0, f"{'x' * i}.weight", 4) for i in range(1, 500)]
    selection = choose(modules, Rule(100, groups=("g*", "x")))
    started = time.process_time()
    try:
        TRAINERS[name].render(selection)
    except ResultError as error:
        assert error.reason == "too_large"
    assert time.process_time() - started < 5
