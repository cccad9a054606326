"""Theorems and the least makespan in a process of their own: the same results, and no crash where memory runs out."""

from functools import partial

import pytest

from proofs import apart
from proofs.apart import Apart
from proofs.optimal import OptimalSizeError, broken_rules
from proofs.solver import Solver
from proofs.theorems import families, prove_all
from proofs.verdict import Proved, Unknown


def test_the_process_proves_theorems_and_finds_the_least_makespan():
    with Apart() as child:
        (one_f_one_b, *_) = families()
        results = prove_all(of=[one_f_one_b], by=child.prove)
        assert [result.verdict for result in results] == [Proved()] * len(results)
        found = child.optimal(2, 4)
        with pytest.raises(OptimalSizeError):
            child.optimal(3, 4)
    assert (found.verdict, found.least) == (Proved(), 12)
    assert not list(broken_rules(found.timetable, 4))


def test_without_memory_a_theorem_and_the_least_makespan_are_unknown_with_the_reason():
    reason = Unknown("Z3 gave up: it needs more than 0.1 GiB of memory")
    with Apart(memory_bytes=60 << 20) as child:
        result = child.prove(families()[0], "totals", set(), 10.0)
        found = child.optimal(4, 8)
    assert result.verdict == reason
    assert result.text.startswith("unknown: 1f1b: totals: for all P >= 1 and all M >= P, no phase is shorter than 0")
    assert (found.verdict, found.least, found.impossible, found.dualpipe) == (reason, None, None, 26)


def test_an_end_for_lack_of_memory_is_exit_code_3(run, monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text("import sys; sys.exit(101)")  # as Z3 ends a process
    monkeypatch.setattr("dualpipe.cli.proving.Apart", partial(Apart, child=child))
    monkeypatch.setattr("dualpipe.cli.proving.Solver", partial(Solver, child=child))
    for question in (("--all-sizes", "--schedule", "1f1b"), ("--optimal", "-P", 2, "-M", 4), ("-P", 2, "-M", 4)):
        told = run("prove", *question, "--solver-memory", 0.5)
        assert told.code == 3
        assert "Z3 gave up: it needs more than 0.5 GiB of memory" in told.out


def test_a_theorem_without_an_answer_in_its_time_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr("proofs.solver.GRACE_SECONDS", 0.0)
    monkeypatch.setattr(apart, "THEOREM_SECONDS", 0.2)
    silent = tmp_path / "child.py"
    silent.write_text("import time; print('ready', flush=True); time.sleep(600)")
    with Apart(child=silent) as child:
        verdict = child.prove(families()[0], "totals", set(), 10.0).verdict
    assert verdict == Unknown("Z3 gave up: no answer within 0.2 s")
