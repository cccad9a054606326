"""``record_ranks()``: fork ranks that call a function, and record what they do."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from dualpipe.record.child import cuda
from dualpipe.record.child.log import to_file
from dualpipe.record.child.patches import Patches
from dualpipe.record.comparison import check_expected
from dualpipe.record.events import read_folder
from dualpipe.record.lanes import parse
from dualpipe.record.pipelines import assemble_one, beside
from dualpipe.record.plain import add_comparison
from dualpipe.record.processes import Watchdog
from dualpipe.record.recording import Recording
from dualpipe.record.traces import name_ranges
from dualpipe.testing.launch import TIME_UP, Context, launch
from dualpipe.testing.recorder import record


def record_ranks(
    ranks: int,
    body: Callable[[int], None],
    timeout: float = 60.0,
    stall: float = 10.0,
    cuda_on_cpu: bool = False,
    together: Sequence[str] = (),
    containers: Sequence[str] = (),
    check: bool = True,
    step: int | None = None,
    lanes: Sequence[str] = (),
    compare: bool = False,
    pipeline_ranks: Sequence[int] | None = None,
    clip_norm: float | None = None,
    reduction: str | None = None,
    name: str = "recorded",
) -> Recording:
    """Fork ``ranks`` processes with a gloo process group, call ``body(rank)`` in each, and record them.

    The traces that the body exports from torch.profiler get ranges with the names of the ops.

    Parameters
    ----------
    timeout, stall:
        Seconds until the ranks are killed: after the start, and after all ranks began to wait for messages that do not
        arrive.  A body that hangs is not an error here: the recording contains what was done until then, and its
        ``ended`` shows which ranks finished.
    cuda_on_cpu:
        Answer CUDA calls on the CPU.
    together, containers:
        As for ``record``.
    check:
        Whether an error on a rank is raised here.  If not, the recording contains what was done until then.
    step:
        Which training step to return, counted from 1.  Each ends with an optimizer's step, or without one if the body
        looks at its gradients and throws them away, as after an overflow.  The default is the first that ends with one.
    lanes:
        The ranks of each lane's stages, such as ``"0 1 2 3"``, for a run that ends before its messages show them.
    compare:
        Also run the step plainly, and compare: ``comparison`` of the recording.
    pipeline_ranks:
        The ranks of one pipeline, if the ranks run several, as with data parallelism.

    clip_norm:
        For ``compare``: the norm to which the body scales all gradients together, if it does not call
        ``clip_grad_norm_``.
    reduction:
        For ``compare``: ``mean`` or ``sum``, if the gradient must be that of the losses of all microbatches.
    name:
        The name of the schedule.

    Raises
    ------
    RuleError
        If ``clip_norm`` or ``reduction`` is given without ``compare``, or has no such value.
    RuntimeError
        If ``check`` is set and ``body`` raised on a rank (with that rank's traceback) or ended its process.
    RecordError
        If an op cannot be named, or the ranks run several pipelines and none was chosen.
    """
    check_expected(compare, clip_norm, reduction)
    with tempfile.TemporaryDirectory(prefix="dualpipe-record-") as scratch:
        folder = Path(scratch)

        def run(context: Context) -> None:
            sink = to_file(str(folder / f"{context.rank}.events"))
            sink({"event": "rank", "rank": context.rank, "ranks": ranks})
            with ExitStack() as stack:
                if cuda_on_cpu:
                    patches = Patches()
                    stack.callback(patches.undo)
                    stack.enter_context(cuda.answer(patches, ranks))
                plain = (str(folder / "plain" / f"{context.rank}.pt"), step or 0, timeout) if compare else None
                stack.enter_context(record(together, containers, sink, plain))
                _call(body, context.rank)

        watchdog = Watchdog(folder, stall)
        outcome = launch(ranks, run, timeout, grace=min(stall, 1.0), is_stuck=lambda: watchdog.hangs(time.monotonic()))
        failures = [failure for failure in outcome.failures if failure.kind != TIME_UP]
        if check and failures:
            raise RuntimeError(
                "\n".join(f"rank {failure.rank}: {failure.trace or failure.text}" for failure in failures)
            )
        logs, _ = read_folder(folder, ranks, 1, succeeded=not outcome.failures)
        routes = parse(lanes) if lanes else None
        recording = assemble_one(logs, step, routes, ranks=pipeline_ranks, name=name)
        name_ranges(logs, recording.pipeline_ranks, routes)
        if not compare:
            return recording
        others = beside(recording, logs, step)
        return add_comparison(recording, folder / "plain", logs, clip_norm, others, reduction)


def _call(body: Callable[[int], None], rank: int) -> None:
    """Call the body.  ``sys.exit(0)`` is an ordinary end; any other exit code is an error."""
    try:
        body(rank)
    except SystemExit as end:
        if end.code:
            raise
