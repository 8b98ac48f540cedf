"""Options: accepted values, errors of wrong values, and the syntax of --groups."""

import errno
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spectrum_stream import scan
from spectrum_stream.cli.values import group_patterns_of, group_percents_of
from spectrum_stream.errors import UsageError
from spectrum_stream.streaming.plan import Plan, plan

from ..support.checkpoints import Save, llama_tensors, single_experts
from ..support.cli import Cli, reason

RESULT = "model_snr_results/snr_results_x.json"

pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        # A wrong choice.
        (["scan", "m", "--precision", "x"], "no_such_precision"),
        (["scan", "m", "--fetch", "shard"], "no_such_fetch"),
        (["plan", "m", "--experts", "x"], "no_such_experts"),
        (["select", "r", "--memory", "1GB", "--recipe", "x"], "no_such_recipe"),
        (["select", "r", "--top-percent", "50", "--format", "x"], "no_such_format"),
        (["verify", "f", "--names", "names.txt", "--format", "x"], "no_such_format"),
        (["compare", "r", "--metric", "x"], "no_such_metric"),
        (["compare", "r", "--metric", "random:x"], "no_such_metric"),
        (["plan", "m", "--names", "x"], "no_such_file"),
        # A wrong number.
        (["scan", "m", "--top-percent", "50%"], "bad_percent"),
        (["select", "r", "--bottom-percent", "half"], "bad_percent"),
        (["report", "r", "--top-percent", ""], "bad_percent"),
        (["select", "r", "--top-percent", "50", "--min-per-group", "1.5"], "bad_count"),
        (["select", "r", "--top-percent", "50", "--groups", "mlp.*=half"], "bad_percent"),
        (["scan", "m", "--groups", "mlp.*=25"], "bad_percent"),
        (["scan", "m", "--groups", ","], "no_such_group"),
        # A wrong command line.
        (["nonsense"], "no_such_command"),
        (["scan", "m", "--nonsense"], "no_such_option"),
        (["scan", "m", "--top-percnt", "50"], "no_such_option"),
        (["scan", "m", "--top-percent"], "bad_option"),
        (["scan", "m", "--fresh=yes"], "bad_option"),
        (["scan", "m", "n"], "unexpected_argument"),
        (["scan"], "no_model"),
        (["select", "--top-percent", "50"], "missing_argument"),
        (["check"], "missing_argument"),
        # Options that were removed.
        (["plan", "m", "--top-percent", "50"], "no_such_option"),
        (["select", "r", "--norms"], "no_such_option"),
        (["scan", "m", "--wait"], "no_such_option"),
        (["demo", "--fresh"], "no_such_option"),
    ],
)
def test_option_with_a_wrong_value_gives_one_sentence_and_exit_code_2(cli: Cli, args: list[str], why: str) -> None:
    Path("names.txt").write_text("a.weight\n")
    done = cli(*args, code=2)
    assert reason(done) == why
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) <= 2
    assert all(line.startswith("hint: ") for line in lines[1:])


def test_option_that_is_mistyped_gives_a_similar_one(cli: Cli) -> None:
    assert "hint: did you mean --top-percent?" in cli("scan", "m", "--top-percnt", "50", code=2).stderr


@pytest.mark.parametrize(
    ("texts", "patterns", "percents"),
    [
        (None, None, {}),
        (["mlp.*"], ("mlp.*",), {}),
        (["a,b", "c"], ("a", "b", "c"), {}),
        (["mlp.*=25"], None, {"mlp.*": 25}),
        (["a=25%, b=0"], None, {"a": 25, "b": 0}),
        (["a", "b=25"], ("a", "b"), {"b": 25}),
        (["x=y=25"], None, {"x=y": 25}),
    ],
)
def test_group_percents_of_reads_restrictions_and_percentages(
    texts: list[str] | None, patterns: tuple[str, ...] | None, percents: dict[str, float]
) -> None:
    assert group_percents_of(texts) == (patterns, percents)


def test_group_patterns_of_an_empty_option_fails() -> None:
    with pytest.raises(UsageError) as error:
        group_patterns_of(["", " , "])
    assert error.value.reason == "no_such_group"


def counts(cli: Cli, *words: str) -> dict[str, int]:
    data = json.loads(cli("select", RESULT, "--top-percent", "50", "--json", *words).stdout)
    return {group: len(modules) for group, modules in data["chosen"].items()}


def test_select_groups_restrict_or_set_percentages(cli: Cli, save: Save) -> None:
    scan(str(save(llama_tensors(4))), name="x")
    everything = counts(cli)
    assert everything["mlp.up_proj"] == everything["self_attn.q_proj"] == 2
    # Without a percentage: only these groups.
    assert counts(cli, "--groups", "mlp.*") == {"mlp.down_proj": 2, "mlp.up_proj": 2}
    # Only with percentages: all groups, and these by their own percentage.
    assert counts(cli, "--groups", "mlp.*=100,self_attn.q_proj=0") == everything | {
        "mlp.down_proj": 4,
        "mlp.up_proj": 4,
        "self_attn.q_proj": 0,
    }
    # Both: only these groups, and the general percentage for those without their own.
    assert counts(cli, "--groups", "mlp.*", "--groups", "self_attn.q_proj=25") == {
        "mlp.down_proj": 2,
        "mlp.up_proj": 2,
        "self_attn.q_proj": 1,
    }


def test_scan_interactive_offers_the_groups_of_the_plan_that_it_runs(
    cli: Cli, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    questionary = pytest.importorskip("questionary")
    plans: list[Plan] = []
    offered: list[str] = []

    def make_plan(*args: Any, **kwargs: Any) -> Plan:
        plans.append(plan(*args, **kwargs))
        return plans[-1]

    def tick_first(message: str, choices: list[Any]) -> Any:
        offered.extend(choice.value for choice in choices)
        return SimpleNamespace(ask=lambda: offered[:1])

    monkeypatch.setattr("spectrum_stream.streaming.plan.plan", make_plan)
    monkeypatch.setattr("spectrum_stream.cli.scan._check_interactive", lambda *args: None)
    monkeypatch.setattr(questionary, "checkbox", tick_first)
    done = cli("scan", save(single_experts()), "-i", "--experts", "pooled", "--name", "x")
    # The headers are read once, and the groups are those of pooled experts.
    assert len(plans) == 1
    assert offered == [group.name for group in plans[0].groups]
    assert {entry["type"] for entry in json.loads(Path(RESULT).read_text()).values()} == {offered[0]}
    assert f"the same without a prompt: --groups {offered[0]}" in done.stderr


@pytest.mark.parametrize("metric", ["stable-rank", "condition"])
def test_select_metric_shows_its_true_values_and_its_order(cli: Cli, save: Save, metric: str) -> None:
    scan(str(save(llama_tensors(4))), name="x")
    done = cli("select", RESULT, "--top-percent", "50", "--metric", metric)
    row = next(line for line in done.stdout.splitlines() if line.startswith("mlp.up_proj"))
    least, median, most = map(float, row.split()[2:5])
    assert 1 <= least <= median <= most
    assert f"ranked by {metric}, smallest first" in re.sub(r"\s+", " ", done.stdout)


def test_main_reports_errors_of_stdout_and_of_the_system(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: OSError) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("spectrum_stream.streaming.plan.plan", fail)

    failing(OSError(errno.ENOSPC, "No space left on device"))
    assert reason(cli("plan", "m", code=1)) == "unwritable"
    # torch raises the first one for a missing library, and a file raises the second one.
    for error in (OSError("libcublas.so: cannot open"), OSError(errno.EIO, "Input/output error", "shard")):
        failing(error)
        done = cli("plan", "m", code=1)
        assert reason(done) == "system_error"


@pytest.mark.parametrize(
    "args",
    [
        ["plan", "{model}", "--out", "x" * 300],
        ["scan", "{model}", "--out", "x" * 300],
        ["select", f"{'x' * 300}.sqlite", "--top-percent", "50"],
        ["report", f"{'x' * 300}.json"],
        ["compare", f"{'x' * 300}.sqlite", "--metric", "alpha"],
    ],
    ids=lambda args: str(args[0]),
)
def test_path_that_is_too_long_is_one_sentence(cli: Cli, save: Save, args: list[str]) -> None:
    model = str(save(llama_tensors(1)))
    done = cli(*(word.format(model=model) for word in args), code=1)
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("names", ["checkpoint", "transformers-v4", "transformers-v5"])
def test_select_suggests_to_verify_by_the_names_of_the_result(cli: Cli, save: Save, names: str) -> None:
    model = save(single_experts() | llama_tensors(2), config={"model_type": "qwen3_moe", "num_local_experts": 4})
    cli("scan", model, "--name", "x", "--names", names)
    done = cli("select", RESULT, "--top-percent", "50")
    words = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: spectrum-stream "))
    assert ("--names" in words) == (names != "transformers-v5")
    assert json.loads(cli(*words, "--json").stdout)["good"]


@pytest.mark.parametrize(
    "args", [["plan", "{model}"], ["scan", "{model}", "--name", "x"], ["demo"]], ids=lambda args: str(args[0])
)
def test_command_ends_with_the_next_command(cli: Cli, save: Save, minilm: Path, args: list[str]) -> None:
    folder = str(save(llama_tensors(2)))
    done = cli(*(folder if word == "{model}" else word for word in args))
    assert done.stdout.splitlines()[-1].startswith("next: spectrum-stream ")
