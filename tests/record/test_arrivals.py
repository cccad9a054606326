"""Tensors that leave torch's operators and come back keep their origin, or the recording says what is unknown."""

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record import RecordError
from dualpipe.record.arrivals import note_arrivals
from dualpipe.record.events import read
from dualpipe.testing import record_ranks
from proofs.prove import prove
from tests.record.two_ranks import SHAPE, assert_plain, text, train


def v_shape(between):
    """A V on two ranks: rank 1 holds stages 1 and 2; ``between`` makes the input of one from the other's output."""

    def body(rank):
        modules = [nn.Linear(4, 4) for _ in range(2)]
        if rank == 0:
            y = modules[0](torch.randn(SHAPE))
            dist.send(y.detach(), 1)
            z = torch.empty(SHAPE)
            dist.recv(z, 1)
            modules[1](z.requires_grad_()).sum().backward()
            dist.send(z.grad, 1)
            gradient = torch.empty(SHAPE)
            dist.recv(gradient, 1)
            y.backward(gradient)
        else:
            x = torch.empty(SHAPE)
            dist.recv(x, 0)
            y = modules[0](x.requires_grad_())
            inner = between(y.detach()).requires_grad_()
            z = modules[1](inner)
            dist.send(z.detach(), 0)
            gradient = torch.empty(SHAPE)
            dist.recv(gradient, 0)
            z.backward(gradient)
            y.backward(inner.grad)
            dist.send(x.grad, 0)

    return body


WAYS = {
    "shared memory": lambda y: torch.from_numpy(y.numpy()),
    "a copy": lambda y: torch.tensor(y.numpy().copy()),
    "a list": lambda y: torch.tensor(y.tolist()),
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "numbers": lambda y: torch.tensor([value.item() for value in y.flatten()]).reshape(SHAPE),
}


@pytest.mark.parametrize("way", ["a copy", *(pytest.param(w, marks=pytest.mark.long) for w in WAYS if w != "a copy")])
def test_an_activation_that_comes_back_unchanged_is_followed(way):
    schedule = record_ranks(2, v_shape(WAYS[way])).schedule
    assert schedule.routes == {">": (0, 1, 1, 0)}
    assert prove(schedule, smt=False).verdict == "proved"


def test_an_activation_that_numpy_changes_is_a_caveat():
    recording = record_ranks(2, v_shape(lambda y: torch.from_numpy(np.tanh(y.numpy()))))
    assert any("had been outside of torch, so that its origin could not be determined" in c for c in recording.caveats)
    assert any("made outside of torch's operators" in note and "test_arrivals.py:" in note for note in recording.notes)


def test_messages_of_numpy_arrays_are_followed():
    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x)

    assert_plain(record_ranks(2, lambda rank: train(rank, Copied(), send=send_through_numpy)))


def send_through_numpy(tensor, peer):
    dist.send(torch.from_numpy(tensor.numpy().copy()), peer)


def objects(rank):
    """Activations and gradients as pickled objects."""
    stage = nn.Linear(4, 4)
    if rank == 0:
        y = stage(torch.randn(SHAPE))
        dist.send_object_list([y.detach()], 1)
        got = [None]
        dist.recv_object_list(got, 1)
        y.backward(got[0])
    else:
        got = [None]
        dist.recv_object_list(got, 0)
        x = got[0].requires_grad_()
        stage(x).sum().backward()
        dist.send_object_list([x.grad], 0)


def broadcasts(rank):
    """Activations and gradients by broadcasts in a group of two."""
    stage, other = nn.Linear(4, 4), torch.empty(SHAPE)
    if rank == 0:
        y = stage(torch.randn(SHAPE))
        dist.broadcast(y.detach(), 0)
        dist.broadcast(other, 1)
        y.backward(other)
    else:
        dist.broadcast(other, 0)
        x = other.clone().requires_grad_()
        stage(x).sum().backward()
        dist.broadcast(x.grad, 1)


@pytest.mark.parametrize(
    ("body", "says"),
    [(objects, "was in a pickled object"), (broadcasts, "is the result of a collective")],
    ids=["objects", "broadcast"],
)
def test_a_pipeline_without_messages_of_tensors_is_an_error_with_its_line(body, says):
    with pytest.raises(
        RecordError, match=rf"rank 1 starts a forward at .*test_arrivals.py:[0-9]+ from a tensor that {says}"
    ):
        record_ranks(2, body)


def test_data_from_numpy_is_data():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x + torch.from_numpy(np.ones(SHAPE, dtype=np.float32)))

    recording = record_ranks(2, lambda rank: train(rank, Stage()))
    assert_plain(recording)
    assert recording.caveats == ()
    assert text(recording, 0)


@pytest.mark.parametrize(("group", "doubts"), [([0, 1], ["by a collective"]), ([0, -1], [])])
def test_what_the_members_of_another_pipeline_gather_is_no_activation(group, doubts):
    """Tensor parallelism: each member gathers parts of what its own stage has made; -1 is a rank outside."""
    begun = {"event": "forward", "module": 0, "messages": [], "after": [], "first": True, "again": None, "grad": True}
    called = {"event": "collective", "collective": 0, "name": "all_gather", "group_name": "1", "group": group}
    holds = {"form": [], "modules": [], "names": [], "marks": [("F", 0)], "context": []}
    events = [
        begun | {"forward": 0},
        called | holds,
        {"event": "arrived", "arrival": 0, "how": "collective", "collective": 0},
        {"event": "arrival", "forward": 0, "arrivals": [0], "backward": False},
    ]
    logs = [read(rank, [event | {"at": "x.py:1"} for event in events]) for rank in range(2)]
    note_arrivals(logs, logs)
    assert [doubt.what for doubt in logs[0].doubts] == doubts
