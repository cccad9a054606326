"""Run the programs in ``programs``: as a user does, or faster, in ranks forked from this process."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from dualpipe.record import Recording
from dualpipe.testing import record_ranks

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[2]


def command(*words, path: Path | None = None, timeout: float = 100) -> subprocess.CompletedProcess:
    """Run ``dualpipe record WORDS``; ``path`` is first on the recorded program's module path."""
    python_path = os.pathsep.join(str(p) for p in (path, ROOT) if p)
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from dualpipe.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", start, "record", *map(str, words)],
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(program: str, *arguments) -> list[str]:
    """The command after ``--`` that runs one of the programs."""
    return ["--", sys.executable, str(PROGRAMS / program), *map(str, arguments)]


def forked(ranks: int, program: str, *arguments, before=lambda: None, **options) -> Recording:
    """The recording of a program whose ranks are forked from this process, which has imported torch.

    Each rank calls ``before`` first.
    """

    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        sys.argv = [program, *map(str, arguments)]
        before()
        already = {"init_process_group": mock.DEFAULT, "destroy_process_group": mock.DEFAULT}
        with mock.patch.multiple(dist, **already):
            runpy.run_path(str(PROGRAMS / program), run_name="__main__")

    return record_ranks(ranks, body, **{"cuda_on_cpu": True, "stall": 4.0, **options})
