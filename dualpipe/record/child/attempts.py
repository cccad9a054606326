"""Training steps whose gradients the program throws away, as after an overflow: it skips the step, or runs it again.

No optimizer's step ends them.  They show in the order of what the program does: all backwards have run, it looks at the
gradients, keeps no copy, and sets them to zero or ``None``.  A program that does so without a look at them has a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .forwards import Forwards
from .regions import weak_storage


class Attempts:
    """Notices that the gradients since the last training step are thrown away; then writes the event ``discarded``.

    It counts only if the program goes on to compute before an optimizer's step.  ``count`` is how many there were.
    """

    def __init__(self, write: Callable[..., None], forwards: Forwards) -> None:
        self._write, self._forwards = write, forwards
        self._forwards_before = 0  # how many forwards there were when the training step began
        self._computed = self._looked = False
        self._copies: list[Any] = []  # weak references to what was made from the gradients
        self.count = 0

    def wrote(self, event: str) -> None:
        """The recorder has written an event."""
        if event == "weights":
            self._computed = True
        elif event in ("step", "discarded"):
            self._computed = self._looked = False
            self._copies.clear()
            self._forwards_before = len(self._forwards)

    def look(self) -> None:
        """The program looks at a gradient, as whether its values are finite."""
        self._looked = self._computed

    def copy(self, made: Tensor) -> None:
        """An operator has read a gradient and made a tensor from it, or has written to one."""
        if made.numel() == 1 or not made.is_floating_point():
            self.look()
        elif self._computed:
            self._copies = [copy for copy in self._copies if not copy.expired()]
            self._copies.append(weak_storage(made))

    def reset(self) -> None:
        """A gradient is set to zero or ``None``."""
        kept = any(not copy.expired() for copy in self._copies)
        if self._looked and not kept and self._forwards.all_ran_backward(self._forwards_before):
            self.count += 1
            self._write("discarded")
