"""Check verdicts against runs: prove and run mutants of schedules, and compare each pair of results with the claims.

    python bench/soundness.py --mutants 500 --processes 40

Prints the tables of docs/explanation/soundness.md, and each contradiction with its schedule; then the exit code is 1.
"""

import sys
import time
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests, which are not installed, contain the experiment

from tests.soundness.experiment import broken_claims, describe, observations, tables, with_processes


def main(mutants: int = 500, seed: int = 0, processes: int = 40) -> None:
    started = time.monotonic()
    found = []
    contradicted = 0
    for observation in observations(mutants, seed):
        found.append(observation)
        for broken in broken_claims([observation]):
            contradicted += 1
            print(describe(*broken), flush=True)
    proved_and_run = time.monotonic()
    ran = list(with_processes(found, processes, seed))
    for broken in broken_claims(ran):
        contradicted += 1
        print(describe(*broken), flush=True)
    print(tables(found, ran))
    print(
        f"\n{len(found)} mutants in {proved_and_run - started:.0f} s, {len(ran)} of them on processes in "
        f"{time.monotonic() - proved_and_run:.0f} s; seed {seed}; {contradicted} contradictions"
    )
    raise typer.Exit(1 if contradicted else 0)


if __name__ == "__main__":
    typer.run(main)
