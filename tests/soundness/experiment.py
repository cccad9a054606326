"""The whole experiment: prove and run every mutant, run a sample on processes, and print the tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from random import Random

import torch

from dualpipe.schedule import text
from proofs.prove import prove
from proofs.verdict import Proved, Refuted
from tests.soundness.claims import CLAIMS, MODES, PROCESSES, Claim, Observation, Prover, contradictions, observe
from tests.soundness.mutants import Mutant, mutants
from tests.soundness.runs import Ending, Outcome, on_processes

AT_ONCE = 2
"""Mutants processed at the same time."""
GROUPS = {
    "complete": "complete",
    "order": "order",
    "messages": "messages",
    "deadlock, blocking": "deadlock (blocking)",
    "deadlock, edge": "deadlock (edge)",
    "accumulation": "accumulation",
}
"""The checks by which the table groups the mutants, and their names in it."""
REPEATS = "messages (a repetition alone)"
FAKES = (Ending.EQUAL, Ending.DIFFERENT, Ending.HUNG, Ending.REFUSED)
ON_PROCESSES = (Ending.EQUAL, Ending.DIFFERENT, Ending.FAILED)


def observations(count: int, seed: int, prover: Prover = prove) -> Iterator[Observation]:
    """Every mutant, proved and run on fake ranks.  Raises ``MethodsDisagreeError``."""
    with ProcessPoolExecutor(AT_ONCE, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(partial(observe, prover=prover), mutants(count, seed), chunksize=4)


def with_processes(found: Sequence[Observation], count: int, seed: int) -> Iterator[Observation]:
    """A sample of the observations, also run on processes."""
    with ProcessPoolExecutor(AT_ONCE, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(_with_processes, sample(found, count, seed))


def _with_processes(o: Observation) -> Observation:
    return replace(o, processes={run: on_processes(o.mutant.schedule, run) for run in PROCESSES})


def sample(found: Sequence[Observation], count: int, seed: int) -> list[Observation]:
    """A third with everything proved; the rest from every kind of other outcome in turn, the rare ones first."""
    random = Random(seed)
    proved = [o for o in found if not _refuted(o)]
    chosen = random.sample(proved, min(len(proved), count // 3))
    found = [o for o in found if _refuted(o)]
    kinds: dict[tuple[object, ...], list[Observation]] = {}
    for o in random.sample(list(found), len(found)):
        kinds.setdefault((_refuted(o), *(o.fakes[b].ending for b in MODES)), []).append(o)
    rows = sorted(kinds.values(), key=len)
    turns = max(map(len, rows), default=0)
    in_turn = [row[turn] for turn in range(turns) for row in rows if turn < len(row)]
    return [*chosen, *in_turn][:count]


def broken_claims(found: Iterable[Observation]) -> Iterator[tuple[Observation, Claim]]:
    """Every contradiction between a claim and a run."""
    for o in found:
        for claim in contradictions(o):
            yield o, claim


def describe(o: Observation, claim: Claim) -> str:
    """A contradiction with its verdicts, runs and schedule."""
    runs = [
        f"{name}, {mode}: {run.ending.value} {', '.join(sorted(run.what))}".rstrip()
        for name, found in (("fake ranks", o.fakes), ("processes", o.processes))
        for mode, run in found.items()
    ]
    verdicts = [f"{check} {word}" for check, word in o.verdicts.items()]
    return "\n".join([f"CONTRADICTION to «{claim.text}»", str(o.mutant), "; ".join(verdicts), *runs, _text(o.mutant)])


def _text(mutant: Mutant) -> str:
    return text.dumps(mutant.schedule)


def tables(found: Sequence[Observation], ran: Sequence[Observation]) -> str:
    """The counts, in Markdown."""
    return "\n\n".join(
        [
            _verdicts(found),
            _outcomes("fake ranks", found, FAKES, [*MODES], lambda o, mode: o.fakes[mode]),
            *(
                [_outcomes("processes", ran, ON_PROCESSES, [*PROCESSES], lambda o, run: o.processes[run])]
                if ran
                else []
            ),
            _claims([*{o.mutant.number: o for o in (*found, *ran)}.values()]),
        ]
    )


def _verdicts(found: Sequence[Observation]) -> str:
    rows = []
    for check in (*GROUPS, "deadlock, eager", "deadlock, stream"):
        counts = [
            sum(words[check] == word for words in column)
            for column in ([o.by_graph for o in found], [o.verdicts for o in found])
            for word in (Proved.word, Refuted.word)
        ]
        unknown = sum(o.verdicts[check] not in (Proved.word, Refuted.word) for o in found)
        rows.append([check, *counts, unknown])
    both = ["graph and Z3: proved", "refuted", "Z3 gave up"]
    return _table(["check", "graph alone: proved", "refuted", *both], rows)


def _outcomes(
    name: str,
    found: Sequence[Observation],
    endings: Sequence[Ending],
    runs: Sequence[str],
    run: Callable[[Observation, str], Outcome],
) -> str:
    groups = Counter(_refuted(o) for o in found)
    rows = []
    for group, count in sorted(groups.items(), key=lambda item: (len(item[0]), -item[1])):
        counts = [
            sum(_refuted(o) == group and run(o, mode).ending is ending for o in found)
            for mode in runs
            for ending in endings
        ]
        rows.append([", ".join(group) or "nothing", count, *(number or "" for number in counts)])
    first, *rest = (ending.value for ending in endings)
    columns = [column for mode in runs for column in (f"{mode}: {first}", *rest)]
    return _table([f"refuted ({name})", "schedules", *columns], rows)


def _claims(found: Sequence[Observation]) -> str:
    rows = [
        [claim.text, sum(map(claim.applies, found)), sum(claim in contradictions(o) for o in found)] for claim in CLAIMS
    ]
    return _table(["claim", "cases", "contradicted"], rows)


def _refuted(o: Observation) -> tuple[str, ...]:
    return tuple(
        GROUPS[check] if check != "messages" or not o.repeats else REPEATS for check in GROUPS if o.refuted(check)
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, [":--", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
