"""`select --metric`, and what is said of a choice, as typed."""

import json
from pathlib import Path

import pytest

from spectrum_stream import scan
from spectrum_stream.numerics.metrics import METRICS, random_value

from ..conftest import GOLDEN, Save, llama_tensors
from .test_app import cli, reason

RESULT = "model_snr_results/snr_results_x.json"


@pytest.fixture(autouse=True)
def _scanned(save: Save, working_folder: Path) -> None:
    scan(str(save(llama_tensors(4))), name="x")


@pytest.mark.parametrize("metric", [*METRICS, "random:3"])
def test_every_metric_writes_a_file_of_its_own(metric: str) -> None:
    done = cli("select", RESULT, "--top-percent", "50", "--metric", metric, "--json")
    data = json.loads(done.stdout)
    end = "" if metric == "spectrum" else f"_{metric.replace(':', '-')}"
    name = f"snr_results_x{end}_unfrozenparameters_50percent.yaml"
    assert data["files"] == [name] and Path(name).exists() and data["metric"] == metric
    assert len(data["chosen"]["mlp.up_proj"]) == 2


def test_a_seed_is_another_choice_by_chance() -> None:
    done = cli("select", RESULT, "--top-percent", "50", "--metric", "random:3", "--json")
    drawn = {f"model.layers.{i}.mlp.up_proj": random_value(3, f"model.layers.{i}.mlp.up_proj") for i in range(4)}
    assert json.loads(done.stdout)["chosen"]["mlp.up_proj"] == sorted(drawn, key=lambda m: -drawn[m])[:2]


def test_select_shows_and_writes_the_true_values_of_a_metric() -> None:
    """A smaller stable rank is chosen first, and was once written as its negative under the name of the score."""
    done = cli("select", RESULT, "--top-percent", "50", "--metric", "stable-rank", "--format", "json")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("mlp.", "self_attn."))]
    assert len(rows) == 4
    assert all(1 <= float(low) <= float(middle) <= float(high) for _, _, low, middle, high, *_ in rows)
    data = json.loads(Path("snr_results_x_stable-rank_json_50percent.json").read_text())
    assert data["metric"] == "stable-rank"
    assert data["chosen"]
    assert all(entry["value"] >= 1 for entry in data["chosen"])
    assert not any("snr" in entry for entry in data["chosen"])


def test_select_refuses_another_metric_in_the_file_of_axolotls_plugin() -> None:
    args = ("select", RESULT, "--top-percent", "50", "--format", "axolotl-snr")
    assert reason(cli(*args, "--metric", "stable-rank", code=1)) == "other_metric"
    assert cli(*args).returncode == 0


def test_which_end_comes_first_is_said() -> None:
    assert "smallest first" in cli("select", RESULT, "--top-percent", "50", "--metric", "condition").stdout
    assert "largest first" in cli("select", RESULT, "--top-percent", "50", "--metric", "scale-free").stdout


def test_a_metric_without_a_record() -> None:
    args = ("select", GOLDEN / "snr_results_smollm2.json", "--top-percent", "50")
    assert reason(cli(*args, "--metric", "alpha", code=1)) == "no_record"
    assert cli(*args).returncode == 0


def test_doubtful_scores_are_counted_with_a_record_and_unknown_without() -> None:
    done = cli("select", RESULT, "--top-percent", "50")
    assert "tied at the cut: 4" in done.stdout and "inexact: 0" in done.stdout
    doubts = json.loads(cli("select", RESULT, "--top-percent", "50", "--json").stdout)["doubts"]
    assert doubts["input_layernorm"] == {"degenerate": 0, "tied": 4, "inexact": 0}
    # A quarter as wide as long, noise alone: nothing is below Spectrum's threshold.
    assert doubts["lm_head"]["degenerate"] == 1
    Path(RESULT).with_suffix(".sqlite").unlink()
    doubts = json.loads(cli("select", RESULT, "--top-percent", "50", "--json").stdout)["doubts"]
    assert doubts["lm_head"] == {"degenerate": None, "tied": 0, "inexact": None}


def test_a_damaged_record_is_no_reason_not_to_choose() -> None:
    Path(RESULT).with_suffix(".sqlite").write_bytes(b"x")
    assert "not known" in cli("select", RESULT, "--top-percent", "50").stderr


def test_a_scan_of_some_groups_keeps_the_names_of_the_others_apart(save: Save) -> None:
    """`mlp.gate` alone would be trained together with `mlp.gate_proj`, which was not scanned."""
    from spectrum_stream.trainers import axolotl

    tensors = llama_tensors(2)
    for i in range(2):
        for name, n in (("gate", 4), ("gate_proj", 64)):
            tensors[f"model.layers.{i}.mlp.{name}.weight"] = tensors["lm_head.weight"][:n].clone()
            tensors[f"model.layers.{i}.mlp.{name}.bias"] = tensors["model.norm.weight"].clone()
    found = scan(str(save(tensors, folder="gated")), name="gated", groups=["mlp.gate"], top_percent=100)
    cli("select", found.written[0], "--top-percent", "100", "-o", "chosen.yaml")
    assert found.selection is not None
    always = {"lm_head.weight", "model.embed_tokens.weight"}
    for path in (Path("chosen.yaml"), found.written[-1]):
        trained = axolotl.matches(path.read_text(), tensors) - always
        assert {name.removesuffix(".weight") for name in trained} == set(found.selection.chosen_names), path


@pytest.mark.parametrize(
    "args",
    [
        ("select", RESULT, "--top-percent", "50", "--metric", "alpha:1"),
        ("select", RESULT, "--top-percent", "50", "--metric", "random:x"),
        ("compare", RESULT, "--metric", "nothing"),
    ],
)
def test_a_metric_that_is_not_known_is_refused(args: tuple[str, ...]) -> None:
    assert reason(cli(*args, code=2)) == "no_such_metric"


def test_an_option_that_would_have_no_effect_is_refused() -> None:
    assert reason(cli("select", RESULT, "--params", "1M", "--recipe", "adamw", code=2)) == "conflicting_options"
