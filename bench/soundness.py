"""Do verdicts mean what they say?  Mutants are proved and run, and each pair of answers is held against the theory.

    python bench/soundness.py --mutants 500 --processes 40

Prints the tables of docs/explanation/soundness.md; a contradiction is told with its schedule, and the exit code is 1.
"""

import sys
import time
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))  # the experiment is shared with the tests, which are no package

from tests.soundness.experiment import broken_claims, observations, tables, tell, with_processes


def main(mutants: int = 500, seed: int = 0, processes: int = 40) -> None:
    started = time.monotonic()
    found = []
    contradicted = 0
    for observation in observations(mutants, seed):
        found.append(observation)
        for broken in broken_claims([observation]):
            contradicted += 1
            print(tell(*broken), flush=True)
    proved_and_run = time.monotonic()
    ran = list(with_processes(found, processes, seed))
    for broken in broken_claims(ran):
        contradicted += 1
        print(tell(*broken), flush=True)
    print(tables(found, ran))
    print(
        f"\n{len(found)} mutants in {proved_and_run - started:.0f} s, {len(ran)} of them on processes in "
        f"{time.monotonic() - proved_and_run:.0f} s; seed {seed}; {contradicted} contradictions"
    )
    raise typer.Exit(1 if contradicted else 0)


if __name__ == "__main__":
    typer.run(main)
