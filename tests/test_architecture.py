"""The layout is the architecture: each stage is a file, imports go one way, effects have one owner each."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import spectrum_stream
from spectrum_stream import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spectrum_stream"

# Data flows down this list. A stage imports only from the stages above it; two in one row do not know each other.
STAGES = [
    {"errors", "text"},
    {"checkpoint"},
    {"model"},
    {"numerics"},
    {"streaming", "results"},
    {"selection"},
    {"trainers"},
    {"pipeline"},
    {"report"},
    {"cli"},
    {"__main__"},
]
# Who may import what is slow to load, or has an effect: a stage, or one file of it.
OWNERS = {
    "torch": {"numerics", "streaming.decode", "model.transformers_names", "trainers.freeze"},
    "safetensors": {"streaming.decode"},
    "huggingface_hub": {"checkpoint"},
    "sqlite3": {"results"},
    "yaml": {"trainers"},
    "typer": {"cli"},
    "rich": {"cli", "report.terminal"},
    "questionary": {"cli"},
    "transformers": {"model.transformers_names"},
}


def module_of(path: Path) -> str:
    """`spectrum_stream/exporters/axolotl.py` belongs to the stage `exporters`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Stages of this package, and top-level names of others, that a file imports at run time."""
    ours, theirs = set(), set()
    tree = ast.parse(path.read_text())
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING":
            branch.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            # A stage's own folder, seen from inside it, is one dot; from a file of the package one dot is the root.
            inside = node.level == 1 and path.parent != PACKAGE
            ours |= {module_of(path)} if inside else set(names)
        elif isinstance(node, ast.ImportFrom):
            theirs.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            theirs |= {alias.name.split(".")[0] for alias in node.names}
    return ours - {"__version__"}, theirs


def test_every_file_has_a_place_in_the_reading_order() -> None:
    assert {module_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_files_above_it(path: Path) -> None:
    here = ORDER.index(module_of(path))
    for stage in imports(path)[0] - {module_of(path)}:
        assert ORDER.index(stage) < here, f"{path.name} imports {stage}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_imports_and_effects_have_their_owners(path: Path) -> None:
    for name in imports(path)[1] & set(OWNERS):
        assert module_of(path) in OWNERS[name], f"{path.name} imports {name}"
    if module_of(path) not in ("output", "commands", "cli", "__main__"):
        calls = {
            node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert not calls & {"print", "input", "exit", "echo", "secho"}


def test_the_readme_lists_the_files_in_reading_order() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", readme, re.MULTILINE)
    assert listed == [stage for stage in ORDER if stage != "__main__"]


def test_files_can_be_read_in_one_sitting() -> None:
    assert not {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 400}


@pytest.mark.parametrize("code", ["import spectrum_stream.cli", "from spectrum_stream import plan, select, freeze"])
def test_importing_loads_no_torch(code: str) -> None:
    check = f"{code}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_help_answers_at_once() -> None:
    # A bound on what no import of torch can meet (3 s here), not a target of speed.
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "spectrum_stream", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0


def test_public_names_are_importable_and_are_what_they_say() -> None:
    for name in spectrum_stream.__all__:
        value = getattr(spectrum_stream, name)
        assert name == "Event" or value.__name__ == name
    with pytest.raises(AttributeError):
        _ = spectrum_stream.nothing


def test_the_error_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── (\w+)|^    (\w+Error) ", errors.__doc__ or "", re.MULTILINE)
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SpectrumStreamError)
    }
    assert {a or b for a, b in drawn} == classes


def test_nothing_of_this_project_is_a_dependency_by_accident() -> None:
    """What the package imports is in the standard library, in the six core packages, or in an extra."""
    core = {"huggingface_hub", "numpy", "safetensors", "torch", "typer", "yaml", "rich"}
    extras = {"questionary", "transformers"}
    for path in FILES:
        unknown = imports(path)[1] - set(sys.stdlib_module_names) - core - extras
        assert not unknown, f"{path.name} imports {unknown}"
