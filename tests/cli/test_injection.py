"""Names that want to be more than names, in every place of a checkpoint and through to every output.

What is shown is inert; what is written and read back is what it was; what an output cannot hold is refused.
"""

import io
import json
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from spectrum_stream import plan, scan, select
from spectrum_stream.checkpoint.index import is_safe_shard_name
from spectrum_stream.cli.tables import plan_table, remarks, score_table
from spectrum_stream.errors import ResultError, SpectrumStreamError
from spectrum_stream.model.names import slug
from spectrum_stream.text import printable
from spectrum_stream.trainers import DEFAULT, axolotl

from ..conftest import Save

CORPUS = {
    "color": "\x1b[31mred",
    "clear screen": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link (OSC 8)": "\x1b]8;;http://evil.example\x1b\\\\click\x1b]8;;\x1b\\\\",
    "clipboard (OSC 52)": "\x1b]52;c;ZXZpbA==\x07",
    "C1 CSI": "\x9b31m",
    "bidi override": "a\u202eb\u2066c",
    "zero width": "a\u200bb\ufeff",
    "carriage return": "safe\revil",
    "newline": "a\nb: !!python/object/apply:os.system [id]",
    "line separator": "a\u2028b\u2029c",
    "NUL": "a\0b",
    "rich markup": "[bold red]x[/bold red][/x][link=http://evil.example]y[/link]",
    "script": "</script><script>alert(1)</script>",
    "img": "<img src=x onerror=alert(1)>",
    "YAML tag": "!!python/object/apply:os.system",
    "YAML comment": "a # b",
    "YAML list": "- a",
    "YAML null": "null",
    "YAML octal": "0o17",
    "regex": ".*",
    "regex bomb": "(a+)+$",
    "regex alternation": "a|b",
    "CSV formula": '=HYPERLINK("http://evil.example")',
    "CSV plus": "+1+1|cmd",
    "path up": "../../etc/passwd",
    "path absolute": "/etc/passwd",
    "path Windows": "C:\\\\evil",
    "shell": "$(touch evil); `touch evil`; 'touch evil",
    "format": "{0.__class__} %s %n",
    "quotes": "a\"b'c\\\\",
    "other scripts": "ｆｕｌｌ ворлд 世界 🦙",
    "long": "x" * 300,
}
payloads = pytest.mark.parametrize("payload", CORPUS.values(), ids=CORPUS)


@pytest.fixture(autouse=True)
def _in_working_folder(working_folder: Path) -> None:
    pass


def inert(text: str) -> bool:
    return all(c == "\n" or c.isprintable() for c in text)


def rendered(*renderables: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=2000, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return out.getvalue()


@payloads
def test_as_a_module_and_a_group(save: Save, payload: str) -> None:
    module = f"layers.0.{payload}"
    folder = save({f"{module}.weight": torch.randn(6, 9), "layers.0.bad.weight": torch.full((2, 2), torch.nan)})
    result = scan(str(folder), name="x")
    shown = rendered(plan_table(result.plan), score_table(result.modules, None), *map(printable, remarks(result)))
    assert inert(shown)
    # The table is as wide as its console, and a long name goes over several of its lines.
    assert printable(payload).replace(" ", "")[:200] in re.sub(r"\s", "", shown)
    published = json.loads(Path("model_snr_results/snr_results_x.json").read_text("utf-8"))
    assert published[module]["type"] == payload and [s.name for s in select(result.written[0], 100).ranked[payload]]
    with sqlite3.connect(Path("model_snr_results/snr_results_x.sqlite")) as db:
        assert (module, payload) in db.execute("SELECT module, group_name FROM matrices").fetchall()
    db.close()


@payloads
def test_in_the_yaml_it_is_itself_or_refused(save: Save, payload: str) -> None:
    module = f"layers.0.{payload}"
    result = scan(str(save({f"{module}.weight": torch.randn(6, 9)})), name="x")
    try:
        text = DEFAULT.render(select(result.modules, 100))
    except ResultError as error:
        assert error.reason == "unsafe_name"
        assert not list(Path().glob("*.yaml"))
        return
    assert yaml.safe_load(text)["unfrozen_parameters"][2:] == [module]
    assert axolotl.Pattern(module).matches(f"{module}.weight") and not axolotl.Pattern(module).matches("other")


@payloads
def test_as_the_name_of_the_model(save: Save, payload: str) -> None:
    folder = save({"a.weight": torch.randn(6, 9)})
    try:
        result = scan(str(folder), name=payload)
    except SpectrumStreamError as error:
        assert error.reason == "bad_name"
        return
    inside = Path("model_snr_results").resolve()
    assert all(p.resolve().parent in (inside, Path().resolve()) for p in result.written)
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]{1,200}", p.name) for p in result.written)
    assert not Path("evil").exists() and "/" not in slug(payload)


@payloads
def test_as_the_name_of_a_shard(save: Save, payload: str) -> None:
    folder = save({f"layers.{i}.weight": torch.ones(2, 3) for i in range(2)}, shards=2)
    index = folder / "model.safetensors.index.json"
    name = f"{payload}.safetensors"
    data = json.loads(index.read_text())
    data["weight_map"]["layers.0.weight"] = name
    index.write_text(json.dumps(data))
    with pytest.raises(SpectrumStreamError) as error:
        plan(str(folder))
    # A name that is too long for the file system cannot even be looked for.
    expected = {"missing_shard", "unreadable"} if is_safe_shard_name(name) else {"unsafe_shard_name"}
    assert error.value.reason in expected
    assert inert(printable(str(error.value)))


@payloads
def test_as_metadata_it_is_not_even_read(save: Save, payload: str) -> None:
    from safetensors.torch import save_file

    folder = save({"a.weight": torch.ones(2, 3)})
    save_file({"a.weight": torch.ones(2, 3)}, folder / "model.safetensors", metadata={payload: payload})
    assert inert(rendered(plan_table(plan(str(folder)))))


@pytest.mark.parametrize("payload", ["[/x]\x1b]0;owned\x07", "$(touch evil)", "世界"])
def test_through_the_command_line(save: Save, payload: str) -> None:
    folder = save({f"layers.0.{payload}.weight": torch.randn(6, 9)}, folder="model $(touch evil)")
    for command in (
        ["plan"],
        ["scan", "--name", "x"],
        ["scan", "--name", payload, "--out", payload.replace("/", "")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "spectrum_stream", command[0], str(folder), *command[1:]],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert inert(done.stdout + done.stderr)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("next: ")]
        words = shlex.split(line.removeprefix("next: "))
        assert words[0] == "spectrum-stream" and not Path("evil").exists()
    assert str(folder) in words or words[1] == "select"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_on_a_terminal_of_another_encoding(save: Save, encoding: str) -> None:
    folder = save({"layers.0.世界.weight": torch.randn(6, 9)})
    done = subprocess.run(
        [sys.executable, "-m", "spectrum_stream", "scan", str(folder), "--name", "x"],
        capture_output=True, check=False, env={"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert ("世界".encode() if encoding == "utf-8" else b"\\u4e16\\u754c") in done.stdout


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "1>&- 2>&-", "0<&-"])
def test_with_a_stream_that_is_closed(save: Save, closed: str) -> None:
    folder = save({"layers.0.up.weight": torch.randn(6, 9)})
    command = f"{sys.executable} -m spectrum_stream scan {folder} --name x {closed}"
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    assert json.loads(Path("model_snr_results/snr_results_x.json").read_text())
    with sqlite3.connect("model_snr_results/snr_results_x.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_a_folder_whose_name_is_no_text(save: Save, tmp_path: Path) -> None:
    folder = save({"layers.0.up.weight": torch.randn(6, 9)})
    odd = bytes(tmp_path) + b"/\xff\xfe"
    try:
        folder.rename(odd.decode("utf-8", "surrogateescape"))
    except OSError:
        pytest.skip("a file system that takes text only")
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"spectrum_stream", b"scan", odd, b"--top-percent", b"50"],
        capture_output=True,
        check=False,
    )
    # safetensors opens no such path: the one sentence says so, and the plan is shown all the same.
    assert done.returncode == 1 and b"(unreadable)" in done.stderr and b"Traceback" not in done.stderr
    assert b"\\udcff" in done.stderr, done.stderr
