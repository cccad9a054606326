"""The progress bar of long work: one line on a terminal that disappears at the end, and nothing anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dualpipe.progress import Progress, silent


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a bar on standard error if that is a terminal; yields the function that moves it.

    For work that forks no processes, since a thread updates the clock of the bar.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    bars = Bars(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bars.add_task("", total=None)

    def progress(done: int, total: int, name: str, /) -> None:
        if done == total:
            bars.stop()
            return
        bars.update(task, completed=done, total=total, description=name)
        bars.start()
        bars.refresh()

    try:
        yield progress
    finally:
        bars.stop()
