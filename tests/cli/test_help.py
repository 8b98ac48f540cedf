"""The help of the commands: its examples parse, its style holds, and the reference in the README is generated."""

import re
import subprocess
import sys
from typing import Any

import pytest

from spectrum_stream.cli.app import EXIT_CODES

from ..support.cli_reference import README, commands, examples_of, render, words_of

COMMANDS = commands()
OPTIONS = [
    pytest.param(param, id=f"{name}-{param.name}") for name, command in COMMANDS.items() for param in command.params
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_two_or_three_examples(name: str) -> None:
    assert 2 <= len(examples_of(COMMANDS[name])) <= 3


@pytest.mark.parametrize(
    ("name", "example"), [(name, line) for name, command in COMMANDS.items() for line in examples_of(command)]
)
def test_help_examples_parse(name: str, example: str) -> None:
    assert example.startswith(f"spectrum-stream {name}")
    with COMMANDS[name].make_context(name, words_of(example)) as context:
        assert not context.args


@pytest.mark.parametrize("name", COMMANDS)
def test_help_texts_have_no_final_period(name: str) -> None:
    texts = [COMMANDS[name].help, *(param.help for param in COMMANDS[name].params)]
    assert not [text for text in texts if not text or text.rstrip().endswith(".")]


@pytest.mark.parametrize("param", OPTIONS)
def test_help_of_an_option_starts_with_a_capital_and_has_a_panel(param: Any) -> None:
    if param.param_type_name == "argument" or param.hidden:
        return
    assert param.help[:1].isupper()
    assert param.rich_help_panel in {"Selection", "Budget", "Input", "Output", "Advanced"}


def test_help_of_select_has_its_panels_and_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spectrum_stream", "select", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "120", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    for panel in ("Selection", "Budget", "Output"):
        assert f"─ {panel} ─" in done.stdout
    assert "GROUP[=P]" in done.stdout
    assert "spectrum-stream select" in done.stdout.split("Examples:")[1]


def test_help_of_the_program_lists_every_exit_code() -> None:
    import typer

    from spectrum_stream.cli.app import app

    epilog = typer.main.get_command(app).epilog or ""
    assert [int(code) for code in re.findall(r"\b(\d+) ", epilog)] == list(EXIT_CODES)


def test_reference_is_generated_from_the_commands() -> None:
    assert README.read_text("utf-8") == render(), "run: python -m tests.support.cli_reference"
