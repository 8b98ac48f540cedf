"""Hostile names in every place of a checkpoint, up to every output.

Shown names are inert, written names are read back unchanged, and names that an output cannot hold are rejected.
"""

import io
import json
import re
import shlex
import sqlite3
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from spectrum_stream import plan, scan, select
from spectrum_stream.checkpoint.index import is_safe_shard_name
from spectrum_stream.cli.tables import plan_table, scan_warnings, score_table
from spectrum_stream.errors import ResultError, SpectrumStreamError
from spectrum_stream.model.names import slug
from spectrum_stream.selection.select import rank
from spectrum_stream.text import printable
from spectrum_stream.trainers import DEFAULT, axolotl
from spectrum_stream.trainers.trainer import find_matches

from ..support.checkpoints import Save
from ..support.cli import Cli, reason
from ..support.hostile import CORPUS, inert

pytestmark = pytest.mark.usefixtures("working_folder")

payloads = pytest.mark.parametrize("payload", CORPUS.values(), ids=CORPUS)


def rendered(*renderables: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=2000, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    return out.getvalue()


@payloads
def test_hostile_module_and_group_are_inert_and_kept(save: Save, payload: str) -> None:
    module = f"layers.0.{payload}"
    folder = save({f"{module}.weight": torch.randn(6, 9), "layers.0.bad.weight": torch.full((2, 2), torch.nan)})
    result = scan(str(folder), name="x")
    warnings = map(printable, scan_warnings(result))
    shown = rendered(plan_table(result.plan), score_table(rank(result.modules), result.result.metric), *warnings)
    assert inert(shown)
    # The table is as wide as its console, so a long name takes several lines.
    assert printable(payload).replace(" ", "")[:200] in re.sub(r"\s", "", shown)
    published = json.loads(Path("model_snr_results/snr_results_x.json").read_text("utf-8"))
    assert published[module]["type"] == payload
    assert [s.name for s in select(result.written[0], 100).ranked[payload]]
    with sqlite3.connect(Path("model_snr_results/snr_results_x.sqlite")) as db:
        assert (module, payload) in db.execute("SELECT module, group_name FROM matrices").fetchall()
    db.close()


@payloads
def test_hostile_module_in_yaml_is_literal_or_rejected(save: Save, payload: str) -> None:
    module = f"layers.0.{payload}"
    result = scan(str(save({f"{module}.weight": torch.randn(6, 9)})), name="x")
    try:
        text = DEFAULT.render(select(result.modules, 100))
    except ResultError as error:
        assert error.reason == "unsafe_name"
        assert not list(Path().glob("*.yaml"))
        return
    assert yaml.safe_load(text)["unfrozen_parameters"][2:] == [module]
    names = (f"{module}.weight", "other")
    assert find_matches([axolotl.entry_of(module)], names) == {f"{module}.weight"}


@payloads
def test_hostile_model_name_stays_in_the_folder(save: Save, payload: str) -> None:
    folder = save({"a.weight": torch.randn(6, 9)})
    try:
        result = scan(str(folder), name=payload)
    except SpectrumStreamError as error:
        assert error.reason == "bad_name"
        return
    inside = Path("model_snr_results").resolve()
    assert all(p.resolve().parent in (inside, Path().resolve()) for p in result.written)
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]{1,200}", p.name) for p in result.written)
    assert not Path("evil").exists()
    assert "/" not in slug(payload)


@payloads
def test_hostile_shard_name_is_rejected(save: Save, payload: str) -> None:
    folder = save({f"layers.{i}.weight": torch.ones(2, 3) for i in range(2)}, shards=2)
    index = folder / "model.safetensors.index.json"
    name = f"{payload}.safetensors"
    data = json.loads(index.read_text())
    data["weight_map"]["layers.0.weight"] = name
    index.write_text(json.dumps(data))
    with pytest.raises(SpectrumStreamError) as error:
        plan(str(folder))
    # The file system cannot look up a name that is too long.
    expected = {"missing_shard", "unreadable"} if is_safe_shard_name(name) else {"unsafe_shard_name"}
    assert error.value.reason in expected
    assert inert(printable(str(error.value)))


@payloads
def test_hostile_metadata_is_not_read(save: Save, payload: str) -> None:
    from safetensors.torch import save_file

    folder = save({"a.weight": torch.ones(2, 3)})
    save_file({"a.weight": torch.ones(2, 3)}, folder / "model.safetensors", metadata={payload: payload})
    assert inert(rendered(plan_table(plan(str(folder)))))


@pytest.mark.parametrize("payload", ["[/x]\x1b]0;owned\x07", "$(touch evil)", "世界"])
def test_hostile_names_through_the_command_line(cli: Cli, save: Save, payload: str) -> None:
    folder = save({f"layers.0.{payload}.weight": torch.randn(6, 9)}, folder="model $(touch evil)")
    for command in (
        ["plan"],
        ["scan", "--name", "x"],
        ["scan", "--name", payload, "--out", payload.replace("/", "")],
    ):
        done = cli(command[0], folder, *command[1:])
        assert inert(done.stdout + done.stderr)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("next: ")]
        words = shlex.split(line.removeprefix("next: "))
        assert words[0] == "spectrum-stream"
        assert not Path("evil").exists()
    assert str(folder) in words or words[1] == "select"


def test_folder_name_that_is_not_text_gives_one_sentence(cli: Cli, save: Save, tmp_path: Path) -> None:
    folder = save({"layers.0.up.weight": torch.randn(6, 9)})
    odd = (bytes(tmp_path) + b"/\xff\xfe").decode("utf-8", "surrogateescape")
    try:
        folder.rename(odd)
    except OSError:
        pytest.skip("a file system that takes text only")
    # safetensors cannot open such a path. On Linux the scan gives it another path. Elsewhere this is an error.
    done = cli("scan", odd, "--top-percent", "50", code=0 if Path("/proc/self/fd").exists() else 1)
    assert done.returncode == 0 or reason(done) == "unreadable"
    assert "\\udcff" in done.stderr
