"""Saves and loads torch's Adam inside Megatron's distributed optimizer, around bugs of megatron-core 0.16.1.

Megatron uses torch's Adam if neither Apex nor Transformer Engine is installed, as on a CPU.  Then it reads the step
number from a state that does not exist before the first step; it omits the step number when it fills in the state; and
it loads one step counter for all parameters, which a step would then increment once for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dualpipe.errors import RuleError
from dualpipe.megatron.optimizer_state import distributed_parts


def allocate_state(optimizer: Any) -> None:
    """Give each parameter the state of step 0, unless it has one."""
    for part in _parts(optimizer):
        if not any(group["params"] for group in part.optimizer.param_groups):
            raise RuleError(
                "with torch's Adam, a distributed optimizer can be saved only if each rank owns a part of some weight",
                "the shards of this rank are only padding",
                "use fewer replicas, leave out pad_buckets_for_high_nccl_busbw, or install Transformer Engine",
            )
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


@contextmanager
def loading(optimizer: Any) -> Iterator[None]:
    """Inside the block, ``optimizer.load_state_dict`` works; afterwards each parameter has its own step counter."""
    parts = _parts(optimizer)
    for part in parts:
        part._set_main_param_and_optimizer_states = _with_step(part)
    try:
        yield
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states  # uncovers the class's own
    for part in parts:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _parts(optimizer: Any) -> list[Any]:
    return [part for part in distributed_parts(optimizer) if isinstance(part.optimizer, torch.optim.Adam)]


def _with_step(part: Any) -> Any:
    stock = part._set_main_param_and_optimizer_states

    def fill(parameter: Any, tensors: dict[str, Any]) -> None:
        stock(parameter, {"step": part._get_main_param_and_optimizer_states(parameter)["step"], **tensors})

    return fill
