"""One self-contained HTML page about schedules: timelines, the counterexample drawn over them, tables.

``render`` is pure and gives the whole page as text.  It needs neither the prover nor torch: results arrive as
plain values, ``Counterexample`` and ``Table``.
"""

from dualpipe.page.changes import Change, changes
from dualpipe.page.model import Comparison, Counterexample, Drawn, Gallery, Mark, Page, Steps, Table
from dualpipe.page.render import render

__all__ = [
    "Change",
    "Comparison",
    "Counterexample",
    "Drawn",
    "Gallery",
    "Mark",
    "Page",
    "Steps",
    "Table",
    "changes",
    "render",
]
