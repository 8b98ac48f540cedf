"""A selection in the words of one trainer a file, each with that trainer's way of matching names."""
