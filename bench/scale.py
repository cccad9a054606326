"""How schedules scale: generate, lower and check them at P ranks and 4P microbatches, and torch's own construction.

    python bench/scale.py --sizes 8,16,32,64 --output scale.json

Every measurement is a process of its own, which reports its seconds of CPU and its peak memory.  One above the
limit is stopped, and larger sizes of the same kind are left out.  Of ours, *generate* makes every rank's program
(for ZBV, *lower* adds the messages to torch's order of computes), *one rank* makes that of one rank alone, and *check*
is ``dualpipe prove`` by plain search: all six checks, ``deadlock`` under each model.  *torch* is the constructor of its
schedule: the table of computes of all ranks, and its own lowering.
"""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # torch's tables are made as the tests make them

from machine import describe, machine  # noqa: E402

KINDS = ("ours dualpipe", "ours dualpipev", "ours zbv", "torch dualpipev", "torch zbv")
COLUMNS = {
    "ours dualpipe": ("generate", "one rank", "check"),
    "ours dualpipev": ("generate", "one rank", "check"),
    "ours zbv": ("lower", "check"),
    "torch dualpipev": ("construct",),
    "torch zbv": ("construct",),
}


def measure(kind: str, ranks: int, microbatches: int) -> dict[str, float]:
    """Seconds of CPU for each column of a kind, the number of ops, and the peak memory in MiB."""
    party, name = kind.split()
    spent = (_ours if party == "ours" else _torch)(name, ranks, microbatches)
    return spent | {"MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _ours(name: str, ranks: int, microbatches: int) -> dict[str, float]:
    from dualpipe.schedule.generate import PLANS, generate
    from proofs.prove import prove

    spent: dict[str, float] = {}
    if name in PLANS:
        spent["one rank"] = median(_seconds(PLANS[name](ranks, microbatches, ranks // 3).program) for _ in range(5))
    schedules, ops = [], []

    def make() -> None:
        """A large schedule generates each program when it is read, and forgets it when others are."""
        schedules.append(generate(name, ranks, microbatches))
        ops.extend(sum(map(len, program)) for program in schedules[0].programs)

    spent["generate" if name in PLANS else "lower"] = _seconds(make)
    reports = []
    spent["check"] = _seconds(lambda: reports.append(prove(schedules[0], smt=False)))
    if reports[0].verdict != "proved":
        raise SystemExit(f"{name} at {ranks}/{microbatches} is {reports[0].verdict}")
    return spent | {"ops": sum(ops)}


def _torch(name: str, ranks: int, microbatches: int) -> dict[str, float]:
    from tests.schedule.torch_tables import CLASSES, stages

    made = []
    seconds = _seconds(lambda: made.append(CLASSES[name](stages(name, ranks), microbatches)))
    tables = made[0].pipeline_order_with_comms
    if len(tables) != ranks:
        raise SystemExit(f"torch made {len(tables)} tables for {ranks} ranks")
    return {"construct": seconds, "ops": sum(map(len, tables.values()))}


def main(
    sizes: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "8,16,32,64,128,256,512",
    limit: Annotated[float, typer.Option(help="Seconds of CPU for one measurement.")] = 60.0,
    kinds: Annotated[str, typer.Option(help="Kinds, separated by commas.")] = ",".join(KINDS),
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON to this file.")] = None,
    one: Annotated[str | None, typer.Option(help="Measure one kind at one size, and print JSON.", hidden=True)] = None,
) -> None:
    if one is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
        print(json.dumps(measure(one, int(sizes), 4 * int(sizes))))
        return
    chosen = kinds.split(",")
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise typer.BadParameter(f"a kind is one of {', '.join(KINDS)}; got {unknown[0]}", param_hint="--kinds")
    results: list[dict[str, object]] = []
    for kind in chosen:
        for ranks in map(int, sizes.split(",")):
            found = _in_a_process(kind, ranks, limit)
            print(f"{kind}, {ranks} ranks: {json.dumps(found)}", file=sys.stderr, flush=True)
            results.append({"kind": kind, "ranks": ranks, "microbatches": 4 * ranks, **found})
            if "over" in found:
                break
    of = machine()
    print(describe(of))
    print(table(results, [int(size) for size in sizes.split(",")], chosen))
    if output is not None:
        output.write_text(json.dumps({"machine": of, "limit": limit, "results": results}, indent=1) + "\n")


def _in_a_process(kind: str, ranks: int, limit: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", kind, "--sizes", str(ranks), "--limit", str(limit)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20 * limit, check=False)
    if ran.returncode == -signal.SIGXCPU:
        return {"over": limit}
    if ran.returncode:
        raise SystemExit(f"{kind} at {ranks} ranks failed: {ran.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def table(results: list[dict[str, object]], sizes: list[int], kinds: list[str]) -> str:
    """The results in Markdown: a row for each size; seconds of CPU but for *one rank*, which is in milliseconds."""
    head = ["P / M"]
    for kind in kinds:
        head += [f"{kind}: {column}{', ms' if column == 'one rank' else ''}" for column in COLUMNS[kind]] + ["MiB"]
    by_size = {(result["kind"], result["ranks"]): result for result in results}
    rows = [head, ["--:" for _ in head]]
    for ranks in sizes:
        row = [f"{ranks} / {4 * ranks}"]
        for kind in kinds:
            row += _cells(by_size.get((kind, ranks)), COLUMNS[kind])
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(found: dict[str, object] | None, columns: tuple[str, ...]) -> list[str]:
    if found is None:
        return ["" for _ in (*columns, "MiB")]
    if "over" in found:
        return [f"over {found['over']:g} s in all", *("" for _ in columns)]
    cells = []
    for column in columns:
        value = float(str(found[column]))
        cells.append(f"{value * 1e3:.1f}" if column == "one rank" else f"{value:.2f}")
    return [*cells, f"{float(str(found['MiB'])):.0f}"]


if __name__ == "__main__":
    typer.run(main)
