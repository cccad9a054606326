"""Links that take their time: every message arrives a delay after its send was posted."""

import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist

RING = 4096
"""Sends of which a channel keeps the times."""


class Delayed:
    """The work of a receive that completes no sooner than ``delay`` after its send was posted."""

    def __init__(self, work, posted: Callable[[], float], delay: float) -> None:
        self._work, self._posted, self._delay = work, posted, delay

    def wait(self, *arguments):
        result = self._work.wait(*arguments)
        time.sleep(max(0.0, self._posted() + self._delay - time.monotonic()))
        return result

    def is_completed(self) -> bool:
        return self._work.is_completed() and time.monotonic() >= self._posted() + self._delay

    def __getattr__(self, name: str):
        return getattr(self._work, name)


def delay_links(times: torch.Tensor, delay: float) -> None:
    """Delay every message of this process; ``times[from, to, n % RING]`` is shared and has when the n-th was sent."""
    rank, sent, received = dist.get_rank(), Counter(), Counter()
    isend, irecv = dist.isend, dist.irecv

    def peer(arguments, keywords, *names):
        return (
            arguments[1]
            if len(arguments) > 1
            else next(keywords[name] for name in names if keywords.get(name) is not None)
        )

    def late_isend(*arguments, **keywords):
        to = peer(arguments, keywords, "group_dst", "dst")
        times[rank, to, sent[to] % RING] = time.monotonic()
        sent[to] += 1
        return isend(*arguments, **keywords)

    def late_irecv(*arguments, **keywords):
        source = peer(arguments, keywords, "group_src", "src")
        at = received[source] % RING
        received[source] += 1
        return Delayed(irecv(*arguments, **keywords), lambda: float(times[source, rank, at]), delay)

    for module in (dist, dist.distributed_c10d):
        module.isend, module.irecv = late_isend, late_irecv
