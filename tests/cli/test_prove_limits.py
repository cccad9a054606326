"""Theorems and the least makespan in a process of their own: the same results, and no crash if memory runs out."""

from functools import partial

import pytest

from proofs import isolated
from proofs.isolated import Isolated
from proofs.optimal import OptimalSizeError, broken_rules
from proofs.solver import Solver
from proofs.theorems import families, prove_all
from proofs.verdict import Proved, Unknown


def test_the_process_proves_theorems_and_finds_the_least_makespan():
    with Isolated() as child:
        (one_f_one_b, *_) = families()
        results = prove_all(of=[one_f_one_b], by=child.prove)
        assert [result.verdict for result in results] == [Proved()] * len(results)
        found = child.optimal(2, 4)
        with pytest.raises(OptimalSizeError):
            child.optimal(3, 4)
    assert (found.verdict, found.least) == (Proved(), 12)
    assert not list(broken_rules(found.timetable, 4))


def test_out_of_memory_is_unknown_with_the_reason():
    reason = Unknown("Z3 gave up: it needs more than 0.1 GiB of memory")
    with Isolated(memory_bytes=60 << 20) as child:
        result = child.prove(families()[0], "totals", set(), 10.0)
        found = child.optimal(4, 8)
    assert result.verdict == reason
    assert result.text.startswith("unknown: 1f1b: totals: for all P >= 1 and all M >= P, no phase has a negative")
    assert (found.verdict, found.least, found.impossible, found.dualpipe) == (reason, None, None, 26)


def test_out_of_memory_is_exit_code_3(run, monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text("import sys; sys.exit(101)")  # as Z3 ends a process
    monkeypatch.setattr("dualpipe.cli.proving.Isolated", partial(Isolated, child=child))
    monkeypatch.setattr("dualpipe.cli.proving.Solver", partial(Solver, child=child))
    for question in (("--all-sizes", "--schedule", "1f1b"), ("--optimal", "-P", 2, "-M", 4), ("-P", 2, "-M", 4)):
        result = run("prove", *question, "--solver-memory", 0.5)
        assert result.code == 3
        assert "Z3 gave up: it needs more than 0.5 GiB of memory" in result.out


def test_a_theorem_that_takes_too_long_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr("proofs.solver.GRACE_SECONDS", 0.0)
    monkeypatch.setattr(isolated, "THEOREM_SECONDS", 0.2)
    silent = tmp_path / "child.py"
    silent.write_text("import time; print('ready', flush=True); time.sleep(600)")
    with Isolated(child=silent) as child:
        verdict = child.prove(families()[0], "totals", set(), 10.0).verdict
    assert verdict == Unknown("Z3 gave up: no answer within 0.2 s")
