"""Check the direction of imports, and that each side effect has only one place."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spectrum_stream
from spectrum_stream import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spectrum_stream"

# Data flow down this list. A stage imports only from the rows above it.
STAGES: list[set[str]] = [
    {"errors", "text"},
    {"files"},
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
# Packages that load slowly or have effects, each with the stage or file that may import it.
OWNERS = {
    "torch": {"numerics", "streaming.decode", "model.transformers_names", "trainers.freeze"},
    "safetensors": {"streaming.decode"},
    **{name: {"checkpoint"} for name in ("huggingface_hub", "httpx", "requests", "urllib", "http", "socket")},
    "sqlite3": {"results"},
    "yaml": {"trainers"},
    "typer": {"cli"},
    "rich": {"cli", "report.terminal"},
    "questionary": {"cli"},
    "transformers": {"model.transformers_names"},
}
PRINTERS = {"cli", "__main__"}
PRINTING = {"print", "input", "exit", "echo", "secho"}
CORE = {"huggingface_hub", "numpy", "safetensors", "torch", "typer", "yaml", "rich"}
EXTRAS = {"questionary", "transformers"}

FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    """Return the name of a module in the package, e.g. `trainers.axolotl`.

    `trainers/__init__.py` has the name `trainers`.
    """
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def stage_of(path: Path) -> str:
    return name_of(path).split(".")[0]


def tree_of(path: Path) -> ast.Module:
    """Parse a file, and remove the imports that only a type checker sees."""
    tree = ast.parse(path.read_text())
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING":
            branch.body = [ast.Pass()]
    return tree


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Return the stages, and the other packages, that a file imports at run time."""
    ours, theirs = set(), set()
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            inside = [part for part in base[1:] if part]
            ours |= {inside[0]} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            theirs.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            theirs |= {alias.name.split(".")[0] for alias in node.names}
    return ours, theirs


def test_every_file_is_in_a_stage() -> None:
    assert {stage_of(path) for path in FILES} == set.union(*STAGES)


def test_stage_imports_only_from_the_stages_above_it() -> None:
    row_of = {stage: i for i, row in enumerate(STAGES) for stage in row}
    backwards = [
        f"{name_of(path)} imports {stage}"
        for path in FILES
        for stage in imports_of(path)[0] - {stage_of(path)}
        if row_of.get(stage, len(STAGES)) >= row_of[stage_of(path)]
    ]
    assert not backwards


def test_slow_imports_and_effects_are_in_allowed_files_only() -> None:
    strangers = [
        f"{name_of(path)} imports {name}"
        for path in FILES
        for name in imports_of(path)[1] & set(OWNERS)
        if not {stage_of(path), name_of(path)} & OWNERS[name]
    ]
    assert not strangers


def test_only_the_command_line_prints() -> None:
    calls = [
        f"{name_of(path)} calls {name}"
        for path in FILES
        if stage_of(path) not in PRINTERS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (name := node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")) in PRINTING
    ]
    assert not calls


OPENERS = {"open", "fdopen", "read_text", "read_bytes", "safe_open"}
PARSERS = {"load", "loads", "load_all", "safe_load", "safe_load_all", "full_load", "unsafe_load"}
# The files that may read or parse without `files.py`, each with the reason.
DOORS = {
    "files": "the door itself",
    "__main__": "opens /dev/null",
    "checkpoint.header json.loads": "with hooks, after check_json",
    "checkpoint.ranges path.open": "writes our temporary shard",
    "cli.limits os.open": "opens /dev/null",
    "model.limited_process os.fdopen": "the standard streams of a process of ours",
    "model.limited_process json.loads": "what this program and that process send to each other",
    "model.family_names": "a file of the package",
    "report.page": "files of the package, and of plotly",
    "results.atomic": "the door for files that this program writes",
    "results.journal json.loads": "parses text that it just wrote",
    "results.output": "writes the file of -o",
    "streaming.decode safe_open": "by the descriptor of an open file",
    "streaming.downloaded (folder / _MARKER).open": "writes the mark of our folder",
    "trainers.expression_process json.loads": "what this program sends to a process of its own",
    "trainers.expressions json.loads": "what that process answers",
    "trainers.reading yaml.load": "within the limits of texts",
}


def test_untrusted_files_are_read_only_by_files_py() -> None:
    found: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            owner, _, last = called.rpartition(".")
            # `Result.open` uses `files.py`, and a bare `read_text` is a function of this package.
            is_ours = owner in ("Result", "cls") or called == "read_text"
            if last in OPENERS | PARSERS and not is_ours:
                found.setdefault(name_of(path), []).append(called)
    doors = {name if name in DOORS else f"{name} {called}" for name, calls in found.items() for called in calls}
    assert doors == set(DOORS)


# The files that change files or folders, each with the reason.
WRITERS = {
    "results.atomic": "the door for results, selections, provenance and pages",
    "results.journal": "puts a new record in its place",
    "results.holder": "removes its own file",
    "streaming.downloaded": "the folder of temporary shards, which has a mark",
    "checkpoint.hub": "the reference in the cache of huggingface_hub",
}
CHANGES = {
    "write_text", "write_bytes", "mkdir", "makedirs", "unlink", "rmdir", "rmtree", "symlink_to", "hardlink_to",
    "touch", "chmod", "mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory",
    "mkfifo", "tofile", "save_file", "os.remove", "os.rename", "os.replace", "os.link", "os.symlink",
    "shutil.copy", "shutil.copyfile", "shutil.copytree", "shutil.move",
}  # fmt: skip


def test_files_and_folders_are_changed_only_by_the_doors() -> None:
    """Calls of `open` are in `DOORS`."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            # `replace` of a text has two arguments, and `self.rename` changes the name of a parameter.
            is_moved = called.endswith((".replace", ".rename")) and len(node.args) == 1 and called != "self.rename"
            if is_moved or {called, called.rpartition(".")[2]} & CHANGES:
                found.add(name_of(path))
    assert found == set(WRITERS)


def test_imports_are_declared_dependencies() -> None:
    known = set(sys.stdlib_module_names) | CORE | EXTRAS
    undeclared = [f"{name_of(path)} imports {name}" for path in FILES for name in imports_of(path)[1] - known]
    assert not undeclared


def test_functions_have_at_most_six_arguments_by_position() -> None:
    """In a longer call, a reader would not notice two swapped arguments.

    Commands are exempt, because only Typer calls them, by keyword.
    """
    too_many = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not (stage_of(path) == "cli" and node.name.endswith("_command")):
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                if len([name for name in names if name not in ("self", "cls")]) > 6:
                    too_many.append(f"{name_of(path)} {node.name}")
    assert not too_many


def test_large_dataclasses_take_their_fields_by_name() -> None:
    by_position = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                fields = [ast.unparse(part.annotation) for part in node.body if isinstance(part, ast.AnnAssign)]
                # The fields after a `KW_ONLY` are given by name.
                first = fields[: fields.index("KW_ONLY")] if "KW_ONLY" in fields else fields
                if "dataclass" in decorators and "kw_only=True" not in decorators and len(first) > 5:
                    by_position.append(f"{name_of(path)} {node.name}")
    assert not by_position


def test_tree_of_the_readme_names_every_file_and_no_other() -> None:
    tree = (PACKAGE / "README.md").read_text().split("```")[1]
    # `axolotl.py` and, for the other trainers and commands, bare names after "also".
    listed = set(re.findall(r"── ([\w./]+)", tree))
    listed |= {f"{name}.py" for names in re.findall(r"also ([\w, ]+)", tree) for name in names.split(", ")}
    files = {path.name for path in FILES} | {"__init__.py"}
    formats = {path.name for path in (PACKAGE / "model" / "schemes").glob("*.py")}
    folders = {f"{path.name}/" for path in [*PACKAGE.iterdir(), *PACKAGE.glob("*/*")] if path.is_dir()}
    assert listed - folders <= files
    assert files - formats <= listed
    assert {stage_of(path) for path in FILES if path.parent != PACKAGE} <= {name.rstrip("/") for name in listed}


def test_folders_have_at_most_sixteen_entries() -> None:
    # `py.typed` is an empty mark for type checkers.
    entries = [path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= 16, sorted(entries)


COMMANDS = "from spectrum_stream.cli import check, compare, demo, plan, report, scan, select, verify"


@pytest.mark.parametrize("code", [COMMANDS, "from spectrum_stream import plan, select, freeze"])
def test_import_of_the_package_loads_no_torch(code: str) -> None:
    check = f"{code}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_public_names_are_those_of_their_modules() -> None:
    for name in spectrum_stream.__all__:
        value = getattr(spectrum_stream, name)
        assert name == "Event" or value.__name__ == name
    with pytest.raises(AttributeError):
        _ = spectrum_stream.nothing


def test_error_tree_in_the_docstring_is_complete() -> None:
    drawn = re.findall(r"[├└]── (\w+)|^    (\w+Error) ", errors.__doc__ or "", re.MULTILINE)
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SpectrumStreamError)
    }
    assert {a or b for a, b in drawn} == classes
