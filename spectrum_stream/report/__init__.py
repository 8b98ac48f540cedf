"""A result made visible: its data laid out as a map of layers by groups, for a browser and for a terminal."""
