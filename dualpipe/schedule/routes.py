"""Where the stages of a model are: ``Routes``, and what they determine for every op.

These are the questions that need no program: which rank holds a stage, which rank is its neighbour, what an op needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dualpipe.schedule import normalise
from dualpipe.schedule.op import RB, RF, SB, SF, B, F, Kind, Lane, Op, ScheduleError


class Routes(Mapping[Lane, tuple[int, ...]]):
    """For each lane the rank that holds stage 0, 1, 2, ...  An immutable mapping.

    Raises ``ScheduleError`` for anything but a mapping from lanes to sequences of whole numbers.  Whether the ranks
    exist is checked by ``Schedule``, which knows how many there are.
    """

    __slots__ = ("_of",)

    def __init__(self, routes: Mapping[Lane, Iterable[int]]) -> None:
        if not isinstance(routes, Mapping):
            raise ScheduleError(
                "routes are a mapping from lanes to the ranks of their stages",
                f"got {normalise.seen(routes)}",
                'give a mapping such as {">": (0, 1, 2, 3)}',
            )
        what = "a lane's route is a sequence of ranks"
        self._of = {
            normalise.member(Lane, lane): tuple(
                normalise.number(rank, "a rank") for rank in normalise.items(route, what)
            )
            for lane, route in routes.items()
        }

    def __getitem__(self, lane: Lane) -> tuple[int, ...]:
        return self._of[lane]

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __hash__(self) -> int:
        return hash(frozenset(self._of.items()))

    def __repr__(self) -> str:
        return f"Routes({self._of!r})"

    def rank_of(self, op: Op) -> int:
        """The rank that holds the op's stage."""
        return self._of[op.lane][op.stage]

    def is_first(self, op: Op) -> bool:
        """Whether the op's stage is the one that reads the data."""
        return op.stage == 0

    def is_last(self, op: Op) -> bool:
        """Whether the op's stage is the one that computes the loss."""
        return op.stage == len(self._of[op.lane]) - 1

    def neighbour(self, op: Op) -> int | None:
        """The rank that a message's partner stage is on, or ``None`` beyond the end of the lane."""
        route = self._of[op.lane]
        other = op.stage + (1 if op.kind in (SF, RB) else -1)
        return route[other] if 0 <= other < len(route) else None

    def peer(self, op: Op) -> int | None:
        """The rank at the other end of a message: the one the file names, else the lane's neighbour."""
        return self.neighbour(op) if op.peer is None else op.peer

    def crosses(self, op: Op) -> bool:
        """Whether a message op joins two ranks: not beyond a lane's end, nor where neighbours share a rank."""
        neighbour = self.neighbour(op)
        return neighbour is not None and neighbour != self.rank_of(op)

    def needs(self, op: Op) -> tuple[Op, ...]:
        """The ops that must have completed before ``op`` can: the dependency rule, written once.

        A receive needs its send, which is on another rank; every other need is on the op's own rank.  Where
        neighbouring stages share a rank there is no message, and F needs F (or B needs B) directly::

            0F -> 0SF -> 1RF -> 1F -> ... -> lastF -> lastB -> ... -> 1SB -> 0RB -> 0B -> 0W
        """
        kind, lane, stage, mb, _ = op
        match kind:
            case Kind.F if stage == 0:
                return ()
            case Kind.F:
                arrival = Op(RF, lane, stage, mb)
                return (arrival if self.crosses(arrival) else Op(F, lane, stage - 1, mb),)
            case Kind.B if self.is_last(op):
                return (Op(F, lane, stage, mb),)
            case Kind.B:
                arrival = Op(RB, lane, stage, mb)
                gradient = arrival if self.crosses(arrival) else Op(B, lane, stage + 1, mb)
                return (Op(F, lane, stage, mb), gradient)
            case Kind.W:
                return (Op(B, lane, stage, mb),)
            case Kind.SF:
                return (Op(F, lane, stage, mb),)
            case Kind.SB:
                return (Op(B, lane, stage, mb),)
            case Kind.RF:
                return (Op(SF, lane, stage - 1, mb),) if stage > 0 else ()
            case Kind.RB:
                return () if self.is_last(op) else (Op(SB, lane, stage + 1, mb),)
            case _:  # a collective, which waits for its group (see ``proofs.models``)
                return ()


def check_routes(routes: Mapping[Lane, tuple[int, ...]], ranks: int) -> None:
    """Raise ``ScheduleError`` unless every lane has stages, each on one of the ranks, and all the same number."""
    if not routes:
        raise ScheduleError("a schedule has at least one lane", "there is none", "add a line such as 'lane > 0 1 2 3'")
    for lane, route in routes.items():
        if not route:
            raise ScheduleError("a lane has at least one stage", f"lane {lane} has none", "name each stage's rank")
        for stage, rank in enumerate(route):
            if not 0 <= rank < ranks:
                raise ScheduleError(
                    "a stage is held by a rank that has a program",
                    f"lane {lane} puts stage {stage} on rank {rank}, and there are {ranks} ranks, counted from 0",
                    "add the rank or correct the lane",
                )
    depths = [f"lane {lane} has {len(route)} stage{'s' if len(route) > 1 else ''}" for lane, route in routes.items()]
    if len(set(map(len, routes.values()))) > 1:
        raise ScheduleError(
            "all lanes run the same model", " and ".join(depths), "give all lanes the same number of stages"
        )
