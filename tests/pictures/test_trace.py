"""The trace of a simulation: every op, arrows from sends to their receives, counters; and what a wrong one is told."""

import copy
import json
from itertools import pairwise

import pytest

from dualpipe.schedule import COMPUTE, SENDS
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import loads
from dualpipe.timeline.perfetto import MICROSECONDS_PER_UNIT, TICK, of_timeline, write
from dualpipe.timeline.simulate import Costs, simulate
from tests.pictures.cases import TIMELINES
from tests.pictures.tracefile import complaints


@pytest.fixture(params=TIMELINES)
def timeline(request):
    return TIMELINES[request.param]


def judge(trace, timeline):
    (name,) = (event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name")
    return complaints(trace, timeline.schedule, {name: 1})


def test_a_trace_fits_the_format_and_the_schedule(timeline, tmp_path):
    write(of_timeline(timeline), tmp_path / "trace.json")
    assert judge(json.loads((tmp_path / "trace.json").read_text()), timeline) == []


def slices(trace, *kinds):
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] in kinds]


def test_one_unit_of_time_is_a_millisecond_and_the_trace_says_so():
    timeline = TIMELINES["dualpipe"]
    trace = of_timeline(timeline)
    assert trace["displayTimeUnit"] == "ms"
    assert trace["otherData"] == {
        "schedule": "dualpipe",
        "sizes": "4 ranks, 10 microbatches",
        "costs": "F=1,B=1,W=1",
        "scale": "one unit of time is 1000 us",
    }
    assert MICROSECONDS_PER_UNIT == 1000
    assert {event["dur"] for event in slices(trace, *COMPUTE)} == {1000.0}
    assert max(event["ts"] + event["dur"] for event in slices(trace, *COMPUTE)) == 32000


def test_a_message_lasts_from_its_post_until_it_is_there_and_a_tick():
    trace = of_timeline(TIMELINES["dualpipe with credit for the overlap"])
    first = {event["name"]: event for event in slices(trace, "SF", "RF")}
    assert (first["0SF0>"]["ts"], first["0SF0>"]["dur"]) == (1000, 100 + TICK)
    assert (first["1RF0>"]["ts"], first["1RF0>"]["dur"]) == (0, 1100 + TICK)


def levels(trace, name):
    return [event["args"]["value"] for event in trace["traceEvents"] if event["ph"] == "C" and event["name"] == name]


def test_the_counters_follow_idle_ranks_and_live_activations(timeline):
    trace = of_timeline(timeline)
    for rank, peak in enumerate(timeline.peak_activations):
        if timeline.busy[rank]:
            assert max(levels(trace, f"live activations of rank {rank}")) == peak
    if sum(timeline.busy):
        counted = [(e["ts"], e["args"]["value"]) for e in trace["traceEvents"] if e["name"] == "idle ranks"]
        assert counted[-1][1] == timeline.schedule.ranks
        area = sum(level * (b - a) for (a, level), (b, _) in pairwise(counted)) / 1000
        last = counted[-1][0] / 1000
        assert area == pytest.approx(sum(timeline.bubble) - timeline.schedule.ranks * (timeline.makespan - last))


def test_a_bubble_says_what_the_rank_waits_for():
    trace = of_timeline(TIMELINES["dualpipe"])
    told = [(e["args"]["rank"], e["ts"], e["name"]) for e in slices(trace, "bubble")]
    assert told[:2] == [(1, 0.0, "waits for 1RF0>"), (2, 0.0, "waits for 1RF0<")]


def test_the_same_timeline_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write(of_timeline(simulate(generate("dualpipe", 4, 8))), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def arrows(events, ph):
    return [event for event in events if event["ph"] == ph]


def to_the_wrong_receiver(events):
    a, b, *_ = arrows(events, "f")
    a["tid"], b["tid"] = b["tid"], a["tid"]


def with_crossed_ids(events):
    a, b, *_ = arrows(events, "f")
    a["id"], b["id"] = b["id"], a["id"]


def without_an_end(events):
    events.remove(arrows(events, "f")[3])


def without_an_arrow(events):
    events.remove(arrows(events, "f")[3])
    events.remove(arrows(events, "s")[3])


def without_an_op(events):
    events.remove(next(e for e in events if e["name"] == "2B1>"))


def with_an_op_twice(events):
    at = next(number for number, e in enumerate(events) if e["name"] == "2B1>")
    events.insert(at, copy.deepcopy(events[at]))


def on_another_ranks_track(events):
    next(e for e in events if e["name"] == "2B1>")["tid"] = 1


def with_another_need(events):
    next(e for e in events if e["name"] == "2B1>")["args"]["needs"] = ["2F1>"]


def going_back_in_time(events):
    last = events[-1]
    events.remove(last)
    events.insert(len(events) // 2, last)


def with_slices_that_cross(events):
    own = next(e for e in events if e.get("cat") == "slot")
    own["dur"] -= 500


def with_a_field_missing(events):
    del arrows(events, "f")[0]["bp"]


def with_an_activation_that_stays(events):
    last = [e for e in events if e["name"].startswith("live")][-1]
    last["args"]["value"] = 1


FAULTS = {
    to_the_wrong_receiver: "arrow",
    with_crossed_ids: "goes from",
    without_an_end: "without both ends",
    without_an_arrow: "has 0 arrows",
    without_an_op: "is there 0 times",
    with_an_op_twice: "is there 2 times",
    on_another_ranks_track: "is on the track of rank 0",
    with_another_need: "facts of 2B1>",
    going_back_in_time: "time goes back",
    with_slices_that_cross: "leaves what it began in",
    with_a_field_missing: "fields of",
    with_an_activation_that_stays: "ends with 1",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_trace_is_noticed(fault):
    timeline = TIMELINES["dualpipe"]
    trace = of_timeline(timeline)
    fault(trace["traceEvents"])
    assert any(FAULTS[fault] in told for told in judge(trace, timeline))


def test_every_send_has_an_arrow():
    timeline = TIMELINES["three chunks per rank"]
    events = of_timeline(timeline)["traceEvents"]
    assert len(arrows(events, "s")) == sum(placed.op.kind in SENDS for placed in timeline.schedule) == 10


def test_collectives_have_a_track_and_a_wait_for_one_is_named():
    text = "lane > 0\nlane < 1\ngroup 0: 0 1\nrank 0: 0US> 0F0> 0AA0>@0 0B0>\nrank 1: 0F0< 0F1< 0F2< 0AA0<@0\n"
    trace = of_timeline(simulate(loads(text), Costs(US=1, AA=2)))
    times = {event["name"]: (event["ts"], event["dur"]) for event in slices(trace, "US", "AA")}
    assert times == {"0US>": (0, 1000), "0AA0>@0": (2000, 3000), "0AA0<@0": (3000, 2000)}
    waits = [event["name"] for event in slices(trace, "bubble") if event["args"]["rank"] == 0]
    assert waits == ["waits for 0US>", "waits for 0AA0>"]
    tracks = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {tracks[event["tid"]] for event in slices(trace, "US", "AA")} == {"rank 0 collectives", "rank 1 collectives"}
