"""DeepSeek's own package, fetched once into a separate folder because its import name is ours."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "dualpipe==1.0.0"
CACHE = Path(__file__).parents[2] / ".cache"


class Unreachable(Exception):  # noqa: N818 - a reason to skip, caught by one test
    """The package is not installed and cannot be fetched."""


def folder() -> Path:
    """The folder to put on the path of a process: ``DUALPIPE_UPSTREAM`` if set, else a cache that pip fills."""
    given = os.environ.get("DUALPIPE_UPSTREAM")
    if given:
        return Path(given)
    kept = CACHE / f"deepseek-{PACKAGE.replace('==', '-')}"
    if not kept.exists():
        fetch(kept)
    return kept


def fetch(kept: Path) -> None:
    """Install next to the cache and rename, so that concurrent tests never see half a package."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        target = Path(scratch) / "package"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "10"]
        try:
            result = subprocess.run(
                [*pip, "--no-deps", "--target", str(target), PACKAGE], capture_output=True, text=True, timeout=90
            )
        except subprocess.TimeoutExpired as late:
            raise Unreachable(f"pip has not got {PACKAGE} in 90 s") from late
        if result.returncode:
            raise Unreachable(f"pip cannot get {PACKAGE}: {' '.join(result.stderr.strip().splitlines()[-1:])}")
        try:
            target.rename(kept)
        except OSError:
            if not kept.exists():
                raise
