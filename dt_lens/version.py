"""The version of dt-lens."""

__version__ = "0.2.0"
