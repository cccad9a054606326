"""Costs from torch.profiler traces whose ranges are named as ops."""

import gzip
import json

import pytest

from dualpipe.errors import RuleError
from dualpipe.schedule import COMPUTE, RECEIVES, show_slot
from dualpipe.schedule.generate import generate, zb1p
from dualpipe.timeline.measured_costs import describe
from dualpipe.timeline.profiled_costs import read
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.timeline import Costs


def event(name, start, end, cat="user_annotation", pid=7):
    """A range as torch.profiler writes it; times in milliseconds."""
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": 7, "ts": 1e3 * start, "dur": 1e3 * (end - start)}


def trace(events, rank=0, host="a"):
    about = {"distributedInfo": {"rank": rank}, "host_name": host, "baseTimeNanoseconds": 5_000_000}
    return {**about, "traceEvents": [event("aten::mm", 0, 1, "cpu_op"), *events]}


def write(folder, *contents):
    paths = [folder / f"{number}.json" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return paths


def traces_of(timeline):
    """The traces of a simulated run: what ran, when messages were posted, and the waits for those that were needed."""
    for rank, spans in enumerate(timeline.spans):
        events, clock = [], 0.0
        for span in spans:
            if span.ops[0].kind in COMPUTE:
                if span.start > clock:
                    needs = {need for op in span.ops for need in timeline.schedule.needs(op) if need.kind in RECEIVES}
                    events += [event(f"wait {need}", clock, span.start) for need in needs]
                events.append(event(show_slot(span.ops), span.start, span.end))
                clock = span.end
            else:
                events.append(event(f"post {show_slot(span.ops)}", span.start, span.start))
        yield trace(events, rank)


@pytest.mark.parametrize("name", ["zb1p", "zbv"])
def test_the_costs_of_a_run_are_read_back(tmp_path, name):
    timeline = simulate(generate(name, 2, 4), Costs(F=2, B=3, W=1, latency=0.5))
    found = read([write(tmp_path, *traces_of(timeline))[0].parent])
    assert found.ranks == 2
    for times in found.stages.values():
        assert (times.F.median, times.B.median, times.W.median) == pytest.approx((2e-3, 3e-3, 1e-3))
        assert times.BW is None
    assert found.latency.median == pytest.approx(5e-4)
    assert found.remarks == ()


def one(tmp_path, *events):
    """The times of stage 0 in a trace with these events."""
    return read(write(tmp_path, trace(events))).stages[0]


def test_what_continues_a_forward_belongs_to_it(tmp_path):
    events = [event("0F0>", 0, 1), event("0F1>", 1, 2), event("0F0> continued", 2, 4), event("0B0>+0W0>", 4, 5)]
    assert one(tmp_path, *events).F.upper == pytest.approx(2.5e-3)


def test_w_without_a_range_lasts_since_the_range_before_it(tmp_path):
    events = [event("0F0>", 0, 1), event("0B0>", 1, 2), event("0W0> ends", 5, 5.001), event("0W1> ends", 7, 7)]
    found = one(tmp_path, *events, event("0B1>", 9, 9.5), event("0W2> ends", 11.5, 11.5))
    assert (found.W.samples, found.W.median) == (3, pytest.approx(2e-3))


def test_a_w_of_several_runs_of_the_engine_is_their_sum(tmp_path):
    events = [event("0F0>", 0, 1), event("0B0>", 1, 2), event("0W0> part", 3, 4), event("0W0> part", 6, 7)]
    apart = [event("0W0> ends", 9, 9), event("0W1> part", 10, 11), event("0W1>", 12, 13)]
    assert one(tmp_path, *events, *apart).W.median == pytest.approx(2e-3)


def test_ranges_on_the_gpu_count_where_there_are_both(tmp_path):
    on_gpu = [event("0F0>", 3, 7, "gpu_user_annotation", pid=0), event("0B0>+0W0>", 7, 9, "gpu_user_annotation", pid=0)]
    found = one(tmp_path, event("0F0>", 0, 1), event("0B0>+0W0>", 1, 2), *on_gpu)
    assert (found.F.median, found.BW.median) == pytest.approx((4e-3, 2e-3))


def test_ranges_of_several_microbatches_are_left_out_with_a_remark(tmp_path):
    events = [event("0F0>", 0, 1), event("0B0>+0W0>", 1, 2), event("0B1>+0B2>", 2, 9), event("0F1>+0B1>+0W1>", 9, 20)]
    found = read(write(tmp_path, trace(events)))
    assert found.stages[0].BW.samples == 1
    assert "2 ranges with ops of several microbatches, or with F and B, are left out" in describe(found)


WORK = [[event("0F0>", 0, 1), event("0B0>+0W0>", 8, 9)], [event("1F0>", 5, 6), event("1B0>+1W0>", 6, 8)]]
SENT, WAITED = event("post 0SF0>@1", 2, 2), event("wait 1RF0>@0", 1, 4)


@pytest.mark.parametrize(
    ("sent", "waited", "expected"),
    [
        (SENT, WAITED, 2e-3),
        (event("post 0SF0>@1", 0.5, 0.5), WAITED, None),  # the receiver was not waiting yet
        (event("post 0SF0>@1", 4.5, 4.5), WAITED, None),  # clocks that differ
        (SENT, event("wait 1RF0>@0+1SB7>@0", 1, 4), 2e-3),
        (SENT, event("wait 1SB0>@0", 1, 4), None),
    ],
)
def test_the_latency_is_that_of_messages_whose_receiver_waited(tmp_path, sent, waited, expected):
    found = read(write(tmp_path, trace([*WORK[0], sent]), trace([*WORK[1], waited], 1)))
    assert (found.latency and found.latency.median) == (expected and pytest.approx(expected))


def test_a_message_of_another_step_is_not_taken_for_this_one(tmp_path):
    later = event("post 0SF0>@1", 30, 30)
    found = read(write(tmp_path, trace([*WORK[0], SENT, later]), trace([*WORK[1], WAITED], 1)))
    assert found.latency.samples == 1


def test_hosts_do_not_share_a_clock(tmp_path):
    found = read(write(tmp_path, trace([*WORK[0], SENT]), trace([*WORK[1], WAITED], 1, host="b")))
    assert found.latency is None
    assert "1 messages between hosts are left out of the latency, since each host has its own clock" in describe(found)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not a trace"),
        (json.dumps({"traceEvents": 1}), "is not a trace"),
        (json.dumps(trace([])), "0.json has none; profile the program while it runs under `dualpipe record`"),
        (
            json.dumps(trace([event("dualpipe:3", 0, 1)])),
            "has 1 ranges of a recording whose ops have no names; run the",
        ),
        (json.dumps(trace([{**event("0F0>", 0, 1), "ts": None}])), "has an event that torch.profiler does not write"),
        (json.dumps(trace([event("0F0>", 0, 1)])), "no backward was measured"),
        (json.dumps(trace([*WORK[0], SENT])), "0SF0>@1, a message of stage 0 with stage 1, and no op of stage 1"),
    ],
)
def test_traces_that_do_not_fit_are_refused(tmp_path, content, says):
    path = tmp_path / "0.json"
    path.write_text(content)
    with pytest.raises(RuleError) as error:
        read([path])
    assert says in str(error.value)


def test_a_compressed_trace_is_read_and_one_that_is_given_twice_counts_once(tmp_path):
    path = tmp_path / "0.json.gz"
    path.write_bytes(gzip.compress(json.dumps(trace(WORK[0])).encode()))
    assert read([path, tmp_path]).stages[0].F.samples == 1


def test_a_folder_without_traces_is_refused(tmp_path):
    with pytest.raises(RuleError, match=r"has no file that ends in \.json or \.json\.gz"):
        read([tmp_path])


def test_zb1p_without_the_trace_of_its_last_rank_is_refused(tmp_path):
    paths = write(tmp_path, *traces_of(simulate(zb1p(4, 4))))
    with pytest.raises(
        RuleError, match="a message of stage 2 with stage 3, and no op of stage 3; add the missing ones"
    ):
        read(paths[:3])
