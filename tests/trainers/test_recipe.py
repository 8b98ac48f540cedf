"""The recipe "Add a trainer" of the README, followed literally in a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import spectrum_stream

from ..support.checkpoints import GOLDEN

PACKAGE = Path(spectrum_stream.__file__).parent
RESULT = GOLDEN / "snr_results_smollm2.json"


def follow_recipe(folder: Path) -> None:
    """Copy the package into the folder, write the new file, and add its import and its row."""
    readme = (PACKAGE / "trainers" / "README.md").read_text()
    section = readme.split("\n## Add a trainer\n")[1].split("\n## ")[0]
    (source,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    shutil.copytree(PACKAGE, folder / "spectrum_stream", ignore=shutil.ignore_patterns("__pycache__"))
    trainers = folder / "spectrum_stream" / "trainers"
    (trainers / "toy.py").write_text(source)
    registry = (trainers / "__init__.py").read_text()
    for before, line in pairwise(diff.splitlines()):
        if line.startswith("+"):
            assert registry.count(f"{before[1:]}\n") == 1
            registry = registry.replace(f"{before[1:]}\n", f"{before[1:]}\n{line[1:]}\n")
    (trainers / "__init__.py").write_text(registry)


def run(folder: Path, *args: str | Path, code: int = 0) -> str:
    """Run the command line of the copy in a process, and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "spectrum_stream", *map(str, args)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the extended copy of the package, a selection for the new trainer, and the names of the model."""
    folder = tmp_path_factory.mktemp("recipe")
    follow_recipe(folder)
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
