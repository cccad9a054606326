"""The names of a chunk's parameters, by which those of its replicas are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def unique(numbers: Iterable[int], names: Sequence[str]) -> dict[int, str]:
    """The name of each of the parameters with these numbers.

    ``names`` has those of all parameters of the rank, each within the module that the program called.  If it called
    several layers by themselves, their parameters have the same names, which are then counted: ``weight (2)``.
    Replicas call their layers in one order, so they count alike.
    """
    count: Counter[str] = Counter()
    found = {}
    for number in sorted(numbers):
        name = names[number]
        count[name] += 1
        found[number] = name if count[name] == 1 else f"{name} ({count[name]})"
    return found
