"""Checks that a caller waives, and what may be wrong with a schedule that fails them.

A waived check still runs.  If it is refuted or unknown, it does not count for the verdict of the schedule, and the
report says what may be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dualpipe.errors import RuleError, nearest

WITHOUT: Mapping[str, str] = {
    "complete": "an op may be missing or repeated, so losses and gradients may not be those of every microbatch",
    "order": "an op may run before what it needs",
    "messages": "a rank may take one message for another, and compute a wrong result from it",
    "deadlock": "the run may hang",
    "memory": "a rank may hold more activations than its bound",
    "accumulation": "gradients are not added in microbatch order, so they are not bitwise those of the plain loop",
    "buffers": "a tensor may be read before it has arrived, or overwritten while it is sent",
}
"""For each check what may be wrong if it is waived."""


def waived(names: Iterable[str]) -> frozenset[str]:
    """The checks of these names.  Raises ``RuleError`` for a name that is not a check."""
    chosen = frozenset(names)
    for name in sorted(chosen - WITHOUT.keys()):
        fix = nearest(name, WITHOUT, "name one of them")
        raise RuleError(f"a check that can be waived is one of {', '.join(WITHOUT)}", f"got {name!r}", fix)
    return chosen
