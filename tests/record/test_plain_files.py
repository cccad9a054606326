"""What is concluded from the files that the ranks' plain runs leave, written here by hand."""

import pytest
import torch

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.events import ForwardId, read
from dualpipe.record.plain import compare
from dualpipe.record.plain.shared import perhaps_tied
from dualpipe.record.plain.step import Step
from dualpipe.schedule import DOWN, UP, Chunk, Task
from tests.record.logs import Rank


def shared_by_two_stages(folder, final):
    """The comparison of two stages on one rank, which share a parameter."""
    ran = [RAN | {"weights": {0: torch.full((2,), value)}} for value in (3.0, 4.0)]
    torch.save(FILE | {"forwards": dict(enumerate(ran)), "final": {0: final}}, folder / "0.pt")
    events = [event | {name: n} for n in range(2) for event, name in zip(BEGUN, ("forward", "run"), strict=True)]
    events = [event | ({"forwards": [event["run"]]} if "run" in event else {}) for event in events]
    tasks = {ForwardId(0, stage): Task(UP, stage, 0) for stage in range(2)}
    return compare(folder, [read(0, events)], tasks, {UP: (0, 0)})


def one_forward(folder, content):
    """The comparison of one rank with one forward; ``content`` is what its plain run saved, if it made one."""
    if content is not None:
        torch.save(content, folder / "0.pt")
    return compare(folder, [read(0, BEGUN)], {ForwardId(0, 0): Task(UP, 0, 0)}, {UP: (0,)})


BEGUN = [
    {"event": "forward", "forward": 0, "module": 0, "messages": [], "after": [], "first": True, "again": None}
    | {"grad": True, "at": "x.py:1"},
    {"event": "backward", "forwards": [0], "untrainable": [], "run": 1},
]
RAN = {
    "took": [],
    "returned": [torch.ones(1)],
    "plainly": [torch.ones(1)],
    "gradients": [None],
    "input gradients": [],
    "weights": {0: torch.full((2,), 3.0)},
    "ran": True,
}
FILE = {
    "forwards": {0: RAN},
    "names": ["w"],
    "before": {},
    "step": 1,
    "seen": [0],
    "collected": [],
    "by_optimizer": True,
    "own": [],
    "elsewhere": {},
}


@pytest.mark.parametrize(
    ("content", "verdict", "says"),
    [
        (None, "unknown", "it made no plain run"),
        ({"error": "the plain run had not ended after 5 s"}, "unknown", "had not ended after 5 s"),
        (
            FILE | {"forwards": {0: {"error": "ValueError: no peer"}}, "final": [None]},
            "unknown",
            "microbatch 0 cannot be run plainly: ValueError: no peer",
        ),
        (FILE | {"final": {0: torch.full((2,), 3.0)}}, "equal", "outputs and gradients equal"),
        (FILE | {"final": {0: torch.full((2,), 1.5)}}, "equal", "divided by 2"),
        (FILE | {"final": {0: torch.full((2,), 3.5)}}, "different", "w: the gradient differs by up to 0.5"),
        (FILE | {"final": {0: torch.full((3,), 3.0)}}, "different", "w: the gradient has the shape [3] and not [2]"),
        (
            FILE | {"final": {0: torch.full((2,), 5.0)}, "before": {0: torch.full((2,), 2.0)}},
            "equal",
            "outputs and gradients equal; added to what was there before the step",
        ),
        (
            FILE | {"final": {0: torch.full((2,), 5.0)}, "before": {0: torch.full((2,), 2.0)}, "step": 2},
            "different",
            "w: the gradient includes that of an earlier step: is it set to zero or None",
        ),
        (
            FILE | {"final": {0: torch.full((2,), 3.0)}, "forwards": {0: RAN | {"plainly": [torch.zeros(1)]}}},
            "unknown",
            "the output of microbatch 0 differs from the plain one, on the same input and weights",
        ),
        (
            FILE | {"final": {0: None}, "forwards": {0: RAN | {"plainly": [torch.zeros(1)], "changed": ["w"]}}},
            "different",
            "the output of microbatch 0 differs from the plain one: w had changed since the step began",
        ),
    ],
)
def test_what_is_concluded_from_the_file_of_a_plain_run(tmp_path, content, verdict, says):
    comparison = one_forward(tmp_path, content)
    assert comparison.verdict == verdict
    assert says in comparison.text()
    assert comparison.as_json()["verdict"] == verdict


@pytest.mark.parametrize(("factor", "apart"), [(1.0, 0.0), (0.3, 0.0), (1.0, 1.0), (0.3, 1.0)])
def test_weights_that_are_tied_over_stages_agree_with_the_sum_of_both(tmp_path, factor, apart):
    """Their gradients are 3 and 4; the norm of clipping counts the sum once: 2 * 7 ** 2 + 5 * (3 ** 2 + 4 ** 2) = 223.

    Without equal weights it is a sum over stages by mistake.
    """
    tasks, logs = {}, []
    links = {"took": [torch.ones(1)], "gradients": [torch.ones(1)], "input gradients": [torch.ones(1)]}
    for rank, own in enumerate((3.0, 4.0)):
        ran = RAN | links | {"weights": {0: torch.full((2,), own), 1: torch.tensor([own, 2 * own])}}
        final = {0: torch.full((2,), 7 * factor), 1: torch.tensor([own, 2 * own]) * factor}
        weights = {0: torch.tensor([1.0, 2.0 + apart * rank]), 1: torch.tensor([5.0, own])}
        file = FILE | {"forwards": {0: ran}, "final": final, "weights": weights, "names": ["w", "b"]}
        torch.save(file | {"scalars": [223.0]}, tmp_path / f"{rank}.pt")
        tasks[ForwardId(rank, 0)] = Task(UP, rank, 0)
        logs.append(read(rank, BEGUN))
    limit = factor * 223**0.5 if factor < 1 else None
    comparison = compare(tmp_path, logs, tasks, {UP: (0, 1)}, clip_norm=limit)
    assert comparison.verdict == ("different" if apart else "equal"), comparison.text()
    assert ("w is summed with w of stage 1, to which it is tied" in comparison.text()) == (not apart)
    assert ("summed with that of w of stage 1, which is another" in comparison.text()) == (factor == 1 and apart == 1)
    assert ("once, was 14.93, as every rank computes it" in comparison.text()) == (factor < 1 and not apart)


@pytest.mark.parametrize(
    ("final", "verdict", "says"),
    [
        (7.0, "equal", "w is summed over the stages that use it, up to rounding"),
        (3.5, "equal", "w is summed over the stages that use it and divided by 2, up to rounding"),
        (4.0, "different", "w: the gradient is not the sum over the stages of the rank that use the parameter"),
    ],
)
def test_a_weight_that_two_stages_of_a_rank_share_is_summed_over_both(tmp_path, final, verdict, says):
    comparison = shared_by_two_stages(tmp_path, torch.full((2,), final))
    assert says in comparison.text()
    assert any(each.faults for each in comparison.chunks) == (verdict == "different")


@pytest.mark.parametrize(
    ("own", "changed", "asks"), [(5.0, 3.0, True), (5.0, 2.0, False), (0.0, 3.0, False)], ids=["apart", "alike", "seed"]
)
def test_a_weight_that_has_the_value_of_another_stage_before_the_step_alone_may_be_tied(own, changed, asks):
    shared, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    files = {
        0: {"names": ["embed", "a"], "weights": {0: shared, 1: other}, "changed": {0: shared + 2.0, 1: other}},
        1: {"names": ["head", "b"], "weights": {0: shared, 1: other + own}, "changed": {0: shared + changed, 1: other}},
    }
    forwards = {Task(UP, stage, 0): {"weights": {0: None, 1: None}} for stage in files}
    for file in files.values():
        file |= {"before": {}, "by_optimizer": True}
    step = Step(files, forwards, {UP: (0, 1)}, {UP: 1}, False, {})
    chunks = [ChunkComparison(Chunk(UP, stage), stage, 1, (), (), ()) for stage in files]
    says = "embed has the values of head of stage 1 before the step and not after it: if they are tied, is the gradient"
    assert [(chunk.stage, note.startswith(says)) for chunk, note in perhaps_tied(step, chunks)] == [(0, True)] * asks


def test_a_parameter_of_another_scale_is_named_with_the_collective_of_its_own(tmp_path):
    rank = Rank(0)
    rank.backward(rank.forward())
    rank.reduce(0, "a", [0])
    rank.reduce(1, "b", [0])
    at = [event["at"] for event in rank.events if event["event"] == "collective"]
    weights = {number: torch.full((2,), 3.0) for number in range(2)}
    final = {0: torch.full((2,), 1.5), 1: torch.full((2,), 3.0)}
    file = {"names": ["a", "b"], "forwards": {0: RAN | {"weights": weights}}, "final": final}
    torch.save(FILE | file, tmp_path / "0.pt")
    text = compare(tmp_path, [read(0, rank.events)], {ForwardId(0, 0): Task(UP, 0, 0)}, {UP: (0,)}).text()
    assert "scaled by different factors: a by 0.5 and b by 1" in text
    assert f"; a is also in the all_reduce at {at[0]}; b is also in the all_reduce at {at[1]}" in text


def test_gradients_that_other_pipelines_may_have_added_to_are_unknown(tmp_path):
    torch.save(FILE | {"final": {0: torch.full((2,), 3.5)}}, tmp_path / "0.pt")
    logs = [read(rank, BEGUN) for rank in range(2)]
    comparison = compare(tmp_path, logs, {ForwardId(0, 0): Task(UP, 0, 0)}, {UP: (0,)})
    assert comparison.verdict == "unknown"
    assert "may be the sum over pipelines that are not in the file" in comparison.text()


@pytest.mark.parametrize(("changed", "verdict"), [(0.5, "equal"), (0.25, "unknown")])
def test_pipelines_whose_weights_are_the_same_only_before_the_step_are_unknown(tmp_path, changed, verdict):
    weights = torch.tensor([1.0, 2.0])
    for rank, after in enumerate((0.5, changed)):
        torch.save(FILE | {"final": {0: torch.full((2,), 3.0)}, "weights": {0: weights}}, tmp_path / f"{rank}.pt")
        torch.save(
            {"weights": {0: weights - after}, "clipped": None, "read": [], "later": []}, tmp_path / f"{rank}.pt.after"
        )
    comparison = compared_pipelines(tmp_path)
    assert comparison.verdict == verdict
    assert ("w. Are the gradients summed over the pipelines?" in comparison.text()) == (verdict == "unknown")


def compared_pipelines(folder):
    """The comparison of the first of two pipelines of one rank each, whose files are in the folder."""
    begun = {"event": "forward", "forward": 0, "module": 0, "messages": [], "after": [], "first": True, "again": None}
    events = [
        begun | {"grad": True, "at": "x.py:1"},
        {"event": "backward", "forwards": [0], "untrainable": [], "run": 1},
    ]
    logs = [read(rank, events) for rank in range(2)]
    one, other = (({ForwardId(0, 0): Task(UP, 0, 0)}, {UP: (0,)}, (rank,)) for rank in (0, 1))
    return compare(folder, logs, *one, pipelines=[other])


@pytest.mark.parametrize(
    ("finals", "verdict", "says"),
    [
        ((10.0, 10.0), "equal", "summed over 2 pipelines, up to rounding"),
        ((5.0, 5.0), "equal", "summed over 2 pipelines and divided by 2, up to rounding"),
        ((3.0, 7.0), "equal", "outputs and gradients equal"),
        ((8.5, 8.5), "unknown", "was 14.14 and is 12.02: if they are clipped, give the limit with --clip-norm"),
        ((12.5**0.5,) * 2, "equal", "divided by 2 and scaled by 0.7071 on every rank; their norm over all stages"),
        (([8.5, 1.0], [8.5, 1.0]), "unknown", "may be the sum over pipelines that are not in the file"),
    ],
)
def test_gradients_may_be_summed_over_all_recorded_pipelines(tmp_path, finals, verdict, says):
    for rank, (final, own) in enumerate(zip(finals, (3.0, 7.0), strict=True)):
        ran = RAN | {"weights": {0: torch.full((2,), own)}}
        kept = {"final": {0: torch.ones(2) * torch.tensor(final)}, "scalars": [50.0]}  # the square of the norm
        torch.save(FILE | kept | {"forwards": {0: ran}}, tmp_path / f"{rank}.pt")
    comparison = compared_pipelines(tmp_path)
    assert comparison.verdict == verdict
    assert says in comparison.text()


@pytest.mark.parametrize(
    ("data", "numbers", "verdict"), [("ab", (1, 1), "equal"), ("aa", (1, 1), "unknown"), ("aa", (1, 4), "different")]
)
def test_the_same_data_on_both_lanes_leaves_their_sum_open_and_hides_nothing_else(data, numbers, verdict, tmp_path):
    for rank in range(2):
        numbered = {"layers": {0: {"layer_number": numbers[rank]}}}
        ran = RAN | {"data": data[rank]}
        content = FILE | numbered | {"forwards": {0: ran}, "final": {0: torch.full((2,), 6.0)}}
        torch.save(content, tmp_path / f"{rank}.pt")
    tasks = {ForwardId(rank, 0): Task(lane, 0, 0) for rank, lane in enumerate((UP, DOWN))}
    found = compare(tmp_path, [read(rank, BEGUN) for rank in range(2)], tasks, {UP: (0,), DOWN: (1,)})
    assert found.verdict == verdict, found.text()
    assert ("twice the gradient of one lane looks the same" in found.text()) == (data == "aa")
