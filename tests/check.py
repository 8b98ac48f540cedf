"""Check this repository: `python3 -m tests.check`, with any Python from 3.11 and nothing installed.

Environments are made in the root folder when a step first needs them, and again when their requirements change:
`.venv-lint` (ruff), `.venv-test` (the suite), `.venv-olah` (a server of the Hub's protocol, which needs older
libraries). Steps can be named: `python3 -m tests.check lint fast`. Without a name all of them run, the quick ones
first.
"""

import argparse
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
OLAH = "olah==0.5.4"
# The stages that read untrusted data and keep results whole.
GATED = ("tests/checkpoint", "tests/results")


def run(environment: str, *command: str) -> None:
    """Run a program of an environment; exit with its code if it fails."""
    print("+", f"{environment}/bin/{command[0]}", *command[1:], flush=True)
    done = subprocess.run([str(ROOT / environment / "bin" / command[0]), *command[1:]], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def make(environment: str, *installs: tuple[str, ...], depends_on: tuple[str, ...] = ()) -> None:
    """Make an environment, unless it exists with the same requirements.

    Args:
        installs: arguments of `pip install`, one call each.
        depends_on: files with requirements.
    """
    stamp = ROOT / environment / "installed.txt"
    wanted = "\n".join([*map(str, installs), *((ROOT / file).read_text("utf-8") for file in depends_on)])
    if stamp.exists() and stamp.read_text("utf-8") == wanted:
        return
    venv.create(ROOT / environment, with_pip=True, clear=True)
    for arguments in installs:
        run(environment, "pip", "install", "-q", "--disable-pip-version-check", *arguments)
    stamp.write_text(wanted, "utf-8")


def lint() -> None:
    """Check formatting and lint rules; seconds."""
    make(".venv-lint", ("ruff",))
    run(".venv-lint", "ruff", "check", ".")
    run(".venv-lint", "ruff", "format", "--check", ".")


def _make_test_environment() -> None:
    # The tests run only the functions of the trainers that match names, and those of the libraries of formats that
    # unpack weights, so their dependencies are not needed.
    make(
        ".venv-test",
        (TORCH, "-e", ".[test]"),
        ("--no-deps", "-r", "tests/trainers.txt"),
        ("--no-deps", "-r", "tests/judges.txt"),
        depends_on=("pyproject.toml", "tests/trainers.txt", "tests/judges.txt"),
    )


def types() -> None:
    """Check types; a minute."""
    _make_test_environment()
    run(".venv-test", "mypy")


def fast() -> None:
    """Run all tests but the slow ones, with the coverage gate of two stages."""
    _make_test_environment()
    pytest = ("python", "-m", "pytest", "-n", "2", "-m", "not slow")
    # Coverage doubles the time of a test, and the tests of these two stages reach the gate.
    run(".venv-test", *pytest, *GATED, "--cov")
    run(".venv-test", *pytest, *(f"--ignore={folder}" for folder in GATED))


def slow() -> None:
    """Run the tests with servers, a browser, trainers, real checkpoints and killed processes."""
    _make_test_environment()
    make(".venv-olah", (OLAH,))
    run(".venv-test", "python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "-m", "slow")


STEPS: dict[str, Callable[[], None]] = {step.__name__: step for step in (lint, types, fast, slow)}


def main() -> None:
    steps = "\n".join(f"  {name:6} {step.__doc__}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.check",
        description=f"Check this repository by all or some of these steps:\n\n{steps}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="all of them if none is named")
    names = parser.parse_args().steps or list(STEPS)
    if unknown := set(names) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}")
    for name in names:
        STEPS[name]()


if __name__ == "__main__":
    main()
