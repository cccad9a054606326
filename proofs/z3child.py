"""The process in which Z3 runs: it answers questions of difference logic until its input closes.

Z3 ends its process if it runs out of memory, and nothing can interrupt it while it reads a formula.  So it runs in a
process of its own, with a limit on its address space; ``proofs.solver`` starts the process and reports how it ends.
This file is run by its path and imports only the standard library and Z3.

A question is two numbers, the number of facts and the milliseconds until Z3 gives up, followed by three numbers for
each fact, ``earlier``, ``later`` and ``gap``, meaning ``later - earlier >= gap``.  All are 64-bit integers.  The answer
is one line of JSON, see ``Reply``; a line ``ready`` precedes the first one.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, TypedDict

if __name__ == "__main__":  # Z3 may be in a folder that only the asking process has on its import path
    sys.path += [folder for folder in json.loads(sys.argv[2]) if folder not in sys.path]

import z3
from z3 import z3core

BATCH = 20_000
"""Small components are given to Z3 together, up to so many facts."""

_MOST_MILLISECONDS = (1 << 32) - 2


class Edge(NamedTuple):
    """A fact, ``later - earlier >= gap``, with its number in the question."""

    earlier: int
    later: int
    gap: int
    number: int


class Reply(TypedDict, total=False):
    """``holds``: all facts can hold.  ``core``: numbers of contradictory facts.  ``unknown``: why Z3 gave up."""

    holds: bool
    core: list[int]
    unknown: str


def confine(memory_bytes: int) -> None:
    """Limit the memory of this process and of Z3 in it, and ignore Ctrl-C, which is for the asking process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    z3.set_param("ctrl_c", False)
    z3.set_param("memory_max_size", memory_bytes * 9 // 10 >> 20)


def main(memory_bytes: int) -> None:
    """Answer questions until the input closes."""
    confine(memory_bytes)
    questions: queue.Queue[tuple[array[int], int]] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, questions), daemon=True).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        numbers, milliseconds = questions.get()
        try:
            reply = answer(numbers, milliseconds / 1000)
        except MemoryError:
            reply = Reply(unknown="out of memory")
        except z3.Z3Exception as error:
            reply = Reply(unknown=str(error))
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _read(source: BinaryIO, questions: queue.Queue[tuple[array[int], int]]) -> None:
    """Put every question into the queue; at the end of the input end the process, whatever Z3 is doing."""
    while True:
        count, milliseconds = _numbers(source, 2)
        questions.put((_numbers(source, 3 * count), milliseconds))


def _numbers(source: BinaryIO, count: int) -> array[int]:
    numbers = array("q")
    data = source.read(count * numbers.itemsize)
    if len(data) < count * numbers.itemsize:
        os._exit(0)
    numbers.frombytes(data)
    return numbers


def answer(numbers: Sequence[int], timeout_s: float) -> Reply:
    """Decide one question, given its facts as triples in one sequence."""
    deadline = time.monotonic() + timeout_s
    triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    edges = [Edge(*triple, number) for number, triple in enumerate(triples)]
    for batch in batches(edges):
        outcome = check(batch, deadline, named=False)
        if outcome == "unsat":
            outcome = check(batch, deadline, named=True)
            if not isinstance(outcome, list):
                return Reply(unknown=outcome)
            core = minimal([edges[number] for number in outcome], deadline)
            return Reply(core=[edge.number for edge in core]) if core else Reply(unknown="timeout")
        if outcome != "sat":
            return Reply(unknown=str(outcome))
    return Reply(holds=True)


def batches(edges: Sequence[Edge]) -> Iterator[list[Edge]]:
    """Split the facts into parts that share no variable, small ones together.

    A contradiction of differences is a cycle of facts, so it lies within one connected component.
    """
    parent: dict[int, int] = {}

    def root(variable: int) -> int:
        top = variable
        while (above := parent.setdefault(top, top)) != top:
            top = above
        while variable != top:
            parent[variable], variable = top, parent[variable]
        return top

    for edge in edges:
        parent[root(edge.earlier)] = root(edge.later)
    components: dict[int, list[Edge]] = {}
    for edge in edges:
        components.setdefault(root(edge.later), []).append(edge)
    batch: list[Edge] = []
    for component in components.values():
        if batch and len(batch) + len(component) > BATCH:
            yield batch
            batch = []
        batch += component
    if batch:
        yield batch


def latest_first(edges: Sequence[Edge]) -> list[Edge]:
    """Sort the facts so that Z3 is fast if they all hold: from the latest variable backwards.

    Z3 takes one fact after the other and makes ``earlier`` small enough for it.  Backwards, no variable that it has
    settled depends on that one, so the work is linear and not quadratic.  The order is only a hint: Z3 gets every fact.
    """
    leaving: dict[int, int] = {}
    arriving: dict[int, list[Edge]] = {}
    for edge in edges:
        leaving[edge.earlier] = leaving.get(edge.earlier, 0) + 1
        leaving.setdefault(edge.later, 0)
        arriving.setdefault(edge.later, []).append(edge)
    ready = [variable for variable, count in leaving.items() if not count]
    ordered: list[Edge] = []
    while ready:
        for edge in arriving.pop(ready.pop(), ()):
            ordered.append(edge)
            leaving[edge.earlier] -= 1
            if not leaving[edge.earlier]:
                ready.append(edge.earlier)
    rest = [edge for row in arriving.values() for edge in row]
    return ordered + rest


def check(edges: Sequence[Edge], deadline: float, named: bool) -> str | list[int]:
    """``sat``, ``unsat``, or why Z3 gave up; with ``named``, the numbers of contradictory facts for ``unsat``."""
    context = z3.Context()
    solver = z3.SimpleSolver(ctx=context)
    solver.set("arith.solver", 1)  # difference logic, by Bellman and Ford
    ordered = latest_first(edges)
    # One text for Z3's own parser, since building each term from Python takes longer than solving.
    variables = {variable for edge in ordered for variable in edge[:2]}
    lines = [f"(declare-const t{variable} Int)" for variable in sorted(variables)]
    if named:
        lines += [f"(declare-const f{e.number} Bool)(assert (=> f{e.number} {_formula(e)}))" for e in ordered]
    else:
        lines += [f"(assert {_formula(edge)})" for edge in ordered]
    solver.from_string("\n".join(lines))
    del lines
    left = deadline - time.monotonic()
    if left <= 0:
        return "timeout"
    solver.set("timeout", max(1, int(min(1000 * left, _MOST_MILLISECONDS))))
    if not named:
        outcome = solver.check()
        return str(solver.reason_unknown() if outcome == z3.unknown else outcome)
    guards = _guards(context, [edge.number for edge in ordered])
    found = z3core.Z3_solver_check_assumptions(context.ref(), solver.solver, len(ordered), guards)
    if found == z3.Z3_L_UNDEF:
        return str(solver.reason_unknown())
    if found == z3.Z3_L_TRUE:
        raise AssertionError("Z3 refutes the facts, but finds no contradiction once they are named")
    return sorted(int(str(name)[1:]) for name in solver.unsat_core())


def _guards(context: z3.Context, numbers: Sequence[int]) -> object:
    """The constants f0, f1, ... as an array for Z3's C interface; the context frees them when it is freed."""
    boolean = z3.BoolSort(context).ast
    guards = (z3core.Ast * max(len(numbers), 1))()
    for position, number in enumerate(numbers):
        symbol = z3core.Z3_mk_string_symbol(context.ref(), f"f{number}")
        guards[position] = z3core.Z3_mk_const(context.ref(), symbol, boolean)
        z3core.Z3_inc_ref(context.ref(), guards[position])
    return guards


def _formula(edge: Edge) -> str:
    gap = str(edge.gap) if edge.gap >= 0 else f"(- {-edge.gap})"
    return f"(>= (- t{edge.later} t{edge.earlier}) {gap})"


def minimal(core: list[Edge], deadline: float) -> list[Edge]:
    """A core without superfluous facts; empty if time runs out first.

    A smallest contradiction of differences is one cycle of facts whose gaps add up to more than 0.  If Z3's core is
    more than one cycle, facts are left out as long as the rest is still contradictory.
    """
    kept = list(core)
    for edge in core:
        if (cycle := as_cycle(kept)) is not None:
            return cycle
        without = [other for other in kept if other is not edge]
        outcome = check(without, deadline, named=False)
        smaller = check(without, deadline, named=True) if outcome == "unsat" else outcome
        if isinstance(smaller, list):
            kept = [other for other in without if other.number in smaller]
        elif smaller != "sat":
            return []
    cycle = as_cycle(kept)
    assert cycle is not None, kept
    return cycle


def as_cycle(edges: list[Edge]) -> list[Edge] | None:
    """The facts with each leading to the next, if they are one cycle that is contradictory."""
    leaving = {edge.earlier: edge for edge in edges}
    if len(leaving) != len(edges) or sum(edge.gap for edge in edges) <= 0:
        return None
    cycle = [edges[0]]
    while cycle[-1].later != edges[0].earlier:
        following = leaving.get(cycle[-1].later)
        if following is None or len(cycle) == len(edges):
            return None
        cycle.append(following)
    return cycle if len(cycle) == len(edges) else None


if __name__ == "__main__":
    main(int(sys.argv[1]))
