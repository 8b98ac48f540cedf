"""The whole command line: one sentence, one reason and one exit code for every error."""

from pathlib import Path

import pytest
import torch

from spectrum_stream.errors import SourceError

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli, reason

pytestmark = pytest.mark.usefixtures("working_folder")

ESCAPE = "\x1b"


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
        (["plan", "{model}", "--groups", "mlp.up"], 2, "no_such_group"),
        (["scan", "{model}", "-i", "--groups", "mlp.*"], 2, "conflicting_options"),
        (["scan", "{model}", "-i"], 2, "not_a_terminal"),
        (["select", "no/such.json", "--top-percent", "50"], 1, "no_such_result"),
        (["scan", "{model}", "--name", "x" * 300], 2, "bad_name"),
        (["scan", "{model}", "--device", "cuda:99"], 2, "no_such_device"),
        (["scan", "{model}", "--device", "nonsense"], 2, "no_such_device"),
        (["scan", "{model}", "--max-memory", "10MB"], 2, "too_little_memory"),
        (["plan", "{model}", "--max-memory", "lots"], 2, "bad_size"),
    ],
)
def test_bad_input_gives_a_sentence_a_reason_and_a_code(
    cli: Cli, save: Save, args: list[str], code: int, why: str
) -> None:
    pytest.importorskip("questionary")
    folder = save(llama_tensors(1))
    done = cli(*(str(folder) if a == "{model}" else a for a in args), code=code)
    assert reason(done) == why
    assert done.stdout == ""
    assert not list(Path().iterdir())


@pytest.mark.parametrize("args", [["scan", "x", "--top-percent", "many"], ["scan", "x", "--nonsense"], ["nonsense"]])
def test_mistyped_command_line_exits_2(cli: Cli, args: list[str]) -> None:
    assert cli(*args, code=2).stdout == ""


def test_debug_variable_shows_the_traceback_without_signatures(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise SourceError("no", reason="unreachable") from ValueError("at https://x/y?Signature=secret")

    monkeypatch.setattr("spectrum_stream.streaming.plan.plan", fail)
    done = cli("plan", "m", code=1, SPECTRUM_STREAM_DEBUG="1")
    lines = done.stderr.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert len(lines) > 5
    assert "https://x/y?..." in done.stderr
    assert "secret" not in done.stderr
    assert lines[-1] == "error: no (unreachable)"


@pytest.mark.parametrize(
    "model",
    [
        "https://user:secretpw99@huggingface.co/org/name",
        "https://user:a:b@secretpw99@huggingface.co/org/name",
        "https://secretpw99@huggingface.co/org/name",
        "HTTP://user:secretpw99@localhost:8000/org/name",
        "hf://user:secretpw99@org/name",
        "user:secretpw99@host.com/org/name",
        ":secretpw99@host.com",
    ],
)
@pytest.mark.parametrize("debug", ["", "1"])
def test_password_in_the_model_is_not_shown(cli: Cli, model: str, debug: str) -> None:
    done = cli("plan", model, code=2, SPECTRUM_STREAM_DEBUG=debug)
    assert reason(done) == "bad_address"
    assert "secretpw99" not in done.stdout + done.stderr
    assert "HF_TOKEN" in done.stderr


@pytest.mark.parametrize(
    "model",
    ["org/name@rev", "name@rev", "hf://name@rev", "org/name:tag", "C:\\x@y", "C:/x@y", "http://localhost:1/a/b@c"],
)
def test_model_with_a_revision_or_a_drive_has_no_password(cli: Cli, model: str) -> None:
    done = cli("plan", model, code=None, HF_HUB_OFFLINE="1")
    assert "password" not in done.stderr


def test_model_that_exists_has_no_password(cli: Cli, save: Save, working_folder: Path) -> None:
    save(llama_tensors(1)).rename("a:b@c")
    cli("plan", "a:b@c")


def test_traceback_of_an_unknown_error_has_no_secrets(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("https://x/y?Signature=secret")

    monkeypatch.setattr("spectrum_stream.streaming.plan.plan", fail)
    # With this variable, the fixture accepts a traceback.
    done = cli("plan", "m", code=1, SPECTRUM_STREAM_DEBUG="")
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("KeyError: 'https://x/y?...'\n")


def test_broken_checkpoint_gives_one_sentence(cli: Cli, save: Save, tmp_path: Path) -> None:
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


def test_hostile_name_cannot_write_to_the_terminal(cli: Cli, save: Save) -> None:
    name = f"layers.0.{ESCAPE}]0;owned\x07[red]{ESCAPE}[2J\u202eup\n\r"
    folder = save({f"{name}.weight": torch.full((2, 3), float("nan")), "ok.weight": torch.ones(2, 3)})
    for done in (cli("plan", folder), cli("scan", folder, "--name", "x", code=3)):
        text = done.stdout + done.stderr
        assert not set(text) & set(f"{ESCAPE}\x07\r\u202e")
    assert "\\x1b" in done.stderr
    assert "[red]" in done.stderr
