"""How far long work has come: one line on a terminal that goes away at the end, and nothing anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int, str], None]
"""Called with what is done, of how many, and the name of what comes next; with all done before anything is printed."""


@contextmanager
def progress() -> Iterator[Report]:
    """A bar on standard error if that is a terminal; yields what moves it.

    For work that forks no processes: the clock of the bar is moved by a thread.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, name: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    bars = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bars.add_task("", total=None)

    def report(done: int, total: int, name: str) -> None:
        if done == total:
            bars.stop()
            return
        bars.update(task, completed=done, total=total, description=name)
        bars.start()
        bars.refresh()

    try:
        yield report
    finally:
        bars.stop()
