"""The number of microbatches in each step of a run, computed from Megatron's arguments.

As in ``megatron.core.num_microbatches_calculator``, a step's global batch is cut into
``global_batch_size / (micro_batch_size * data_parallel_size)`` microbatches on each data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Batch(NamedTuple):
    """A global batch size of the run, in samples, and the option that sets it."""

    samples: int
    origin: str


def data_parallel_size(args: Any) -> int:
    """The data-parallel size as set, or else as computed from the world size."""
    size = getattr(args, "data_parallel_size", None)
    if size is not None:
        return int(size)
    model_ranks = 1
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        model_ranks *= int(getattr(args, name, None) or 1)
    return max(1, int(getattr(args, "world_size", None) or 1) // model_ranks)


def training_batches(args: Any) -> Iterator[Batch]:
    """Every global batch size of training: those of a schedule of batch sizes or of a ramp-up, or else the only one.

    Raises:
        ValueError: If a schedule of batch sizes cannot be read.
    """
    final = getattr(args, "global_batch_size", None)
    steps = getattr(args, "step_batch_size_schedule", None)
    rampup = getattr(args, "rampup_batch_size", None)
    if steps is not None:
        for entry in steps.replace(",", " ").split():
            yield Batch(int(entry.partition(":")[2]), f"--step-batch-size-schedule at {entry}")
    elif rampup is not None and final is not None:
        start, increment, _ = (int(number) for number in rampup)
        if increment <= 0 or start <= 0:
            raise ValueError(f"--rampup-batch-size needs a start and an increment above 0: got {start} and {increment}")
        for samples in range(start, int(final), increment):
            yield Batch(samples, "--rampup-batch-size during ramp-up")
        yield Batch(int(final), "--global-batch-size")
    elif final is not None:
        yield Batch(int(final), "--global-batch-size")


def _problem_of(
    args: Any, batch: Batch, micro_batch_size: int, may_decrease: bool = False, lanes: int = 2
) -> str | None:
    """Describe why DualPipe cannot run a global batch, or return ``None``.

    The number of microbatches must be at least twice the pipeline size, and a multiple of the lanes.  ``may_decrease``
    is Megatron's ``--decrease-batch-size-if-needed``: the number of microbatches is rounded down.
    """
    ranks = data_parallel_size(args)
    size = int(getattr(args, "pipeline_model_parallel_size", None) or 1)
    count, rest = divmod(batch.samples, micro_batch_size * ranks)
    here = f"{batch.origin} = {batch.samples} over micro-batch size {micro_batch_size} x data parallel size {ranks}"
    if rest and not may_decrease:
        return f"{here} leaves {rest} samples over"
    if count % lanes:
        return f"{here} is {count} microbatches, which is odd"
    if count < 2 * size:
        return f"{here} is {count} microbatches for pipeline size {size}"
    return None


def batch_problem(args: Any, lanes: int = 2) -> str | None:
    """Describe the first global batch size of training that DualPipe cannot run, or return ``None``.

    ``lanes``: 2, or 1 for DualPipeV.
    """
    micro = getattr(args, "micro_batch_size", None)
    if micro is None:
        return None
    may_decrease = bool(getattr(args, "decrease_batch_size_if_needed", False))
    try:
        problems = (_problem_of(args, batch, int(micro), may_decrease, lanes) for batch in training_batches(args))
        return next(filter(None, problems), None)
    except ValueError as error:
        return str(error)
