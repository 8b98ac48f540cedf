"""`python -m spectrum_stream`."""

from .cli import main

main()
