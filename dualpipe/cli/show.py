"""``dualpipe show``."""

from __future__ import annotations

import json
import sys

from dualpipe.cli.app import app, examples
from dualpipe.cli.options import Json, Microbatches, Named, One, Ranks, choose, find_schedule
from dualpipe.schedulefile import as_json as schedule_as_json
from dualpipe.schedulefile import dumps


@app.command(epilog=examples("dualpipe show -P 4 -M 8", "dualpipe show zb1p -P 3 -M 6", "dualpipe show table.csv"))
def show(
    positional: One = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    schedule: Named = "dualpipe",
    as_json: Json = False,
) -> None:
    """Print a schedule in the text form that every other command reads."""
    value = find_schedule(choose(positional, schedule), ranks, microbatches)
    sys.stdout.write(json.dumps(schedule_as_json(value)) + "\n" if as_json else dumps(value))
