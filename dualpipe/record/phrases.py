"""The sentences of notes and caveats, of one and of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_MOST_NAMES = 3


def counted(count: int, one: str, several: str) -> str:
    """A count and what follows it: ``1 forward ran`` or ``2 forwards ran``."""
    return f"{count} {one if count == 1 else several}"


def names_of(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


_SUMMED = "gradients of several microbatches in an order that could not be determined"
_OUTSIDE = "that had been outside of torch, so that its origin could not be determined"
_PICKLED = "that had been pickled, so that its origin could not be determined"
_COLLECTIVE = "an activation or gradient that a collective gives, for which there is no message"
_OVERTAKEN = "messages of another process group, which a schedule file cannot express"
DOUBTS: Final = {
    "detached": (
        "the module called at {at} takes a detached tensor of {op} without requires_grad; whether it is a stage of its "
        "own could not be determined, and it is written as part of that forward",
        (
            "call has a stage boundary that could not be determined",
            "calls have a stage boundary that could not be determined",
        ),
    ),
    "called again": (
        "the module called at {at} had been called on the same tensors for {op}; the file has that forward once",
        ("forward ran more than once and is written once", "forwards ran more than once and are written once"),
    ),
    "run again": (
        "the engine ran at {at} from a tensor of {op} from which it had run before; the file has that backward once",
        ("backward ran more than once and is written once", "backwards ran more than once and are written once"),
    ),
    "sent before": (
        "the engine ran at {at} once more for {op}, of which a gradient had been sent; whether what was sent "
        "lacks that part could not be determined, and the file has that backward once",
        ("backward ran again after its gradient was sent", "backwards ran again after their gradients were sent"),
    ),
    "summed": (
        "the engine runs the backwards of more than two microbatches together at {at} and sums their gradients in its "
        "own order; the file has them in the order of microbatches",
        (f"run of the engine sums {_SUMMED}", f"runs of the engine sum {_SUMMED}"),
    ),
    "sharded": (
        "the weights of {op} are sharded over ranks (fully_shard); when their gradients are computed could not be "
        "observed, and the file has its W in the slot of its B",
        (
            "backward has weight gradients that could not be observed",
            "backwards have weight gradients that could not be observed",
        ),
    ),
    "outside": (
        "the computation at {at} takes a tensor that was made outside of torch's operators (NumPy, a list), after an "
        "activation or gradient had left torch; whether it is that one could not be determined for {op}",
        (f"computation takes a tensor {_OUTSIDE}", f"computations take a tensor {_OUTSIDE}"),
    ),
    "object": (
        "the computation at {at} takes a tensor from a pickled object, into which some rank put an activation or "
        "gradient; whether it is that one could not be determined for {op}, and the file has no message for it",
        (f"computation takes a tensor {_PICKLED}", f"computations take a tensor {_PICKLED}"),
    ),
    "by a collective": (
        "the computation at {at} takes for {op} a tensor from a collective, into which another rank put an "
        "activation or gradient; the file has no message for it",
        (f"computation takes {_COLLECTIVE}", f"computations take {_COLLECTIVE}"),
    ),
    "several groups": (
        "what it sends at {at} is received in another order than it was posted, in another process group; a schedule "
        "file has one order of messages between two ranks",
        (f"message overtakes {_OVERTAKEN}", f"messages overtake {_OVERTAKEN}"),
    ),
}
"""By the kind of doubt: the note on a line of the program, and the caveat for a verdict, of one and of several."""
