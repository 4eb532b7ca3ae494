"""Find the bundled models."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled"]


def bundled() -> dict[str, Path]:
    """The bundled models: name to folder.

    >>> sorted(bundled())
    ['doorkey', 'hopper', 'taxi', 'tiny-gpt2', 'unlockpickup']
    """
    return {
        folder.name: folder for folder in sorted(Path(__file__).parent.iterdir()) if (folder / "config.json").is_file()
    }
