"""Show a result: as a map in the terminal, or as an HTML page."""
