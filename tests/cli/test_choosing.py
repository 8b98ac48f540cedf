"""`select` on the command line: what is asked, what is written, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from spectrum_stream import scan
from spectrum_stream.trainers import TRAINERS

from ..conftest import GOLDEN, Save, llama_tensors
from .test_app import cli, reason

RESULT = Path("model_snr_results/snr_results_x.json")
FOREIGN = GOLDEN / "snr_results_smollm2.json"


@pytest.fixture(autouse=True)
def _in_working_folder(working_folder: Path) -> None:
    pass


@pytest.fixture
def names(save: Save) -> list[str]:
    tensors = llama_tensors(4)
    scan(str(save(tensors)), name="x")
    return list(tensors)


def test_every_format_is_written_and_says_what_to_do_with_it(names: list[str]) -> None:
    Path("names.txt").write_text("\n".join(names) + "\n")
    for name, trainer in TRAINERS.items():
        command: list[str | Path] = [
            "select",
            RESULT,
            "--top-percent",
            "50",
            "--no-norms",
            "--names-from",
            "names.txt",
        ]
        if name == "llama-factory":
            assert reason(cli(*command, "--format", name, code=1)) == "not_expressible"
            continue
        done = cli(*command, "--format", name, "-o", f"{name}.out")
        text = Path(f"{name}.out").read_text()
        trained = trainer.matches(text, names)
        assert f"wrote {name}.out" in done.stdout
        assert {"lm_head.weight"} <= trained or name == "peft"
        assert sum(".mlp." in parameter for parameter in trained) == 4
        assert not any("norm" in parameter for parameter in trained)


def test_the_file_has_spectrums_name_only_if_spectrum_could_have_chosen_it(names: list[str]) -> None:
    for options, name in (
        (["--top-percent", "50"], "unfrozenparameters_50percent.yaml"),
        (["--top-percent", "50", "--no-norms"], "unfrozenparameters_50percent_custom.yaml"),
        (["--bottom-percent", "50"], "unfrozenparameters_bottom50percent.yaml"),
        (["--top-percent", "50", "--format", "python"], "python_50percent.py"),
    ):
        data = json.loads(cli("select", RESULT, *options, "--json").stdout)
        assert data["files"] == [f"snr_results_x_{name}"] and Path(data["files"][0]).exists()


def test_a_budget_is_kept_and_what_it_takes_is_said(names: list[str]) -> None:
    data = json.loads(cli("select", RESULT, "--params", "25k", "--json").stdout)
    assert 20_000 < data["trainable_weights"] <= 25_000 < data["total_weights"]
    assert data["trainable_share"] == data["trainable_weights"] / data["total_weights"]
    done = cli("select", RESULT.with_suffix(".sqlite"), "--memory", "200kB", "--recipe", "adamw-bf16", "--json")
    assert json.loads(done.stdout)["nbytes"]["adamw-bf16"] <= 200_000
    done = cli("select", RESULT, "--params", "25k")
    assert "by adamw-8bit" in done.stdout and "the budget allows" in done.stdout


def test_a_budget_is_not_kept_by_what_was_not_scanned(save: Save) -> None:
    # The embedding would be trained, and is not in the result.
    scan(str(save(llama_tensors(4))), name="x", groups=["mlp.*"])
    assert reason(cli("select", RESULT, "--params", "25k", code=1)) == "partial"
    assert "trains" in cli("select", RESULT, "--top-percent", "50").stdout


def test_a_group_has_its_own_percentage(names: list[str]) -> None:
    done = cli(
        "select", RESULT, "--top-percent", "50", "--group", "mlp.*=100", "--group", "self_attn.q_proj=0", "--json"
    )
    counts = {group: len(modules) for group, modules in json.loads(done.stdout)["chosen"].items()}
    assert (counts["mlp.up_proj"], counts["self_attn.q_proj"], counts["self_attn.v_proj"]) == (4, 0, 2)


def test_without_head_and_embedding_their_patterns_are_not_written_either(names: list[str]) -> None:
    done = cli("select", RESULT, "--top-percent", "50", "--no-head", "-o", "a.yaml")
    assert "^model.embed_tokens.weight$" in done.stdout and "lm_head" not in done.stdout.split("wrote")[1]
    patterns = yaml.safe_load(Path("a.yaml").read_text())["unfrozen_parameters"]
    assert patterns[0] == "^model.embed_tokens.weight$" and not any("lm_head" in pattern for pattern in patterns)


def test_entries_that_are_not_as_spectrum_writes_them_are_pointed_at(names: list[str]) -> None:
    Path("names.txt").write_text("\n".join([*names, "model.layers.1.mlp.up_proj_2.weight"]))
    command: list[str | Path] = ["select", RESULT, "--top-percent", "100"]
    assert "with a $ at the end" not in cli(*command).stdout
    done = cli(*command, "--names-from", "names.txt")
    assert "1 entry, model.layers.1" in done.stdout and "model.layers.1.mlp.up_proj.weight$" in done.stdout


def test_a_tied_head_that_spectrums_patterns_miss_is_pointed_at(save: Save) -> None:
    tensors = {"transformer.wte.weight": torch.randn(64, 16)}
    tensors |= {f"transformer.h.{i}.mlp.c_fc.weight": torch.randn(16, 64) for i in range(2)}
    scan(str(save(tensors, config={"architectures": ["GPT2LMHeadModel"]})), name="x")
    done = cli("select", RESULT, "--top-percent", "50")
    assert "the head is transformer.wte" in done.stderr
    assert "the head is" not in cli("select", RESULT, "--top-percent", "50", "--no-head").stderr


def test_sizes_that_are_not_known_are_said_so() -> None:
    done = cli("select", FOREIGN, "--top-percent", "50", "--json")
    assert "trainable_weights" not in json.loads(done.stdout) and "not known" in done.stderr
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
        (["--top-percent", "50", "--group", "mlp.up_proj"], 2, "bad_percent"),
        (["--top-percent", "50", "--group", "mlp.up_proj=half"], 2, "bad_percent"),
        (["--top-percent", "50", "--group", "mlp.up_proj=nan"], 2, "bad_percent"),
        (["--top-percent", "50", "--group", "nobody=5"], 2, "no_such_group"),
        (["--top-percent", "50", "--min-per-group", "-1"], 2, "bad_count"),
        (["--top-percent", "50", "--format", "nobody"], 2, "no_such_format"),
        (["--top-percent", "50", "--format", "llama-factory"], 1, "needs_names"),
        (["--top-percent", "50", "--format", "peft"], 1, "not_adaptable"),
        (["--top-percent", "50", "--format", "axolotl-snr", "--no-head"], 1, "inexact"),
        (["--top-percent", "50", "--names-from", "missing.txt"], 2, "no_such_file"),
        (["--top-percent", "50", "--names-from", "empty.txt"], 2, "no_names"),
        (["--top-percent", "50", "--names-from", "others.txt"], 1, "no_such_parameter"),
        (["--top-percent", "50", "-o", "result.json"], 2, "conflicting_options"),
        (["--top-percent", "1", "--no-head", "--no-embeddings"], 1, "nothing_chosen"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(options: list[str], code: int, why: str) -> None:
    Path("result.json").write_bytes(FOREIGN.read_bytes())
    Path("empty.txt").write_text("\n")
    Path("others.txt").write_text("transformer.h.0.mlp.c_fc.weight\n")
    before = sorted(Path().iterdir())
    assert reason(cli("select", "result.json", *options, code=code)) == why
    assert sorted(Path().iterdir()) == before and Path("result.json").read_bytes() == FOREIGN.read_bytes()
