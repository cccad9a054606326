"""Times the two methods of ``dualpipe prove``, plain search and Z3, on the six checks of a schedule, and the theorems.

Both methods check the same schedule in each round, so that other load on the machine affects both.

    python bench/provers.py --sizes 8/20,16/64,64/256
"""

import re
import statistics
from typing import Annotated

import typer

from dualpipe.schedule.generate import generate
from proofs.prove import prove
from proofs.theorems import families, prove_all
from proofs.verdict import Proved


def main(
    schedule: str = "dualpipe",
    sizes: Annotated[str, typer.Option(help="Ranks/microbatches, separated by commas.")] = "8/20,16/64",
    rounds: int = 3,
    theorems: Annotated[str, typer.Option(help="Families, separated by commas.")] = "1f1b,zb1p,dualpipe,dualpipev",
) -> None:
    for size in sizes.split(","):
        if not re.fullmatch(r"\d+/\d+", size):
            raise typer.BadParameter(f"a size is RANKS/MICROBATCHES, as 8/20; got {size!r}", param_hint="--sizes")
        plan = generate(schedule, *map(int, size.split("/")))
        spent: dict[str, list[float]] = {"graph": [], "z3": []}
        for _ in range(rounds):
            report = prove(plan)
            if report.verdict != "proved":
                raise SystemExit(f"{schedule} at {size} is {report.verdict}")
            for method, seconds in spent.items():
                seconds.append(sum(result.seconds[method] for result in report.checks.values()))
        graph, smt = map(statistics.median, spent.values())
        ratios = [slow / fast for fast, slow in zip(*spent.values(), strict=True)]
        print(
            f"{schedule} at {size}, rounds: {rounds}; plain search {graph:.2f} s, Z3 {smt:.2f} s, "
            f"{statistics.median(ratios):.1f} times as long ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    chosen = [family for family in families() if family.name in theorems.split(",")]
    results = prove_all(of=chosen)
    if any(not isinstance(result.verdict, Proved) for result in results):
        raise SystemExit("a theorem is not proved")
    names = ", ".join(family.name for family in chosen)
    print(f"{len(results)} theorems of {names}: {sum(result.seconds for result in results):.1f} s")


if __name__ == "__main__":
    typer.run(main)
