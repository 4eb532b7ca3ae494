"""What ``dt-lens bench`` measures: one module per subject, each with ``measure(quick)``, which yields rows."""
