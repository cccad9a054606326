"""A program written for DeepSeek's package: their names, their conventions, our interpreter.

rank 0   inputs of lane >   labels of lane <
rank 1   inputs of lane <   labels of lane >
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dualpipe import DualPipe
from dualpipe.errors import RuleError
from dualpipe.testing.launch import launch

HIDDEN, CHUNKS = 8, 8


class StoredLinear(torch.autograd.Function):
    """A linear layer as their users write it: it asks the store whether to defer its weight gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        from dualpipe.utils import WeightGradStore

        x, weight = ctx.saved_tensors

        def add():
            found = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
            weight.grad = found if weight.grad is None else weight.grad + found

        if WeightGradStore.enabled:
            DEFERRED.append(1)
            WeightGradStore.put(add)
        else:
            add()
        return gradient @ weight, None


DEFERRED = []


class Custom(nn.Linear):
    def forward(self, x):
        return StoredLinear.apply(x, self.weight)


def stage(number: int) -> nn.Module:
    torch.manual_seed(number)
    return nn.Sequential(Custom(HIDDEN, HIDDEN, bias=False), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))


def loss(output, target):
    return functional.mse_loss(output, target)


def half(tensor, number):
    return tensor.chunk(2)[number]


def run(body, ranks=2):
    return launch(ranks, body, timeout=40).values()


def data():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(CHUNKS * 2, 3, HIDDEN, generator=generator) for _ in range(2)]


def truth(stages, x, labels, chunks):
    model = nn.Sequential(*(stage(number) for number in range(stages)))
    losses, outputs = [], []
    for micro_x, micro_label in zip(x.chunk(chunks), labels.chunk(chunks), strict=True):
        outputs.append(model(micro_x.clone()))
        losses.append(loss(outputs[-1], micro_label))
        losses[-1].backward()
    return torch.stack(losses).detach(), torch.cat(outputs).detach(), model


@pytest.mark.parametrize(("mapping", "late_w"), [(None, "none"), ([1, 0], "tail")])
def test_dualpipe_trains_and_evaluates_as_their_example_does(mapping, late_w):
    import dualpipe

    def body(context):
        dualpipe.set_p2p_tensor_shapes([(2, 3, HIDDEN)])
        dualpipe.set_p2p_tensor_dtype(torch.float32)
        rank = context.rank if mapping is None else mapping[context.rank]
        modules = nn.ModuleList([stage(rank), stage(1 - rank)])
        model = dualpipe.DualPipe(modules, rank_mapping=mapping, late_w=late_w)
        x, labels = data()
        mine, answers = half(x, rank), half(labels, 1 - rank)
        found, outputs = model.step(mine, num_chunks=CHUNKS, criterion=loss, labels=(answers,))
        assert outputs is None
        wanted, _, reference = truth(2, half(x, 1 - rank), answers, CHUNKS // 2)
        assert torch.equal(found, wanted)
        _, _, own = truth(2, mine, half(labels, rank), CHUNKS // 2)
        # module 0 is stage `rank` of the lane that starts at rank 0, whose data is rank 0's
        lane_up = own if rank == 0 else reference
        for mine_p, theirs in zip(modules[0].parameters(), lane_up[rank].parameters(), strict=True):
            assert torch.equal(mine_p.grad, theirs.grad)
        assert DEFERRED
        with torch.no_grad():
            again, outputs = model.step(mine, num_chunks=CHUNKS, criterion=loss, labels=answers, return_outputs=True)
            unlabelled, _ = model.step(mine, num_chunks=CHUNKS, criterion=torch.sum)
            nothing, inferred = model.step(mine, num_chunks=CHUNKS, return_outputs=True)
        _, wanted_outputs, _ = truth(2, half(x, 1 - rank), answers, CHUNKS // 2)
        assert torch.equal(again, wanted)
        assert torch.equal(outputs, wanted_outputs)
        assert torch.equal(unlabelled, torch.stack([part.sum() for part in wanted_outputs.chunk(CHUNKS // 2)]))
        assert nothing is None
        assert torch.equal(inferred, wanted_outputs)
        return True

    assert run(body) == [True, True]


class Overlapping(nn.Sequential):
    """A stage as their example has it."""

    pairs = 0

    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        from dualpipe.utils import run_backward

        outputs0 = module0(*inputs0)
        outputs0 = [outputs0] if isinstance(outputs0, torch.Tensor) else outputs0
        loss0 = None if criterion0 is None else criterion0(*outputs0, *labels0)
        if loss1 is not None:
            loss1.backward()
            loss1.detach_()
        else:
            run_backward(outputs1, output_grads1)
        cls.pairs += 1
        return outputs0, loss0


def test_dualpipev_trains_as_their_example_does_and_overlaps_pairs():
    import dualpipe

    def body(context):
        dualpipe.set_p2p_tensor_shapes([(2, 3, HIDDEN)])
        dualpipe.set_p2p_tensor_dtype(torch.float32)
        modules = nn.ModuleList([Overlapping(*stage(number)) for number in (context.rank, 3 - context.rank)])
        model = dualpipe.DualPipeV(modules)
        assert model.overlapped_forward_backward
        x, labels = data() if context.rank == 0 else (None, None)
        found, _ = model.step(x, num_chunks=CHUNKS, criterion=loss, labels=(labels,))
        wanted, _, reference = truth(4, *data(), CHUNKS)
        program = dualpipe.dualpipev(2, CHUNKS).programs[context.rank]
        assert Overlapping.pairs == sum({"F", "B"} <= {op.kind for op in slot} for slot in program) > 0
        assert (found is None) == (context.rank == 1)
        assert found is None or torch.equal(found, wanted)
        for module, number in zip(modules, (context.rank, 3 - context.rank), strict=True):
            for mine, theirs in zip(module.parameters(), reference[number].parameters(), strict=True):
                assert torch.equal(mine.grad, theirs.grad)
        return True

    assert run(body) == [True, True]


def test_what_is_missing_or_wrong_before_a_step_is_named(monkeypatch):
    import dualpipe
    from dualpipe.runtime import deepseek

    monkeypatch.setattr(deepseek, "_shapes", None)

    def body(context):
        with pytest.raises(ValueError, match="set_p2p_tensor_shapes"):
            dualpipe.DualPipe([stage(0), stage(1)]).step(num_chunks=CHUNKS, criterion=loss)
        with pytest.raises(RuleError, match="a rank holds two modules: got 3"):
            dualpipe.DualPipe([stage(0), stage(1), stage(2)])
        with pytest.raises(RuleError, match=r"each pipeline rank once: got \[0, 0\]"):
            dualpipe.DualPipe([stage(0), stage(1)], rank_mapping=[0, 0])
        with pytest.raises(RuleError, match=r"sequence of shapes: got \(2, 3\)"):
            dualpipe.set_p2p_tensor_shapes((2, 3))
        return True

    assert run(body) == [True, True]


def test_putting_a_gradient_into_the_store_outside_a_split_backward_is_refused():
    import dualpipe

    assert dualpipe.WeightGradStore.enabled is False
    with pytest.raises(RuntimeError, match="enabled"):
        dualpipe.WeightGradStore.put(lambda: None)


def test_only_a_pipeline_that_places_its_modules_can_be_built():
    """Without the modules' places a step would end in an error without a text."""
    with pytest.raises(TypeError, match="held"):
        type("Unplaced", (DualPipe.__base__,), {})([nn.Linear(1, 1)])
