"""The random numbers of dropout: each chunk draws from its own stream, as its stage does under 1F1B.

Under 1F1B a stage draws in the order of its microbatches.  So does each chunk here, although the two chunks of a
rank take turns: lane > draws from the process's own generators, and lane < from a copy of the generators of the rank
that holds the same stage for lane >.  A mask then depends on stage and microbatch only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import rerun_state_machine
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

States = dict[str, Any]
_RERUNNING = (
    rerun_state_machine.RerunState.RERUNNING_IN_PLACE,
    rerun_state_machine.RerunState.RERUNNING_FROM_CHECKPOINT,
)


class RandomStream:
    """The random generators of lane <."""

    def __init__(self, states: States) -> None:
        self.states = states

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside the block, random numbers come from this stream, which continues where it stopped."""
        outer = capture()
        restore(self.states)
        try:
            yield
        finally:
            self.states = capture()
            restore(outer)


def follow_rerun(stream: RandomStream, pair: dist.ProcessGroup) -> None:
    """Rewind lane < if Megatron's ``RerunStateMachine`` repeats a step and has rewound the process's generators.

    It repeats a step on all ranks.  At the start of a step, lane < has the state of the same stage in lane >.
    """
    machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE  # its getter would create one
    if machine is not None and machine.state in _RERUNNING:
        stream.states = exchange(capture(), pair)


def capture() -> States:
    """The states of the process's generators: CPU, the current GPU, and Megatron's tracker of named ones."""
    tracker = get_cuda_rng_tracker()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": {name: state.clone() for name, state in tracker.get_states().items()},
    }


def restore(states: States) -> None:
    """Set the process's generators to these states."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states({name: state.clone() for name, state in states["tracker"].items()})


def exchange(states: States, pair: dist.ProcessGroup) -> States:
    """Exchange states with the other rank of the pair, and return its states."""
    both: list[States] = [{}, {}]
    dist.all_gather_object(both, states, group=pair)
    return both[1 - pair.rank()]
