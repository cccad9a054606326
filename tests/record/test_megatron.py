"""Recordings of Megatron-core as it is: its own schedules in its own order, with its DDP, and DualPipe within it."""

import importlib.util
import os
import shlex
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch

from dualpipe.megatron.on_cpu import core, install_cpu_standins, install_loop_standins, remove_cpu_standins
from dualpipe.megatron.on_cpu.loop import with_cpu_arguments
from dualpipe.record.child import cuda
from dualpipe.record.child.patches import Patches
from dualpipe.schedule import MESSAGES, B, F
from dualpipe.schedule.generate import dualpipe, dualpipev, one_f_one_b
from dualpipe.testing import record_ranks
from proofs.prove import prove
from reference.megatron.importing import expected_warnings
from tests.megatron.example import SMALL, example
from tests.record.megatron import flat, get_schedule_table, order, p2p_communication, train


def record(ranks, chunks=1, microbatches=4, compare=False, **options):
    def body(rank):
        with expected_warnings():
            train(ranks, chunks, microbatches, **options)

    return record_ranks(ranks, body, timeout=100, stall=20, compare=compare)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "options"),
    [
        (2, 4, {"freed": True, "reduced_early": True}),
        pytest.param(4, 6, {}, marks=pytest.mark.long),
        pytest.param(4, 6, {"batched": True}, marks=pytest.mark.long),
    ],
)
def test_megatrons_1f1b_is_recorded_as_1f1b(ranks, microbatches, options):
    recording = record(ranks, 1, microbatches, compare=True, **options)
    expected = one_f_one_b(ranks, microbatches).only(frozenset({F, B}))
    assert recording.schedule.only(frozenset({F, B})).programs == expected.programs
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert (recording.notes, recording.caveats) == ((), ())
    assert recording.comparison.verdict == "equal", recording.comparison.text()


@pytest.mark.parametrize(
    ("ranks", "microbatches", "options"),
    [
        (2, 4, {"overlapped": True, "reduced_early": True}),
        pytest.param(2, 4, {}, marks=pytest.mark.long),
        pytest.param(4, 8, {"overlapped": True}, marks=pytest.mark.long),
        pytest.param(4, 8, {"freed": True}, marks=pytest.mark.long),
        pytest.param(4, 8, {"batched": True}, marks=pytest.mark.long),
    ],
)
def test_megatrons_interleaved_schedule_is_recorded_in_the_order_of_its_table(ranks, microbatches, options):
    recording = record(ranks, 2, microbatches, compare=True, **options)
    table = [tuple(place) for place in get_schedule_table(microbatches, 2, ranks)]
    for rank in range(ranks):
        assert order(recording.schedule, F, rank) == table
        assert order(recording.schedule, B, rank) == table
    assert recording.schedule.routes == {">": (*range(ranks), *range(ranks))}
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert recording.caveats == ()
    assert recording.comparison.verdict == "equal", recording.comparison.text()


def test_under_the_recorder_only_what_megatron_lacks_is_replaced():
    """The recorder answers the calls for a GPU, and tells those of torch apart; nothing else may answer them."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    modules = [importlib.import_module(name) for name in core._LITERAL_CUDA]
    owners = (torch, torch.cuda, torch.cuda.nvtx, torch.Tensor, torch.nn.Module, torch.distributed, random)
    owners = (*owners, random.CudaRNGStatesTracker)
    patches, norm = Patches(), WrappedTorchNorm.__new__
    with cuda.answer(patches, 2):
        before = [dict(vars(owner)) for owner in owners]
        install_loop_standins()
        try:
            assert [dict(vars(owner)) for owner in owners] == before
            assert all(module.torch is torch for module in modules)
            assert WrappedTorchNorm.__new__ is not norm
            assert with_cpu_arguments(Namespace(distributed_backend="nccl")).distributed_backend == "nccl"
        finally:
            remove_cpu_standins()
            patches.undo()
    assert WrappedTorchNorm.__new__ is norm


def test_tensor_and_sequence_parallel_stages_are_recorded_as_pipelines_side_by_side():
    """Under the recorder the norms still get the mark for the reduction of sequence parallelism."""

    def body(rank):
        with expected_warnings():
            train(2, tensor=2)

    recording = record_ranks(4, body, timeout=100, stall=20, pipeline_ranks=(1, 3), cuda_on_cpu=True)
    assert recording.schedule.only(frozenset({F, B})).programs == one_f_one_b(2, 4).only(frozenset({F, B})).programs
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert recording.caveats == ()
    assert recording.notes[-1].endswith("in the same order, so a proof covers these collectives")


@pytest.mark.long
def test_the_interleaved_schedule_on_two_ranks_with_batches_is_refuted():
    """Issue 1450 of Megatron-LM, in Megatron-core as it is: the previous and the next rank are one, so messages mix.

    Megatron-LM's own training loop refuses this setting.
    """
    recording = record(2, 2, 4, compare=True, batched=True)
    checks = prove(recording.schedule, smt=False).as_json()["checks"]
    assert checks["messages"]["verdict"] == "refuted"
    assert "rank 1 expects the activation of microbatch 2 of lane > (stage 0 to stage 1)" in checks["messages"]["story"]
    assert recording.comparison.verdict == "different"
    assert "microbatch 2 does not take what stage 0 returns for it, but the gradient of the input of stage 2" in (
        recording.comparison.text()
    )


@pytest.mark.long
def test_a_copy_of_megatron_whose_ranks_all_send_first_is_refuted(tmp_path):
    """Issue 5100 of Megatron-LM: an exchange around a ring in one order on all ranks; odd ranks should receive first.

    Over gloo the program ends.  On NCCL every rank's send can block the receive behind it.
    """
    even = "    if group.rank() % 2 == 0:\n"
    source = Path(p2p_communication.__file__).read_text()
    assert source.count(even) == 1
    copy = tmp_path / "p2p_communication.py"
    copy.write_text(source.replace(even, "    if True:\n"))
    spec = importlib.util.spec_from_file_location(p2p_communication.__name__, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.object(p2p_communication, "_p2p_ops", module._p2p_ops):
        recording = record(4, 2, 8)
    check = prove(recording.schedule, smt=False).as_json()["checks"]["deadlock"]
    assert {name: model["verdict"] for name, model in check["models"].items()} == {
        "blocking": "refuted",
        "eager": "proved",
        "edge": "proved",
    }
    assert "wait for each other and none of them can go on" in check["story"]
    assert f"{copy}:" in prove(recording.schedule, smt=False).text()


@pytest.mark.long
def test_the_interleaved_schedule_frees_outputs_whose_send_it_has_not_waited_for():
    """With overlap_p2p_comm and deallocate_pipeline_outputs: freed before the next forward, waited for after it."""
    checks = prove(record(2, 2, 4, overlapped=True, freed=True).schedule, smt=False).as_json()["checks"]
    assert [name for name, check in checks.items() if check["verdict"] == "refuted"] == ["buffers"]
    assert checks["buffers"]["story"].startswith("rank 0 frees or resizes the tensor of the activation of microbatch 2")


@pytest.mark.parametrize(
    ("ranks", "planned"),
    [(2, dualpipe), (2, dualpipev), pytest.param(4, dualpipe, marks=pytest.mark.long)],
)
def test_dualpipe_in_megatron_is_recorded_as_dualpipe(ranks, planned):
    """Op by op; Megatron's messages are posted one by one, and of an F&B pair the forward runs first."""

    def body(rank):
        os.environ["WORLD_SIZE"] = str(ranks)
        install_cpu_standins()
        options = f"{SMALL} --train-iters 1 --use-{planned.__name__} --pipeline-model-parallel-size {ranks}"
        with expected_warnings():
            example.pretrain(example.parse_arguments(shlex.split(options)))

    recording = record_ranks(ranks, body, timeout=100, stall=20, compare=True)
    expected = planned(ranks, 8)
    for kinds in ({F}, {B}, MESSAGES):
        recorded, wanted = (of.only(frozenset(kinds)).programs for of in (recording.schedule, expected))
        assert flat(recorded) == flat(wanted)
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert recording.caveats == ("4 message ends are left out as control data",)
    assert recording.comparison.verdict == "equal", recording.comparison.text()
