"""The recipe "Add a trainer" of the README, followed literally in a copy of the package."""

import json
from pathlib import Path

import pytest

from ..support.checkpoints import GOLDEN
from ..support.recipe import follow_recipe, run

RESULT = GOLDEN / "snr_results_smollm2.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the extended copy of the package, a selection for the new trainer, and the model's names."""
    folder = tmp_path_factory.mktemp("recipe")
    follow_recipe(folder, "trainers", "Add a trainer", "trainers")
    names = [f"{module}.weight" for module in json.loads(RESULT.read_text())]
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    run(folder, "select", RESULT, "--top-percent", "50", "--format", "toy", "-o", "chosen.txt")
    return folder


def test_recipe_adds_a_trainer_to_select(folder: Path) -> None:
    chosen = (folder / "chosen.txt").read_text().splitlines()
    assert "lm_head.weight" in chosen
    assert 100 < len(chosen) < len((folder / "names.txt").read_text().splitlines())


def test_recipe_adds_a_trainer_to_verify(folder: Path) -> None:
    assert ": OK" in run(folder, "verify", "chosen.txt", "--names", "names.txt", "--format", "toy")


def test_recipe_trainer_finds_a_name_of_another_model(folder: Path) -> None:
    (folder / "other.txt").write_text("lm_head.weight\ntransformer.h.0.mlp.c_fc.weight\n")
    command = ("verify", "other.txt", "--names", "names.txt", "--format", "toy", "--json")
    data = json.loads(run(folder, *command, code=4))
    assert [finding["reason"] for finding in data["findings"]] == ["no_match"]
