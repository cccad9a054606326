"""Progress bars of long work: on a terminal they disappear at the end; anywhere else nothing is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dualpipe.progress import Progress, silent


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a bar on standard error if that is a terminal; yields the function that updates it.

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


@contextmanager
def progress_bars(names: Sequence[str], steps: int, quiet: bool = False) -> Iterator[Progress]:
    """Show a bar for each name on standard error if that is a terminal; yields the function that updates them.

    For work that forks processes, so no thread updates the bars.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bars(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True, auto_refresh=False
    ) as bars:
        tasks = {name: bars.add_task(name, total=steps) for name in names}

        def progress(done: int, total: int, name: str, /) -> None:
            bars.update(tasks[name], completed=done, total=total)
            bars.refresh()

        yield progress
