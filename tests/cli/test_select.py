"""The command `select`: its options, its files and its errors."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from spectrum_stream import scan
from spectrum_stream.numerics.metrics import METRICS, random_value
from spectrum_stream.trainers import DEFAULT, TRAINERS

from ..support.checkpoints import GOLDEN, Save, llama_tensors
from ..support.cli import Cli, reason

pytestmark = pytest.mark.usefixtures("working_folder")

RESULT = Path("model_snr_results/snr_results_x.json")
FOREIGN = GOLDEN / "snr_results_smollm2.json"


@pytest.fixture
def scanned(save: Save, working_folder: Path) -> list[str]:
    """Return the parameters of a scanned checkpoint."""
    tensors = llama_tensors(4)
    scan(str(save(tensors)), name="x")
    return list(tensors)


def test_select_of_a_published_result_equals_the_published_selection(cli: Cli) -> None:
    done = cli("select", FOREIGN, "--top-percent", "50")
    written = Path("snr_results_smollm2_unfrozenparameters_50percent.yaml")
    assert f"wrote {written}" in done.stdout
    assert written.read_bytes() == (GOLDEN / "smollm2_unfrozenparameters_50percent.yaml").read_bytes()


def test_select_writes_every_format(cli: Cli, scanned: list[str]) -> None:
    Path("names.txt").write_text("\n".join(scanned) + "\n")
    for name, trainer in TRAINERS.items():
        command: list[str | Path] = [
            "select",
            RESULT,
            "--top-percent",
            "50",
            "--no-norms",
            "--names",
            "names.txt",
        ]
        if name == "llama-factory":
            assert reason(cli(*command, "--format", name, code=1)) == "not_expressible"
            continue
        done = cli(*command, "--format", name, "-o", f"{name}.out")
        text = Path(f"{name}.out").read_text()
        trained = trainer.matches(text, scanned)
        assert f"wrote {name}.out" in done.stdout
        assert {"lm_head.weight"} <= trained or name == "peft"
        assert sum(".mlp." in parameter for parameter in trained) == 4
        assert not any("norm" in parameter for parameter in trained)


def test_select_uses_spectrums_file_name_only_for_its_rules(cli: Cli, scanned: list[str]) -> None:
    for options, name in (
        (["--top-percent", "50"], "unfrozenparameters_50percent.yaml"),
        (["--top-percent", "50", "--no-norms"], "unfrozenparameters_50percent_custom.yaml"),
        (["--bottom-percent", "50"], "unfrozenparameters_bottom50percent.yaml"),
        (["--top-percent", "50", "--format", "python"], "python_50percent.py"),
    ):
        data = json.loads(cli("select", RESULT, *options, "--json").stdout)
        assert data["files"] == [f"snr_results_x_{name}"]
        assert Path(data["files"][0]).exists()


def test_select_stays_within_a_budget_and_prints_its_cost(cli: Cli, scanned: list[str]) -> None:
    data = json.loads(cli("select", RESULT, "--params", "25k", "--json").stdout)
    assert 20_000 < data["trainable_weights"] <= 25_000 < data["total_weights"]
    assert data["trainable_share"] == data["trainable_weights"] / data["total_weights"]
    done = cli("select", RESULT.with_suffix(".sqlite"), "--memory", "200kB", "--recipe", "adamw-bf16", "--json")
    assert json.loads(done.stdout)["nbytes"]["adamw-bf16"] <= 200_000
    done = cli("select", RESULT, "--params", "25k")
    assert "with adamw-8bit" in done.stdout
    assert "the budget allows" in done.stdout


def test_select_rejects_a_budget_for_a_partial_result(cli: Cli, save: Save) -> None:
    # The embedding would be trained, and is not in the result.
    scan(str(save(llama_tensors(4))), name="x", groups=["mlp.*"])
    assert reason(cli("select", RESULT, "--params", "25k", code=1)) == "partial"
    assert "trains" in cli("select", RESULT, "--top-percent", "50").stdout


def test_select_accepts_a_percentage_for_a_group(cli: Cli, scanned: list[str]) -> None:
    done = cli(
        "select", RESULT, "--top-percent", "50", "--groups", "mlp.*=100", "--groups", "self_attn.q_proj=0", "--json"
    )
    counts = {group: len(modules) for group, modules in json.loads(done.stdout)["chosen"].items()}
    assert (counts["mlp.up_proj"], counts["self_attn.q_proj"], counts["self_attn.v_proj"]) == (4, 0, 2)


def test_select_without_head_writes_no_pattern_of_the_head(cli: Cli, scanned: list[str]) -> None:
    done = cli("select", RESULT, "--top-percent", "50", "--no-head", "-o", "a.yaml")
    assert "it also trains model.embed_tokens if" in done.stdout
    assert "lm_head" not in done.stdout.split("wrote")[1]
    patterns = yaml.safe_load(Path("a.yaml").read_text())["unfrozen_parameters"]
    assert patterns[0] == "^model.embed_tokens.weight$"
    assert not any("lm_head" in pattern for pattern in patterns)


def test_select_and_scan_explain_head_and_embedding_unless_the_model_has_neither(cli: Cli, save: Save) -> None:
    encoder = {
        "embeddings.word_embeddings.weight": torch.randn(64, 32),
        **{f"encoder.layer.{i}.output.dense.weight": torch.randn(32, 48) for i in range(2)},
    }
    sentence = "it also trains lm_head and model.embed_tokens if"
    for tensors, has_them in ((encoder, False), (llama_tensors(2), True)):
        done = cli("scan", save(tensors), "--name", "x", "--top-percent", "50", "--fresh")
        assert (sentence in done.stdout) is has_them
        Path("names").write_text("\n".join(tensors))
        for more in ((), ("--names", "names")):
            done = cli("select", RESULT, "--top-percent", "50", *more)
            assert (sentence in done.stdout) is has_them
    # A result without a record can be of any model.
    RESULT.with_suffix(".sqlite").unlink()
    assert sentence in cli("select", RESULT, "--top-percent", "50").stdout


def test_select_lists_entries_that_differ_from_spectrum(cli: Cli, scanned: list[str]) -> None:
    Path("names.txt").write_text("\n".join([*scanned, "model.layers.1.mlp.up_proj_2.weight"]))
    command: list[str | Path] = ["select", RESULT, "--top-percent", "100"]
    assert "in $ to match" not in cli(*command).stdout
    done = cli(*command, "--names", "names.txt")
    assert "1 entry ends in $ to match" in done.stdout
    assert "model.layers.1.mlp.up_proj.weight$" in done.stdout


def test_select_warns_of_a_tied_head_without_a_matching_pattern(cli: Cli, save: Save) -> None:
    tensors = {"transformer.wte.weight": torch.randn(64, 16)}
    tensors |= {f"transformer.h.{i}.mlp.c_fc.weight": torch.randn(16, 64) for i in range(2)}
    scan(str(save(tensors, config={"architectures": ["GPT2LMHeadModel"]})), name="x")
    done = cli("select", RESULT, "--top-percent", "50")
    assert "the head is tied to transformer.wte" in done.stderr
    assert "the head is" not in cli("select", RESULT, "--top-percent", "50", "--no-head").stderr


def test_select_without_a_record_reports_unknown_sizes(cli: Cli) -> None:
    done = cli("select", FOREIGN, "--top-percent", "50", "--json")
    assert "trainable_weights" not in json.loads(done.stdout)
    assert "unknown without the scan record" in done.stderr
    assert reason(cli("select", FOREIGN, "--params", "2B", code=1)) == "unknown_sizes"


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        ([], 2, "conflicting_options"),
        (["--top-percent", "50", "--bottom-percent", "50"], 2, "conflicting_options"),
        (["--top-percent", "50", "--params", "1B"], 2, "conflicting_options"),
        (["--memory", "1GB", "--format", "peft"], 2, "conflicting_options"),
        (["--params", "many"], 2, "bad_count"),
        (["--memory", "much"], 2, "bad_size"),
        (["--bottom-percent", "0"], 2, "bad_percent"),
        (["--top-percent", "50", "--groups", "nobody"], 2, "no_such_group"),
        (["--top-percent", "50", "--groups", "mlp.up_proj=half"], 2, "bad_percent"),
        (["--top-percent", "50", "--groups", "mlp.up_proj=nan"], 2, "bad_percent"),
        (["--top-percent", "50", "--groups", "nobody=5"], 2, "no_such_group"),
        (["--top-percent", "50", "--min-per-group", "-1"], 2, "bad_count"),
        (["--top-percent", "50", "--format", "nobody"], 2, "no_such_format"),
        (["--top-percent", "50", "--format", "llama-factory"], 1, "needs_names"),
        (["--top-percent", "50", "--format", "peft"], 1, "not_adaptable"),
        (["--top-percent", "50", "--format", "axolotl-snr", "--no-head"], 1, "inexact"),
        (["--top-percent", "50", "--names", "missing.txt"], 2, "no_such_file"),
        (["--top-percent", "50", "--names", "empty.txt"], 2, "no_names"),
        (["--top-percent", "50", "--names", "others.txt"], 1, "no_such_parameter"),
        (["--top-percent", "50", "-o", "result.json"], 2, "conflicting_options"),
        (["--top-percent", "1", "--no-head", "--no-embeddings"], 1, "nothing_chosen"),
    ],
)
def test_select_fails_with_a_reason_and_writes_nothing(cli: Cli, options: list[str], code: int, why: str) -> None:
    Path("result.json").write_bytes(FOREIGN.read_bytes())
    Path("empty.txt").write_text("\n")
    Path("others.txt").write_text("transformer.h.0.mlp.c_fc.weight\n")
    before = sorted(Path().iterdir())
    assert reason(cli("select", "result.json", *options, code=code)) == why
    assert sorted(Path().iterdir()) == before
    assert Path("result.json").read_bytes() == FOREIGN.read_bytes()


# Other metrics, and notes about a selection


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize("metric", [*METRICS, "random:3"])
def test_select_by_a_metric_writes_a_separate_file(cli: Cli, metric: str) -> None:
    done = cli("select", RESULT, "--top-percent", "50", "--metric", metric, "--json")
    data = json.loads(done.stdout)
    end = "" if metric == "spectrum" else f"_{metric.replace(':', '-')}"
    name = f"snr_results_x{end}_unfrozenparameters_50percent.yaml"
    assert data["files"] == [name]
    assert Path(name).exists()
    assert data["metric"] == metric
    assert len(data["chosen"]["mlp.up_proj"]) == 2


@pytest.mark.usefixtures("scanned")
def test_select_at_random_follows_the_seed(cli: Cli) -> None:
    done = cli("select", RESULT, "--top-percent", "50", "--metric", "random:3", "--json")
    drawn = {f"model.layers.{i}.mlp.up_proj": random_value(3, f"model.layers.{i}.mlp.up_proj") for i in range(4)}
    assert json.loads(done.stdout)["chosen"]["mlp.up_proj"] == sorted(drawn, key=lambda m: -drawn[m])[:2]


@pytest.mark.usefixtures("scanned")
def test_select_shows_and_writes_the_true_values_of_a_metric(cli: Cli) -> None:
    done = cli("select", RESULT, "--top-percent", "50", "--metric", "stable-rank", "--format", "json")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("mlp.", "self_attn."))]
    assert len(rows) == 4
    assert all(1 <= float(low) <= float(middle) <= float(high) for _, _, low, middle, high, *_ in rows)
    data = json.loads(Path("snr_results_x_stable-rank_json_50percent.json").read_text())
    assert data["metric"] == "stable-rank"
    assert data["chosen"]
    assert all(entry["value"] >= 1 for entry in data["chosen"])
    assert not any("snr" in entry for entry in data["chosen"])


@pytest.mark.usefixtures("scanned")
def test_select_rejects_another_metric_for_axolotls_plugin(cli: Cli) -> None:
    args = ("select", RESULT, "--top-percent", "50", "--format", "axolotl-snr")
    assert reason(cli(*args, "--metric", "stable-rank", code=1)) == "other_metric"
    assert cli(*args).returncode == 0


@pytest.mark.usefixtures("scanned")
def test_select_prints_the_direction_of_a_metric(cli: Cli) -> None:
    assert "smallest first" in cli("select", RESULT, "--top-percent", "50", "--metric", "condition").stdout
    assert "largest first" in cli("select", RESULT, "--top-percent", "50", "--metric", "scale-free").stdout


@pytest.mark.usefixtures("scanned")
def test_select_by_a_metric_needs_a_record(cli: Cli) -> None:
    args = ("select", FOREIGN, "--top-percent", "50")
    assert reason(cli(*args, "--metric", "alpha", code=1)) == "no_record"
    assert cli(*args).returncode == 0


@pytest.mark.usefixtures("scanned")
def test_select_counts_degenerate_scores_only_with_a_record(cli: Cli) -> None:
    done = cli("select", RESULT, "--top-percent", "50")
    assert "equal scores at the cut: 4" in done.stdout
    assert "inexact scores: 0" in done.stdout
    diagnostics = json.loads(cli("select", RESULT, "--top-percent", "50", "--json").stdout)["diagnostics"]
    assert diagnostics["input_layernorm"] == {"degenerate": 0, "tied": 4, "inexact": 0}
    # The matrix is noise, a quarter as wide as long, so no value is below Spectrum's threshold.
    assert diagnostics["lm_head"]["degenerate"] == 1
    RESULT.with_suffix(".sqlite").unlink()
    diagnostics = json.loads(cli("select", RESULT, "--top-percent", "50", "--json").stdout)["diagnostics"]
    assert diagnostics["lm_head"] == {"degenerate": None, "tied": 0, "inexact": None}


@pytest.mark.usefixtures("scanned")
def test_select_ignores_a_damaged_record(cli: Cli) -> None:
    RESULT.with_suffix(".sqlite").write_bytes(b"x")
    assert "not known" in cli("select", RESULT, "--top-percent", "50").stderr


@pytest.mark.usefixtures("scanned")
def test_select_after_a_partial_scan_trains_no_unscanned_module(cli: Cli, save: Save) -> None:
    """`mlp.gate` alone would be trained together with `mlp.gate_proj`, which was not scanned."""
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
        trained = DEFAULT.matches(path.read_text(), tensors) - always
        assert {name.removesuffix(".weight") for name in trained} == set(found.selection.chosen_names), path


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize(
    "args",
    [
        ("select", RESULT, "--params", "1M", "--recipe", "adamw"),
        ("select", RESULT, "--top-percent", "50", "--recipe", "adamw"),
    ],
)
def test_select_rejects_an_option_without_effect(cli: Cli, args: tuple[str | Path, ...]) -> None:
    assert reason(cli(*args, code=2)) == "conflicting_options"
