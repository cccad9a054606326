"""Verify every schedule at every size and in every number format, one line each.  Exit code 1 if any differs."""

import sys
import time

from dualpipe.schedule.generate import PLANS, generate
from reference.case import DTYPES, Case
from reference.model import ModelConfig
from reference.verify import verify


def main() -> int:
    unequal, started = 0, time.monotonic()
    for name in PLANS:
        for ranks in (2, 4, 8):
            for microbatches in (2 * ranks, 2 * ranks + 4):
                for dtype, format_ in DTYPES.items():
                    case = Case(generate(name, ranks, microbatches), ModelConfig(dtype=format_))
                    report = verify(case)
                    unequal += not report.equal
                    verdict = "equal" if report.equal else "NOT EQUAL"
                    print(
                        f"{name:9} P={ranks} M={microbatches:2} {dtype}  {verdict}  {report.tensors:5} tensors",
                        end="  ",
                    )
                    print(
                        f"loss {report.losses[0]:.3f} -> {report.losses[-1]:.3f}  {report.seconds:5.1f} s", flush=True
                    )
    print(f"{unequal} not equal, {time.monotonic() - started:.0f} s")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
