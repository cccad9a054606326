"""The pipeline rank that Megatron's global state tells, while code for another stage runs.

Much of what a training program calls asks ``parallel_state`` for the pipeline rank instead of the model's process
groups: which layers of a block are dense or mixtures, where a custom layout starts, whether this is a first stage that
needs tokens or a last one that needs labels.  A rank's second chunk stands at the mirrored place, so it is built and
run under ``at_stage``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core import parallel_state


@contextmanager
def at_stage(stage: int) -> Iterator[None]:
    """Within, ``parallel_state.get_pipeline_model_parallel_rank()`` is ``stage``, and so is what is derived from it.

    No process group changes.  Within one another, the inner one holds.
    """
    before = parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK  # there is a setter, and no getter of what was set
    parallel_state.set_pipeline_model_parallel_rank(stage)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(before)
