"""The compute-only tables of torch.distributed.pipelining's schedules, without a process group or a model.

python -m tests.schedule.torch_tables      writes tests/golden/torch-*.csv anew
"""

import csv
import io
from pathlib import Path
from types import SimpleNamespace

from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSES = {
    "dualpipev": ScheduleDualPipeV,
    "zbv": ScheduleZBVZeroBubble,
    "interleaved1f1b": ScheduleInterleaved1F1B,
}
RANKS, MICROBATCHES = 4, 8


def order(name, ranks, microbatches):
    """torch's ``pipeline_order``: for each rank its actions, ``None`` for a pause; two stages a rank."""
    stages = [
        SimpleNamespace(
            group_size=ranks,
            group_rank=0,
            num_stages=2 * ranks,
            stage_index=index,
            is_first=index == 0,
            is_last=index == 2 * ranks - 1,
            submod=None,
        )
        for index in (0, 2 * ranks - 1)
    ]
    return CLASSES[name](stages, microbatches).pipeline_order


def table(name, ranks, microbatches):
    """The text that torch's ``_dump_csv`` would write."""
    text = io.StringIO()
    csv.writer(text).writerows(order(name, ranks, microbatches).values())
    return text.getvalue()


def path(name):
    return GOLDEN / f"torch-{name}-{RANKS}x{MICROBATCHES}.csv"


if __name__ == "__main__":
    for schedule in CLASSES:
        path(schedule).write_text(table(schedule, RANKS, MICROBATCHES), newline="")
