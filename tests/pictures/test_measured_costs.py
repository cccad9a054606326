"""Costs from a trace: medians of each stage, shares of the model, and the latency of links."""

from dataclasses import replace

import pytest

from dualpipe.errors import RuleError
from dualpipe.schedule import B, W
from dualpipe.schedule.generate import generate, one_f_one_b, zb1p
from dualpipe.timeline.measured_costs import MEASURED, Measured, StageTimes, Times, describe, read
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
    assert all(times.BW is None and pytest.approx(2e-3) == times.F.median for times in found.stages.values())


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


def times(median, samples=3):
    return Times(median, median, median, samples)


def test_a_full_backward_is_divided_as_at_the_stages_that_split_theirs():
    split, whole = StageTimes(times(1), times(3), times(1), None), StageTimes(times(1), None, None, times(8))
    first, second = Measured(2, {0: split, 1: whole}, None).costs.stages
    assert (first.B, first.W, first.backward) == (3, 1, 4)
    assert (second.B, second.W, second.backward) == (6, 2, 8)


def test_a_stage_without_a_kind_of_op_has_the_mean_of_the_others():
    both, none = StageTimes(times(2), times(3), times(1), times(5)), StageTimes(None, None, None, None)
    second = Measured(2, {0: both, 1: none}, None).costs.stages[1]
    assert (second.F, second.B, second.W) == (2, 3, 1)


def test_a_full_backward_far_from_b_and_w_is_a_warning():
    split = StageTimes(times(1), times(1), times(1), times(4))
    slow, fast = (split._replace(B=None, W=None, BW=times(each)) for each in (4.5, 0.9))
    doubts = Measured(3, {0: split, 1: slow, 2: fast}, None).doubts
    assert doubts == [
        "stage 1: a full backward takes 4.5 s, B and W of other stages 2 s",
        "stage 2: a full backward takes 0.9 s, B and W of other stages 2 s",
    ]


def test_samples_spread_unit_and_the_latency_that_is_overridden_are_printed(tmp_path):
    found = read(written(tmp_path, run_of(zb1p(2, 4), Costs(F=2, latency=0.5))))
    first, head, stage, *_, last = describe(found, latency=0.25).splitlines()
    assert first == "measured, in seconds: median (lower to upper quartile, number of samples)"
    assert head.split() == ["stage", "F", "B", "W", "BW"]
    assert "0.002 (0.002 to 0.002, 4)" in stage
    assert last.startswith("latency: 0.0005 (0.0005 to 0.0005, ")
    assert last.endswith(" s; --latency overrides it: 0.25 s")


@pytest.mark.parametrize(
    ("kinds", "stage", "says"),
    [("FBW", 1, "no op of stage 1 was measured"), ("F", 2, "no forward was measured"), ("W", 2, "no backward was")],
)
def test_a_trace_that_lacks_a_stage_or_a_kind_of_op_is_refused(tmp_path, kinds, stage, says):
    """Without all ops of one stage, or without all F, or all W, of both."""
    run = run_of(zb1p(3, 4), Costs())
    work = tuple(w for w in run.work if str(w.at.op.kind) not in kinds or stage not in (2, w.at.op.stage))
    with pytest.raises(RuleError, match=says):
        read(written(tmp_path, replace(run, work=work)))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"traceEvents": [{}]}', '{"traceEvents": [\n]}'])
def test_a_file_without_a_measured_run_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(RuleError, match="has no measured run; name such a trace"):
        read(path)


def test_a_simulation_alone_is_no_measurement(tmp_path):
    with pytest.raises(RuleError, match="has no measured run"):
        read(written(tmp_path, run_of(one_f_one_b(2, 2), Costs(), "simulated")))
