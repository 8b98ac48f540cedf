"""The command line: one command per file, under its own name."""
