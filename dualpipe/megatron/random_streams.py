"""The random numbers of dropout: each chunk draws from its own stream, as its stage does under 1F1B.

Under 1F1B a stage draws in the order of its microbatches.  So does each chunk here, although the two chunks of a
rank take turns: the rank's own chunk draws from the process's generators, and the other one from a stream kept here.
In lane < that is a copy of the generators of the rank that holds the same stage for lane >.  In the second half of a V
it is seeded as Megatron seeds the rank of that stage.  A mask then depends on stage and microbatch only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import rerun_state_machine
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

States = dict[str, Any]
_SEED_STEP = 100
"""Megatron's ``_set_random_seed`` adds this times the pipeline rank."""
_SECOND = "dualpipe-second-stage:"
"""Precedes the names of a second stage's states in the tracker while a training loop saves it."""
_CPU, _CUDA = "dualpipe-cpu", "dualpipe-cuda"
_RERUNNING = (
    rerun_state_machine.RerunState.RERUNNING_IN_PLACE,
    rerun_state_machine.RerunState.RERUNNING_FROM_CHECKPOINT,
)


class RandomStream:
    """The random generators of the chunk that is not the rank's own."""

    def __init__(self, states: States) -> None:
        self.states = states
        self._at_start: States | None = None

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

    def begin_step(self) -> None:
        """At the start of a training step; rewind if Megatron's ``RerunStateMachine`` repeats the previous one.

        The machine has then rewound the process's generators.
        """
        machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE  # its getter would create one
        if machine is not None and machine.state in _RERUNNING and self._at_start is not None:
            self.states = self._at_start
        self._at_start = self.states


@contextmanager
def seeded_for(distance: int) -> Iterator[None]:
    """Inside the block, the generators are seeded as Megatron's training loop seeds them ``distance`` ranks later.

    The loop's seed is that of the job plus a multiple of the pipeline rank.  Afterwards the generators are as before.
    """
    outer = capture()
    seed = torch.initial_seed() + _SEED_STEP * distance
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        restore(outer)


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


@contextmanager
def kept_in_tracker(states: States) -> Iterator[None]:
    """Inside the block, the process's tracker of named states also has these, so that a training loop saves them."""
    tracker = get_cuda_rng_tracker()
    own = tracker.get_states()
    tracker.set_states(own | {_SECOND + name: state for name, state in _flat(states).items()})
    try:
        yield
    finally:
        tracker.set_states(own)


def taken_from_tracker() -> States | None:
    """Remove from the process's tracker what ``kept_in_tracker`` added before a save; ``None`` if it added nothing."""
    tracker = get_cuda_rng_tracker()
    loaded = tracker.get_states()
    found = {name.removeprefix(_SECOND): state for name, state in loaded.items() if name.startswith(_SECOND)}
    if not found:
        return None
    tracker.set_states({name: state for name, state in loaded.items() if not name.startswith(_SECOND)})
    return {"cpu": found.pop(_CPU), "cuda": found.pop(_CUDA, None), "tracker": found}


def _flat(states: States) -> dict[str, Any]:
    cuda = {} if states["cuda"] is None else {_CUDA: states["cuda"]}
    return {**states["tracker"], _CPU: states["cpu"], **cuda}


def exchange(states: States, pair: dist.ProcessGroup) -> States:
    """Exchange states with the other rank of the pair, and return its states."""
    both: list[States] = [{}, {}]
    dist.all_gather_object(both, states, group=pair)
    return both[1 - pair.rank()]
