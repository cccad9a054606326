"""The compute-only tables of torch.distributed.pipelining's schedules, without a process group or a model.

python -m tests.schedule.torch_tables      writes tests/golden/torch-*.csv anew
"""

import csv
import io
from pathlib import Path
from types import SimpleNamespace

from torch.distributed.pipelining import (
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
    schedules,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSES = {
    "dualpipev": ScheduleDualPipeV,
    "zbv": ScheduleZBVZeroBubble,
    "interleaved1f1b": ScheduleInterleaved1F1B,
}
WITH_RUNTIME = {
    **CLASSES,
    "interleavedzb": ScheduleInterleavedZeroBubble,
    "loopedbfs": ScheduleLoopedBFS,
}
"""All of torch's classes that have tables with messages."""
RANKS, MICROBATCHES = 4, 8


def order(name, ranks, microbatches):
    """torch's ``pipeline_order``: for each rank its actions, ``None`` for a pause; two stages a rank."""
    return WITH_RUNTIME[name](stages(name, ranks), microbatches).pipeline_order


def with_messages(name, ranks, microbatches, **options):
    """The text of torch's compute_comms table, as its ``_dump_csv`` writes it."""
    made = WITH_RUNTIME[name](stages(name, ranks), microbatches, **options)
    return _text(made.pipeline_order_with_comms)


def through_torch(text, name, ranks, microbatches, folder, form="compute_comms"):
    """A table that torch's own ``_load_csv`` has read, as its ``_dump_csv`` writes it with messages."""
    before, after = folder / "before.csv", folder / "after.csv"
    before.write_text(text, newline="")
    runtime = schedules._PipelineScheduleRuntime(stages(name, ranks), microbatches)
    runtime._load_csv(str(before), format=form)
    runtime._dump_csv(str(after), format="compute_comms")
    return after.read_bytes().decode()


def stages(name, ranks):
    """Stand-ins for the stages of rank 0: the ends of a V, or in a loop."""
    last = ranks if name in ("interleavedzb", "loopedbfs") else 2 * ranks - 1
    return [
        SimpleNamespace(
            group_size=ranks,
            group_rank=0,
            num_stages=2 * ranks,
            stage_index=index,
            is_first=index == 0,
            is_last=index == 2 * ranks - 1,
            submod=None,
        )
        for index in (0, last)
    ]


def table(name, ranks, microbatches):
    """The text that torch's ``_dump_csv`` would write."""
    return _text(order(name, ranks, microbatches))


def _text(actions):
    text = io.StringIO()
    csv.writer(text).writerows(actions.values())
    return text.getvalue()


def path(name):
    return GOLDEN / f"torch-{name}-{RANKS}x{MICROBATCHES}.csv"


if __name__ == "__main__":
    for schedule in CLASSES:
        path(schedule).write_text(table(schedule, RANKS, MICROBATCHES), newline="")
