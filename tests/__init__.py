import os

# The colors and the width that whoever runs the suite has asked for are not those of the commands under test. Typer
# reads these when it is imported, which is after this.
for _name in ("FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TERMINAL_WIDTH"):
    os.environ.pop(_name, None)
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
