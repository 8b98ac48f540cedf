import os

# The commands under test must not have the colors and the width of the terminal that runs the suite. Typer
# reads these when it is imported, which is after this.
for _name in ("FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TERMINAL_WIDTH"):
    os.environ.pop(_name, None)
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
