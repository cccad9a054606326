"""How a party of a trial came out, and what a person sees of it: the same for every court."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from reference.launch import Failure
from reference.trace import Difference

Progress = Callable[[str, int, int], None]
"""Called with a party's name, the rank within it, and the steps it has finished."""

MOST_TOLD = 6
"""So many of a kind of complaint are printed."""


@dataclass(frozen=True)
class Party:
    """How one party came out: what differs from the truth, or how it failed to finish.

    ``alone``: it is one process, whose own rank says nothing.
    """

    name: str
    differences: tuple[Difference, ...]
    failures: tuple[Failure, ...]
    seconds: float
    alone: bool = False

    @property
    def equal(self) -> bool:
        return not self.differences and not self.failures

    @property
    def verdict(self) -> str:
        return "equal" if self.equal else "failed" if self.failures else "different"

    @property
    def told(self) -> list[str]:
        """How the party failed, in words."""
        return [f"{f.kind}: {f.text}" if self.alone else str(f) for f in self.failures]

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "differences": len(self.differences),
            "first_difference": str(self.differences[0]) if self.differences else None,
            "failures": self.told,
            "seconds": round(self.seconds, 3),
        }

    def at(self, stage: int) -> str:
        """The verdict on one stage, in rich's markup."""
        if self.failures:
            return "[red]did not finish"
        wrong = sum(difference.stage == stage for difference in self.differences)
        return f"[red]{wrong} differ" if wrong else "[green]equal"

    def tell(self, console: Console) -> None:
        """Print what speaks against the party."""
        for difference in self.differences[:MOST_TOLD]:
            console.print(f"{self.name}: {difference}", style="red", markup=False, soft_wrap=True)
        if len(self.differences) > MOST_TOLD:
            console.print(f"{self.name}: and {len(self.differences) - MOST_TOLD} more", style="red")
        for failure in self.told:
            console.print(f"{self.name}: {failure}", style="red", markup=False, soft_wrap=True)


@contextmanager
def watch(ranks: Mapping[str, int], steps: int, quiet: bool = False) -> Iterator[Progress]:
    """A bar on standard error for each party, given the number of its ranks; yields the callback that moves them."""
    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bars(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True, auto_refresh=False
    ) as bars:  # no thread: ranks are forked
        tasks = {name: bars.add_task(name, total=steps) for name in ranks}
        done = {name: dict.fromkeys(range(count), 0) for name, count in ranks.items()}

        def on_progress(party: str, rank: int, finished: int) -> None:
            done[party][rank] = finished
            bars.update(tasks[party], completed=min(done[party].values()))
            bars.refresh()

        yield on_progress
