"""The code bases that adapters read, re-implemented: their modules, their computation, their files."""
