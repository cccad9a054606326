"""The calls of torch.distributed's own functions, which call watched ones in turn: those are not the program's."""

from __future__ import annotations

import threading
from typing import Any


class Transport(threading.local):
    """Whether such a call is in progress on this thread."""

    inside = False

    def __init__(self) -> None:
        self.alone = False  # whether this is the fork of a rank, which must not use its connections

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call one of torch's functions.  Raises ``RuntimeError`` in a fork, whose connections are the program's."""
        if self.alone:
            raise RuntimeError("it exchanges tensors with other ranks")
        before, self.inside = self.inside, True
        try:
            return function(*args, **kwargs)
        finally:
            self.inside = before
