"""Check a dated result of the benchmarks."""

import importlib.util
import re
from datetime import date

_FACTS = ("Hardware", "Versions", "Command")


def check_dated_file(text: str, day: date) -> None:
    """Check that a dated result has its day, hardware, versions and a real command."""
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].endswith(f", {day.day} {day:%B %Y}")
    assert lines[1] == lines[5] == ""
    facts = [re.fullmatch(rf"- {name}: (.+)", line) for name, line in zip(_FACTS, lines[2:5], strict=True)]
    assert all(facts), lines[2:5]
    hardware, versions, command = (fact[1] for fact in facts if fact)
    assert "core" in hardware or "GPU" in hardware
    assert re.search(r"\d+", versions)
    modules = re.findall(r"`python -m (\S+)(?= |`)", command)
    assert modules
    assert all(importlib.util.find_spec(module) for module in modules)
    assert any(line.startswith("| ") for line in lines[6:])
