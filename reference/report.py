"""What a verification found: how each implementation compares with the reference, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from dualpipe.progress import Progress
from dualpipe.testing.launch import Failure
from reference.comparison import Difference


def of_all_ranks(progress: Progress, name: str, ranks: int, steps: int) -> Callable[[int, int], None]:
    """A callback for the steps that each rank has finished, which reports those that all ranks have."""
    finished = [0] * ranks

    def on_progress(rank: int, done: int) -> None:
        finished[rank] = done
        progress(min(finished), steps, name)

    return on_progress


@dataclass(frozen=True)
class Comparison:
    """How one implementation compares with the reference: what differs, or why it did not finish.

    ``alone``: it ran in one process, so failures are described without a rank.
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

    def describe_failures(self) -> list[str]:
        """One line for each rank that failed."""
        return [f"{f.kind}: {f.text}" if self.alone else str(f) for f in self.failures]

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "differences": len(self.differences),
            "first_difference": str(self.differences[0]) if self.differences else None,
            "failures": self.describe_failures(),
            "seconds": round(self.seconds, 3),
        }


class StageSize(NamedTuple):
    """A stage in numbers.  ``ranks`` names its holders, such as ``0>, 3<``; empty if several ranks hold parts of it."""

    ranks: str
    parameters: int
    largest_gradient: float

    @classmethod
    def of(cls, weights: Iterable[Tensor], gradients: Iterable[Tensor], ranks: str = "") -> StageSize:
        """The number of parameters, and the largest absolute value of the gradient."""
        largest = max((float(gradient.abs().max()) for gradient in gradients), default=0.0)
        return cls(ranks, sum(weight.numel() for weight in weights), largest)


CaseT = TypeVar("CaseT")
ComparisonT = TypeVar("ComparisonT", bound=Comparison)


@dataclass(frozen=True)
class Report(Generic[CaseT, ComparisonT]):
    """The outcome of a verification.

    Attributes
    ----------
    facts:
        What was verified, as JSON.
    losses, norms:
        The reference's mean loss of each step, in nats, and its gradient norm before each optimizer step (empty if it
        computes none).
    tensors:
        How many tensors of each implementation were compared.
    stages:
        The stages of the reference, in order.
    complaints:
        Failed sanity checks of the reference itself; empty if it trained.
    comparisons:
        One for each implementation.
    """

    case: CaseT
    facts: Mapping[str, Any]
    losses: tuple[float, ...]
    tensors: int
    stages: tuple[StageSize, ...]
    complaints: tuple[str, ...]
    comparisons: tuple[ComparisonT, ...]
    seconds: float
    norms: tuple[float, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.complaints and all(comparison.equal for comparison in self.comparisons)

    @property
    def exit_code(self) -> int:
        return 0 if self.equal else 1

    def as_json(self) -> dict[str, Any]:
        norms = {"gradient_norms": list(self.norms)} if self.norms else {}
        return {
            **self.facts,
            "verdict": "equal" if self.equal else "different",
            "losses": list(self.losses),
            **norms,
            "tensors": self.tensors,
            "complaints": list(self.complaints),
            "parties": {comparison.name: comparison.as_json() for comparison in self.comparisons},
            "seconds": round(self.seconds, 3),
        }
