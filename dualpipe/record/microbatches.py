"""The microbatch of every forward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from dualpipe.record.events import Forward, ForwardId, ModuleId
from dualpipe.record.phrases import counted
from dualpipe.schedule import Chunk, F, Lane, Op, Task


def number(
    forwards: Mapping[ForwardId, Forward],
    module_of: Mapping[ForwardId, ModuleId],
    chunk_of: Mapping[ModuleId, Chunk],
    chains: Sequence[Sequence[ModuleId | None]],
    before: Mapping[ForwardId, ForwardId],
) -> tuple[dict[ForwardId, Task], list[str]]:
    """The task of every forward.  ``before`` gives the forward whose activation a forward takes.

    Microbatches are counted at stage 0 and keep their numbers from there.  Where the flow of tensors is broken, a
    forward gets the first number that its stage lacks.
    """
    tasks: dict[ForwardId, Task] = {}
    notes: list[str] = []
    for chain in chains:
        for stage, module in enumerate(chain):
            if module is None:
                continue
            lane = chunk_of[module].lane
            own = sorted(forward for forward, m in module_of.items() if m == module)
            broken = []
            for count, forward in enumerate(own):
                if stage == 0:
                    tasks[forward] = Task(lane, stage, count)
                    continue
                origin = before.get(forward)
                known = tasks.get(origin) if origin is not None else None
                if known is None or origin is None or module_of.get(origin) != chain[stage - 1]:
                    broken.append(forward)
                else:
                    tasks[forward] = Task(lane, stage, known.mb)
            taken = {tasks[forward].mb for forward in own if forward in tasks}
            free = (mb for mb in range(len(own) + len(taken)) if mb not in taken)
            for forward in broken:
                tasks[forward] = Task(lane, stage, next(free))
                notes.append(
                    f"rank {forward.rank}: the forward at {forwards[forward].at} does not take the activation of stage "
                    f"{stage - 1}; it is named {Op(F, *tasks[forward])} by its order"
                )
    return tasks, notes


def drop_evaluations(
    forwards: Mapping[ForwardId, Forward],
    module_of: Mapping[ForwardId, ModuleId],
    tasks: Mapping[ForwardId, Task],
) -> tuple[dict[ForwardId, Task], list[str]]:
    """The tasks without the microbatches of an evaluation: run without gradients, on stages that also train.

    If all forwards of a stage run without gradients, the program computes them again for the backward.
    """
    trained_modules = {module for forward, module in module_of.items() if forwards[forward].grad}
    alone = {forward for forward in tasks if not forwards[forward].grad and not forwards[forward].backward_began}
    trained = {
        (task.lane, task.mb)
        for forward, task in tasks.items()
        if forward not in alone or module_of[forward] not in trained_modules
    }
    kept: dict[Lane, list[int]] = defaultdict(list)
    for lane, mb in sorted(trained):
        kept[lane].append(mb)
    left = {forward: task for forward, task in tasks.items() if (task.lane, task.mb) in trained}
    notes = []
    if len(left) < len(tasks):
        count = len({(task.lane, task.mb) for task in tasks.values()} - trained)
        ran = "ran without gradients, an evaluation, and"
        notes.append(f"{counted(count, f'microbatch {ran} is', f'microbatches {ran} are')} left out")
    final = {f: task._replace(mb=kept[task.lane].index(task.mb)) for f, task in left.items()}
    cut_off = {f: other for f in alone & left.keys() if (other := _trains_on(f, forwards, final)) is not None}
    own = {forward for forward in cut_off if module_of[forward] in trained_modules}
    notes += [
        f"{Op(F, *final[forward])} at {forwards[forward].at} ran without gradients, and "
        f"{Op(F, *final[cut_off[forward]])} at {forwards[cut_off[forward]].at} trains on what it sends: do both ranks "
        "evaluate equally many microbatches?"
        for forward in sorted(own)
    ]
    places = Counter(forwards[forward].at for forward in alone & left.keys() - own)
    for at, n in sorted(places.items()):
        ran = f"at {at} ran without gradients and"
        notes.append(counted(n, f"forward {ran} has no backward", f"forwards {ran} have no backward"))
    return final, notes


def _trains_on(
    forward: ForwardId, forwards: Mapping[ForwardId, Forward], tasks: Mapping[ForwardId, Task]
) -> ForwardId | None:
    """The forward of the next stage on the same microbatch, if it ran with gradients."""
    following = Task(tasks[forward].lane, tasks[forward].stage + 1, tasks[forward].mb)
    return next((other for other, task in tasks.items() if task == following and forwards[other].grad), None)
