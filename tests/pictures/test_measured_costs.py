"""Costs from a trace: medians of each stage, shares of the model, and the latency of links."""

from dataclasses import replace

import pytest

from dualpipe.errors import RuleError
from dualpipe.schedule import B, W
from dualpipe.schedule.generate import generate, one_f_one_b, zb1p
from dualpipe.timeline.measured_costs import MEASURED, describe, read
from dualpipe.timeline.perfetto import Scaled, dumps, trace
from dualpipe.timeline.run_log import simulated
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.timeline import Costs


def written(tmp_path, *runs):
    """A trace of runs whose unit is a millisecond."""
    path = tmp_path / "trace.json"
    path.write_text(dumps(trace([Scaled(run, 1e3) for run in runs], {})))
    return path


def run_of(schedule, costs, name=MEASURED):
    return simulated(simulate(schedule, costs), name)


def test_the_costs_of_a_run_are_read_back(tmp_path):
    costs = Costs(F=2, B=3, W=1, latency=0.5)
    found = read(written(tmp_path, run_of(zb1p(4, 8), costs), run_of(zb1p(4, 8), Costs(F=9), "simulated")))
    expected = {"F": 2e-3, "B": 3e-3, "W": 1e-3, "BW": 4e-3, "FB": None, "latency": 5e-4}
    assert found.costs.numbers == pytest.approx(expected)
    assert found.ranks == 4
    assert all(times.BW is None and pytest.approx(2e-3) == times.F for times in found.stages.values())


def test_stages_that_differ_keep_their_times(tmp_path):
    stages = (Costs(1, 2, 3), Costs(4, 4, 4), Costs(1, 1, 1), Costs(2, 5, 1))
    found = read(written(tmp_path, run_of(zb1p(4, 8), Costs(2, 3, 2.25, stages=stages)))).costs
    assert pytest.approx((2e-3, 3e-3, 2.25e-3)) == (found.F, found.B, found.W)
    assert [each.numbers["B"] for each in found.stages] == pytest.approx([2e-3, 4e-3, 1e-3, 5e-3])


def test_half_stages_count_twice(tmp_path):
    found = read(written(tmp_path, run_of(generate("zbv", 4, 8), Costs(F=1, B=1, W=1))))
    assert len(found.stages) == 8
    assert pytest.approx((2e-3, 2e-3, 2e-3)) == (found.costs.F, found.costs.B, found.costs.W)


def test_a_full_backward_has_the_time_of_b_and_w(tmp_path):
    """As ``verify`` measures it: all the time is that of B, and W, with a note, takes none."""
    run = run_of(one_f_one_b(2, 4), Costs(F=1, B=1, W=1))
    noted = {B: lambda w: replaced(w, w.end + 1), W: lambda w: replaced(w, w.start)}

    def replaced(work, end):
        return work._replace(end=end, note="B and W are one call")

    work = tuple(noted.get(w.at.op.kind, lambda w: w)(w) for w in run.work)
    found = read(written(tmp_path, replace(run, work=work)))
    assert found.costs.numbers == pytest.approx({"F": 1e-3, "B": 1e-3, "W": 1e-3, "BW": 2e-3, "FB": None, "latency": 0})


def test_without_a_waiting_receiver_there_is_no_latency(tmp_path):
    found = read(written(tmp_path, run_of(one_f_one_b(1, 2), Costs())))
    assert found.latency is None
    assert "no receiver was waiting" in describe(found)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"traceEvents": [{}]}', '{"traceEvents": [\n]}'])
def test_a_file_without_a_measured_run_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(RuleError, match="has no measured run; name such a trace"):
        read(path)


def test_a_simulation_alone_is_no_measurement(tmp_path):
    with pytest.raises(RuleError, match="has no measured run"):
        read(written(tmp_path, run_of(one_f_one_b(2, 2), Costs(), "simulated")))
