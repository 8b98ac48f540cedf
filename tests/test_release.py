"""The wheel and the sdist hold exactly the package, and can be installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import spectrum_stream

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spectrum_stream"
# Leftovers of a build, and large folders.
NOT_COPIED = (".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "model_snr_results")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and the sdist of this version into a folder."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_COPIED))
    # Without isolation, the build uses the installed backend and no network.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def files_of(package: Path) -> set[str]:
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_only_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.split("-")[1] == spectrum_stream.__version__
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
    # READMEs are only for readers of the sources.
    assert names == {name for name in files_of(PACKAGE) if not name.endswith(".md")}
    assert "spectrum_stream/py.typed" in names
    assert any(name.startswith("spectrum_stream/report/assets/") for name in names)


def test_sdist_holds_the_package_and_no_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert files_of(PACKAGE) - names <= {name for name in files_of(PACKAGE) if name.endswith(".md")}
    assert {"README.md", "LICENSE", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_metadata_is_accepted_by_an_index(built: Path) -> None:
    pytest.importorskip("readme_renderer")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_installs_in_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*install, str(wheel)], check=True)
    # The dependencies take gigabytes, so the installed ones are used; a path file ignores their editable installs.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def said(*command: str | Path) -> str:
        # Otherwise a path to this checkout would come first.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert said(python, "-c", "import spectrum_stream; print(spectrum_stream.__file__)").startswith(str(site))
    for script in ("spectrum-stream", "hf-spectrum"):
        assert said(python.with_name(script), "--version") == spectrum_stream.__version__
    assert said(python, "-m", "spectrum_stream", "--version") == spectrum_stream.__version__
