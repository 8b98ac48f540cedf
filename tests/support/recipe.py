"""Follow a recipe of a README literally, in a copy of the package, and run the copy."""

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import spectrum_stream

PACKAGE = Path(spectrum_stream.__file__).parent


def follow_recipe(folder: Path, stage: str, title: str, package: str, registry: str = "__init__.py") -> None:
    """Copy the package into a folder, write the new file, and add its import and its row.

    Args:
        stage: the folder with the README that has the recipe, a section with one python block and one diff block.
        title: the title of the section.
        package: the folder of the new file `toy.py` and of the registry.
        registry: the file with the rows.
    """
    section = (PACKAGE / stage / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    (source,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    shutil.copytree(PACKAGE, folder / "spectrum_stream", ignore=shutil.ignore_patterns("__pycache__"))
    copy = folder / "spectrum_stream" / package
    (copy / "toy.py").write_text(source)
    rows = (copy / registry).read_text()
    for before, line in pairwise(diff.splitlines()):
        if line.startswith("+"):
            assert rows.count(f"{before[1:]}\n") == 1
            rows = rows.replace(f"{before[1:]}\n", f"{before[1:]}\n{line[1:]}\n")
    (copy / registry).write_text(rows)


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
