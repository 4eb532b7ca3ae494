"""The commands, one per file, each a thin call of the Python API."""
