"""A recorded step is compared with a plain run of its modules: gradients, losses and their number, replicas."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.events import ForwardId, read
from dualpipe.record.plain import compare
from dualpipe.record.plain.copies import perhaps_tied
from dualpipe.record.plain.step import Step
from dualpipe.schedule import UP, Chunk, Task
from dualpipe.testing import record_ranks

MICROBATCHES = 3
SHAPE = (2, 4)


class Split(torch.autograd.Function):
    """A linear layer whose weight gradient goes to a store while ``STORE`` is on."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors

        def add():
            found = gradient.T @ x
            weight.grad = found if weight.grad is None else weight.grad + found

        if STORE["on"]:
            STORE["queue"].append(add)
        else:
            add()
        return gradient @ weight, None


STORE = {"on": False, "queue": []}


class Stage(nn.Module):
    """A stage with a weight gradient of its own, a dropout, and a bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(torch.tanh(Split.apply(x, self.weight) + self.bias))


def gpipe(faults):
    """Two ranks: all forwards, all backwards, then the deferred weight gradients and an optimizer's step."""

    def body(rank):
        torch.manual_seed(rank)
        stage, loss_of = Stage(), nn.MSELoss()
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        alive, losses = [], []
        for _ in range(MICROBATCHES):
            x = torch.randn(SHAPE)
            if rank:
                dist.recv(x, 0)
                x.requires_grad_()
            alive.append((x, stage(x)))
        for number in [1, 0, 2] if "swapped" in faults else [0, 1, 2]:
            if rank == 0:
                dist.send(alive[number][1].detach(), 1)
        for x, y in alive:
            STORE["on"] = True
            if rank:
                loss = loss_of(y, torch.ones(SHAPE)) / (1 if "averaged" in faults else MICROBATCHES)
                loss.backward()
                losses.append(loss.detach())
                dist.send(x.grad, 0)
            else:
                gradient = torch.empty(SHAPE)
                dist.recv(gradient, 1)
                y.backward(gradient)
            STORE["on"] = False
        del alive, x, y
        if rank:
            del loss
        if "never run" in faults and rank == 0:
            del STORE["queue"][1]
        if "never fed" in faults:
            STORE["queue"].clear()
        while STORE["queue"]:
            STORE["queue"].pop(0)()
        if "cleared" in faults:
            losses.clear()
        for parameter in stage.parameters():
            if "averaged" in faults:
                parameter.grad.div_(MICROBATCHES)
            if "spoiled" in faults:
                parameter.grad.add_(0.5)
        nn.utils.clip_grad_norm_(stage.parameters(), 1e-3 if "clipped apart" in faults else 1e3)
        optimizer.step()
        print(len(losses))

    return body


def compared(*faults):
    """Verdict and text of the comparison."""
    comparison = record_ranks(2, gpipe(faults), compare=True).comparison
    return comparison.verdict, comparison.text()


def test_deferred_weight_gradients_are_bitwise_those_of_a_plain_run():
    verdict, text = compared()
    assert verdict == "equal"
    assert text.splitlines() == [
        "compared with a plain run of the same modules: equal",
        "  stage 0 of lane > on rank 0: outputs and gradients equal",
        "  stage 1 of lane > on rank 1: outputs and gradients equal",
        "  losses of lane > on rank 1: 3 computed, 3 of them kept or read by the end of the step; none of them is ever "
        "read on rank 1: does the program read its losses on another rank?",
        "  each loss enters the gradient with weight 0.3333: the gradient is the mean over 3 microbatches",
    ]


FAULTS = {
    ("never run", "cleared"): (
        "stage 0 of lane > on rank 0: weight: the gradient lacks microbatch 1: is it without",
        "3 were computed and collected, and none is kept or read by the end of the step: is their list cleared before",
    ),
    ("never fed", "swapped"): (
        "stage 0 of lane > on rank 0: microbatch 0 does not take the gradient that stage 1 has for it, but the "
        "gradient of the input of stage 1 for microbatch 1; ",
        "weight: no gradient, but the plain run has one: are weight gradients put into the store, and run from it?",
    ),
    ("clipped apart",): (
        "rank 0 clips at ",
        ", which is that of the rank's own gradients; over all stages, each parameter once, it is ",
    ),
}


@pytest.mark.parametrize("faults", FAULTS, ids=" and ".join)
def test_faults_planted_in_a_program_that_runs_through_are_found(faults):
    verdict, text = compared(*faults)
    assert verdict == "different"
    for says in FAULTS[faults]:
        assert says in text


@pytest.mark.long
def test_gradients_divided_by_the_microbatches_agree_with_a_note_and_other_changes_do_not():
    verdict, text = compared("averaged")
    assert verdict == "equal"
    assert "outputs and gradients equal; divided by 3" in text
    assert "with weight 0.3333: the gradient is the mean over 3 microbatches" in text
    verdict, text = compared("spoiled")
    assert verdict == "different"
    assert "weight, bias: the gradient differs by up to 0.5" in text


def two_lanes(summed):
    """Two stages on two ranks, a lane each way; the replicas of a stage have the same weights.

    The program calls the two layers of the first stage one by one, so their parameters have the same names.
    """

    def body(rank):
        torch.manual_seed(0)
        layers, last = [nn.Linear(4, 4), nn.Linear(4, 4)], nn.Linear(4, 4)
        parameters = [parameter for layer in (*layers, last) for parameter in layer.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)

        def exchange(tensor):
            other = torch.empty(SHAPE)
            ends = [lambda: dist.send(tensor, 1 - rank), lambda: dist.recv(other, 1 - rank)]
            for end in ends if rank == 0 else reversed(ends):
                end()
            return other

        for _ in range(2):
            y = layers[1](layers[0](torch.randn(SHAPE) + rank))
            x = exchange(y.detach()).requires_grad_()
            last(x).square().mean().backward()
            y.backward(exchange(x.grad))
        for parameter in parameters if summed else ():
            dist.all_reduce(parameter.grad)
        optimizer.step()

    return body


@pytest.mark.long
def test_replicas_that_are_summed_agree_with_the_sum_over_both_lanes():
    comparison = record_ranks(2, two_lanes(True), compare=True).comparison
    assert comparison.verdict == "equal", comparison.text()
    assert [each.summed for each in comparison.chunks] == [True] * 4
    assert "summed over both lanes" in comparison.text()
    assert "tied" not in comparison.text()


def test_replicas_that_are_never_summed_are_found_before_the_optimizers_step():
    comparison = record_ranks(2, two_lanes(False), compare=True).comparison
    assert comparison.verdict == "different"
    assert all(not each.faults for each in comparison.chunks), "each lane's own gradients are right"
    assert comparison.replicas[0].startswith("the replicas of stages 0 1 were not summed")
    assert comparison.as_json()["chunks"][0]["summed"] is False


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
    comparison = compare(tmp_path, logs, tasks, {UP: (0, 1)})
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
        torch.save({"weights": {0: weights - after}, "clipped": None, "read": []}, tmp_path / f"{rank}.pt.after")
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
        ((4.0, 4.0), "equal", "divided by 2 and scaled by 0.8 on every rank; their norm over all stages"),
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
