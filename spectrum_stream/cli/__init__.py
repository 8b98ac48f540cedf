"""The commands, by what they are about: each takes typed options and returns; `cli` puts them together."""
