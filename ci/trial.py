"""Tries schedule files on fake ranks and real processes against the oracle: one JSON object a line.

    python -m ci.trial [--blocking] [--first] FILE ...

What ``dualpipe verify --json`` prints, for several files at the price of one start; with ``--first`` none is tried
after one that differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

STEPS, SEED, TIMEOUT_S = 2, 0, 20.0


def try_file(path: Path, blocking: bool) -> dict[str, object]:
    """The report on one schedule file, or how it could not be tried."""
    from dualpipe.errors import RuleError, UndecidedError
    from dualpipe.schedulefile import load
    from reference.verify import make_case, verify

    name = path.stem
    try:
        case = make_case(load(path), "fp32", STEPS, SEED, "cpu", "direct", blocking, TIMEOUT_S)
        return {**verify(case).as_json(), "name": name}
    except (RuleError, OSError) as error:
        return {"name": name, "verdict": "bad input", "error": str(error)}
    except UndecidedError as error:
        return {"name": name, "verdict": "unknown", "error": str(error)}


if __name__ == "__main__":
    files = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    for file in files:
        report = try_file(Path(file), "--blocking" in sys.argv)
        print(json.dumps(report), flush=True)
        if "--first" in sys.argv and report["verdict"] in ("different", "bad input"):
            break
