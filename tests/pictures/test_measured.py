"""``dualpipe verify --trace``: what real processes did when, beside the simulation.

rank 0   0F0> from 10 to 12, posts 0SF0> at 12, waits for 0RB0> from 13 to 18, 0B0>+0W0> to 20
rank 1   posts 1RF0> at 10, waits from 10 to 13, 1F0> to 15, 1B0>+1W0> to 17, posts 1SB0> at 17
"""

import json

import pytest

from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import loads
from dualpipe.timeline.timeline import Costs
from reference.measured import MEASURED, measured, median_costs, trace
from reference.stopwatch import Stopwatch, Timed
from reference.trace import Interval, StepTimes
from tests.cli.conftest import run as run
from tests.pictures.tracefile import complaints

SIMULATED = "simulated with the median costs"
SCHEDULE = loads(
    "lane > 0 1\nrank 0: 0F0> 0SF0>+0RB0> 0B0>+0W0>\nrank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>\n",
)
TIMES = {
    0: {"0F0>": (10, 12), "0SF0>": (12, 12.5), "0RB0>": (12, 12.5), "0B0>": (12.5, 20), "0W0>": (20, 20)},
    1: {"1RF0>": (10, 10), "1F0>": (10, 15), "1B0>": (15, 17), "1W0>": (17, 17), "1SB0>": (17, 17.5)},
}
WAITS = {0: {"0RB0>": Interval(12.5, 18)}, 1: {"1RF0>": Interval(10, 13)}}


def step(later: float = 0.0) -> dict[int, StepTimes]:
    ops = {str(placed.op): placed.op for placed in SCHEDULE}
    return {
        rank: StepTimes(
            tuple((ops[name], Interval(a + later, b + later)) for name, (a, b) in times.items()),
            {label: Interval(a + later, b + later) for label, (a, b) in WAITS[rank].items()},
        )
        for rank, times in TIMES.items()
    }


def test_an_op_begins_when_its_waiting_ends():
    run_log = measured(SCHEDULE, step())
    assert [(str(work.at.op), work.start, work.end) for work in run_log.work] == [
        ("0F0>", 0, 2),
        ("0B0>", 8, 10),
        ("0W0>", 10, 10),
        ("1F0>", 3, 5),
        ("1B0>", 5, 7),
        ("1W0>", 7, 7),
    ]
    assert [(idle.rank, idle.start, idle.end, str(idle.need)) for idle in run_log.idle] == [
        (0, 2.5, 8, "0RB0>"),
        (1, 0, 3, "1RF0>"),
    ]


def test_a_message_completes_when_its_receiver_has_waited():
    messages = measured(SCHEDULE, step()).messages
    times = {(str(m.send.op), str(m.receive.op)): (m.sent, m.awaited, m.completed) for m in messages}
    assert times == {("0SF0>", "1RF0>"): (2, 0, 3), ("1SB0>", "0RB0>"): (7, 2, 8)}


def test_the_two_halves_of_a_full_backward_have_notes():
    notes = {str(work.at.op): work.note for work in measured(SCHEDULE, step()).work}
    assert notes["0F0>"] == ""
    assert notes["0B0>"] == "B and W are one call of autograd here: the time includes 0W0>"
    assert notes["0W0>"].startswith("part of 0B0>: ")


def test_costs_are_the_medians_of_each_kind():
    assert median_costs([measured(SCHEDULE, step())]) == Costs(F=2, B=1, W=1, BW=2)


def test_steps_follow_each_other_and_the_simulation_begins_with_each():
    found = trace(SCHEDULE, [step(), step(later=100)], blocking=False, device="cpu")
    assert complaints(found, SCHEDULE, {MEASURED: 2, SIMULATED: 2}) == []
    starts = [(e["pid"], e["ts"]) for e in found["traceEvents"] if e["name"] == "0F0>"]
    assert starts == [(1, 0), (2, 0), (1, 100e6), (2, 100e6)]


def test_times_that_are_not_the_schedules_are_refused():
    planted = step()
    planted[0] = StepTimes(planted[0].ops[::-1], planted[0].waits)
    with pytest.raises(AssertionError, match="rank 0 measured 0W0> where the schedule has 0F0>"):
        measured(SCHEDULE, planted)
    planted[0] = StepTimes(step()[0].ops[:-1], planted[0].waits)
    with pytest.raises(ValueError, match="shorter"):
        measured(SCHEDULE, planted)


class Slow:
    rank, ranks = 0, 2

    def wait(self, message):
        return ("tensor",)


def test_the_first_wait_for_a_message_counts():
    class Message:
        label = "1RF0>"

    watch = Stopwatch(0)
    timed = Timed(Slow(), watch)
    assert timed.wait(Message()) == ("tensor",)
    first = watch.read().waits["1RF0>"]
    timed.wait(Message())
    assert watch.read().waits["1RF0>"] == first
    watch.start()
    assert watch.read() == StepTimes((), {})


def test_verify_writes_what_the_processes_did_beside_the_simulation(run, tmp_path):
    result = run("verify", "-P", 2, "--steps", 2, "--trace", tmp_path)
    assert result.code == 0
    assert "EQUAL" in result.out
    file = tmp_path / "dualpipe-P2-M4.json"
    assert result.err == f"trace written to {file}\n"
    found = json.loads(file.read_text())
    assert complaints(found, generate("dualpipe", 2, 4), {MEASURED: 2, SIMULATED: 2}) == []
    ran = [e for e in found["traceEvents"] if e["ph"] == "X" and e["pid"] == 1 and e["cat"] in ("F", "B")]
    assert all(e["dur"] > 0 for e in ran)
    noted = {e["name"] for e in found["traceEvents"] if "note" in e.get("args", {})}
    assert {"0B0<", "0W0<"} <= noted
    assert not {"0B1>", "0W1>", "0B1<", "0W1<"} & noted


def test_processes_that_do_not_finish_leave_no_trace(run, tmp_path):
    file = tmp_path / "hang.txt"
    file.write_text("lane > 0 1\nrank 0: 0F0> 0RB0> 0B0>+0W0> 0SF0>\nrank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>\n")
    result = run("verify", file, "--steps", 1, "--timeout", 2, "--trace", tmp_path / "trace.json")
    assert result.code == 1
    assert "no trace was written, because the processes did not finish" in result.err
    assert not (tmp_path / "trace.json").exists()
