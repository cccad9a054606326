"""The comparison of a recorded step with a plain run of its modules.  It needs torch, unlike the folder above."""

from dualpipe.record.plain.compare import add_comparison, compare

__all__ = ["add_comparison", "compare"]
