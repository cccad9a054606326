"""The checks of the gate: what each runs, and how its answer is read."""
