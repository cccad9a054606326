"""A timeline as a figure: the public names of ``dualpipe.timeline.picture``.  Needs matplotlib."""

from dualpipe.timeline.picture import draw, render, write

__all__ = ["draw", "render", "write"]
