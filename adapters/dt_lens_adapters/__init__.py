"""One file per family of checkpoints; the core finds them through the entry-point group ``dt_lens.adapters``."""
