"""Theorems and the least makespan in a process of its own, with limits on memory and time.

Z3 ends its process if it runs out of memory.  ``python proofs/isolated.py`` is that process, and ``Isolated`` asks it.
A question is a line of JSON; the reply is one line with the pickled result, or the reason why Z3 gave up.  The process
runs ``proofs.theorems.prove`` and ``proofs.optimal.optimal``, which a caller may also run without limits.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path: search this tree after the standard library and before installed packages
    installed = (at for at, folder in enumerate(sys.path) if folder.endswith(("site-packages", "dist-packages")))
    sys.path.insert(next(installed, len(sys.path)), str(Path(__file__).parents[1]))
    sys.path += [folder for folder in json.loads(sys.argv[2]) if folder not in sys.path]

import z3

from proofs.optimal import SECONDS, Optimum, dualpipe_takes, optimal, require_size
from proofs.solver import MEMORY_BYTES, Child
from proofs.theorems.family import Family
from proofs.theorems.prove import families, prove, statement
from proofs.theorems.result import TheoremResult
from proofs.verdict import Unknown
from proofs.z3child import confine

THEOREM_SECONDS = 300.0
"""Seconds for one theorem, all of its questions to Z3 together."""


class Isolated(Child):
    """The process that proves theorems and finds the least makespan; ``memory_bytes`` limits its address space."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES, child: Path = Path(__file__)) -> None:
        super().__init__(child, memory_bytes)

    def prove(self, family: Family, name: str, proved: set[str], timeout: float) -> TheoremResult:
        """As ``proofs.theorems.prove``, for a family of ``families()``; unknown if the process gives no result."""
        started = time.monotonic()
        result = self._result({"prove": [family.name, name, sorted(proved), timeout]}, THEOREM_SECONDS)
        if isinstance(result, TheoremResult):
            return result
        spent = time.monotonic() - started
        return TheoremResult(f"{family.name}: {name}", statement(family, name), 0, 0, spent, result)

    def optimal(self, ranks: int, microbatches: int, timeout_s: float = SECONDS) -> Optimum:
        """As ``proofs.optimal.optimal``; unknown if the process gives no result."""
        require_size(ranks, microbatches)
        started = time.monotonic()
        result = self._result({"optimal": [ranks, microbatches, timeout_s]}, timeout_s)
        if isinstance(result, Optimum):
            return result
        theirs, spent = dualpipe_takes(ranks, microbatches), time.monotonic() - started
        return Optimum(ranks, microbatches, None, None, theirs, (), spent, result)

    def _result(self, question: dict[str, Any], limit: float) -> Any:
        reply = self.exchange(json.dumps(question).encode() + b"\n", limit)
        return reply if isinstance(reply, Unknown) else pickle.loads(base64.b64decode(reply["result"]))


def main(memory_bytes: int) -> None:
    """Answer questions until the input closes."""
    confine(memory_bytes)
    questions: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    print("ready", flush=True)
    while True:
        question = questions.get()
        try:
            reply = {"result": base64.b64encode(pickle.dumps(answer(question))).decode()}
        except MemoryError:
            reply = {"unknown": "out of memory"}
        except z3.Z3Exception as error:
            reply = {"unknown": str(error)}
        print(json.dumps(reply), flush=True)


def _read(questions: queue.Queue[dict[str, Any]]) -> None:
    """Put every question into the queue; at the end of the input end the process, whatever Z3 is doing."""
    for line in sys.stdin:
        questions.put(json.loads(line))
    os._exit(0)


def answer(question: dict[str, Any]) -> TheoremResult | Optimum:
    """Compute the answer to one question."""
    if "optimal" in question:
        return optimal(*question["optimal"])
    family, name, proved, timeout = question["prove"]
    (found,) = [each for each in families() if each.name == family]
    return prove(found, name, set(proved), timeout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
