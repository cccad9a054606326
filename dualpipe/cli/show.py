"""``dualpipe show``."""

from __future__ import annotations

import sys

from dualpipe.cli.app import app
from dualpipe.cli.options import Microbatches, Named, Ranks, find_schedule
from dualpipe.schedulefile import dumps


@app.command()
def show(ranks: Ranks = None, microbatches: Microbatches = None, schedule: Named = "dualpipe") -> None:
    """Print a schedule in the text form that every other command reads."""
    sys.stdout.write(dumps(find_schedule(schedule, ranks, microbatches)))
