"""Runs a schedule on real processes: the interpreter, its messages, and the split of a backward into B and W."""
