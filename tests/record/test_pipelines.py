"""A job of several pipelines: each is recorded by itself, and all are checked."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dualpipe.record import RecordError, assemble_all
from dualpipe.record.events import read
from dualpipe.record.pipelines import parse, pipelines
from dualpipe.testing import record_ranks
from proofs.prove import prove
from proofs.verdict import Refuted
from tests.record.logs import Rank, lines
from tests.record.run import command, forked, python
from tests.record.two_ranks import SHAPE, receive, train

PLAIN = [
    "0F0> 0F1> 0SF0> 0SF1> 0RB0> 0B0>+0W0> 0RB1> 0B1>+0W1>",
    "1RF0> 1F0> 1B0>+1W0> 1RF1> 1F1> 1B1>+1W1> 1SB0> 1SB1>",
]


def job(ranks: int, *pairs: tuple[int, int]) -> list[Rank]:
    """Pairs of ranks that train one microbatch each; a rank of two pairs is the first in one and the last in one."""
    logs = [Rank(rank, ranks) for rank in range(ranks)]
    for first, last in pairs:
        one, two = logs[first], logs[last]
        f = one.forward(module=0)
        one.send(last, "F", f)
        g = two.forward(two.receive(first), module=1)
        two.backward(g)
        two.send(first, "B", g)
        one.backward(f, one.receive(last))
    return logs


def assembled(logs: list[Rank], ranks=None, codes=()):
    for log in logs:
        log.end()
    return assemble_all([read(number, log.events) for number, log in enumerate(logs)], ranks=ranks, codes=codes)


def test_replicas_have_no_rank_in_common_and_lanes_do():
    replicas = assembled(job(4, (0, 2), (1, 3)))
    assert [recording.pipeline_ranks for recording in replicas] == [(0, 2), (1, 3)]
    for recording in replicas:
        assert recording.schedule.routes == {">": (0, 1)}
        assert lines(recording) == ["0F0> 0SF0> 0RB0> 0B0>+0W0>", "1RF0> 1F0> 1B0>+1W0> 1SB0>"]
        assert recording.notes[0].startswith("ranks 0 to 1 of this file are the ranks ")
    (lanes,) = assembled(job(2, (0, 1), (1, 0)))
    assert lanes.schedule.routes == {">": (0, 1), "<": (1, 0)}
    assert (lanes.pipeline_ranks, lanes.notes) == ((), ())


def test_the_chosen_pipeline_is_recorded_alone():
    (recording,) = assembled(job(4, (0, 2), (1, 3)), ranks=parse("1,3"))
    assert recording.pipeline_ranks == (1, 3)
    assert recording.as_json()["pipeline_ranks"] == [1, 3]
    for text, error in (
        ("0 4", "the job has the ranks 0 to 3"),
        ("0 0", "got '0 0'"),
        ("", "got ''"),
        ("a", "got 'a'"),
    ):
        with pytest.raises(RecordError, match=error):
            assembled(job(4, (0, 2), (1, 3)), ranks=parse(text))


def test_before_any_message_has_arrived_the_process_groups_show_the_pipelines():
    logs = [Rank(rank, 4) for rank in range(4)]
    for rank, log in enumerate(logs):
        log.receive((rank + 2) % 4)
        log.events[-2]["messages"][0]["group"] = [rank % 2, rank % 2 + 2]
    assert pipelines([read(number, log.events) for number, log in enumerate(logs)]) == [(0, 2), (1, 3)]


def test_ranks_that_hang_early_are_with_those_that_they_wait_for():
    logs = job(4, (2, 3))
    logs[0].receive(1)
    logs[1].receive(0)
    logs[1].receive(2)
    assert pipelines([read(number, log.events) for number, log in enumerate(logs)]) == []
    logs = job(4, (0, 1), (3, 2))
    for rank, peer in ((1, 2), (2, 1)):
        logs[rank].receive(peer)
    assert pipelines([read(number, log.events) for number, log in enumerate(logs)]) == []
    logs = job(4)
    for rank, peer in enumerate((1, 0, 3, 2)):
        logs[rank].receive(peer)
    assert pipelines([read(number, log.events) for number, log in enumerate(logs)]) == []


def test_a_message_to_another_pipeline_that_is_never_matched_is_a_caveat():
    logs = job(4, (0, 2), (1, 3))
    logs[0].receive(3)
    first, second = assembled(logs)
    assert first.caveats == (
        f"rank 0 of the job has a receive from rank 3, of another pipeline, at rank0.py:{len(logs[0].events) - 3} "
        "that was never matched",
    )
    assert "1 message with ranks of other pipelines is left out" in first.notes[1]
    assert second.caveats == ()


def test_a_rank_that_fails_before_it_is_part_of_a_pipeline_is_a_caveat_of_all():
    first, second = assembled(job(5, (0, 2), (1, 3)), codes=(0, 0, 0, 0, 1))
    assert first.caveats == second.caveats == ("ranks 4 of the job failed before they were part of a pipeline",)
    assert not first.schedule.failures
    first, second = assembled(job(5, (0, 2), (1, 3)), codes=(0, 0, 0, 3, 0))
    assert (first.schedule.failures, first.caveats) == ((), ())
    assert str(second.schedule.failures[0]) == "rank 1 ended with exit code 3 after 1SB0>@0"


def test_two_replicas_are_recorded_and_a_test_chooses_one():
    with pytest.raises(RecordError, match="a recording covers one pipeline: got those of ranks 0 2 and 1 3; choose"):
        forked(4, "data_parallel.py")
    recording = forked(4, "data_parallel.py", "swapped", pipeline_ranks=(0, 2))
    assert lines(recording) == [f"{PLAIN[0]} 0RG> 0RG>", f"{PLAIN[1]} 1RG> 1RG>"]
    assert prove(recording.schedule).verdict == "proved"


def in_ddp(rank):
    """Two pipelines of two ranks with the same data; the wrapper exchanges its buckets in the forward that follows."""
    torch.manual_seed(rank % 2)
    groups = [dist.new_group([stage, stage + 2]) for stage in range(2)]
    stage = nn.parallel.DistributedDataParallel(nn.Linear(4, 4), process_group=groups[rank % 2])
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    if rank % 2 == 0:
        y = stage(torch.randn(SHAPE))
        dist.send(y.detach(), rank + 1)
        y.backward(receive(rank + 1))
    else:
        x = receive(rank - 1).requires_grad_()
        stage(x).square().mean().backward()
        dist.send(x.grad, rank - 1)
    optimizer.step()


def test_a_stage_in_ddp_is_run_plainly_without_the_other_pipelines():
    comparison = record_ranks(4, in_ddp, compare=True, pipeline_ranks=(0, 1), timeout=30).comparison
    assert comparison.verdict == "equal", comparison.text()


def sharded(rank):
    """A stage of ``fully_shard`` on each of two ranks."""
    torch.manual_seed(rank)
    stage = nn.Sequential(nn.Linear(4, 4))
    fully_shard(stage, mesh=DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("pp", "dp"))["dp"])
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for is_last in (False, True):
        stage.set_requires_gradient_sync(is_last)
        train(rank, stage, 1)
    optimizer.step()


@pytest.mark.long
def test_a_stage_whose_weights_are_sharded_is_not_run_plainly_and_its_w_is_with_its_b():
    recording = record_ranks(2, sharded, compare=True)
    assert recording.comparison.verdict == "unknown"
    reason = "microbatch 0 cannot be run plainly: its weights are sharded over ranks (DTensor, as with fully_shard)"
    assert [chunk.unknown[0] for chunk in recording.comparison.chunks] == [reason] * 2
    assert "4 backwards have weight gradients that could not be observed" in recording.caveats
    assert prove(recording.schedule, smt=False).verdict == "proved"


@pytest.mark.parametrize(("orders", "verdict"), [(("ab", "ab"), "proved"), (("ab", "ba"), "refuted")])
def test_replicas_that_reduce_in_different_orders_are_refuted(orders, verdict):
    logs = job(4, (0, 2), (1, 3))
    for rank, order in enumerate(orders):
        for count, name in enumerate(order):
            logs[rank].reduce(count, name, [0, 1])
    first, second = assembled(logs)
    reports = [prove(recording.schedule, smt=False) for recording in (first, second)]
    assert [report.verdict for report in reports] == [verdict] * 2
    if verdict == "refuted":
        assert all(not isinstance(check.verdict, Refuted) for report in reports for check in report.checks.values())
        assert str(second.schedule.failures[0]) == (
            "rank 0 calls all_reduce on the gradient of b at rank1.py:9 as collective 1 of the ranks 0 1 of the job, "
            "where rank 0 of the job calls all_reduce on the gradient of a at rank0.py:9"
        )


@pytest.mark.long
def test_the_command_records_and_checks_every_pipeline(tmp_path):
    file = tmp_path / "theirs.txt"
    words = ["-P", 4, "--prove", "-o", file, *python("data_parallel.py", "swapped")]
    result = command(*words)
    assert result.returncode == 1, result.stderr
    assert "recorded, ranks 0 2 on 2 ranks: proved" in result.stdout
    assert "recorded, ranks 1 3 on 2 ranks: refuted" in result.stdout
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["theirs-2.txt", "theirs.txt"]
    result = command("-P", 4, "--prove", "--json", *python("data_parallel.py", "swapped"))
    shown = json.loads(result.stdout)
    assert [each["pipeline_ranks"] for each in shown["pipelines"]] == [[0, 2], [1, 3]]
    assert [each["proof"]["verdict"] for each in shown["pipelines"]] == ["proved", "refuted"]
    assert shown["proof"] == shown["pipelines"][0]["proof"]


def tensor_parallel(*orders: str) -> list[Rank]:
    """Two pipelines of two ranks; before the forward of its last stage rank 2 or 3 receives (r) and reduces (a)."""
    logs = [Rank(rank, 4) for rank in range(4)]
    for first, last, order in zip((0, 1), (2, 3), orders, strict=True):
        one, two = logs[first], logs[last]
        f, got = one.forward(module=0), []
        one.send(last, "F", f)
        early = two.receive(first)
        for what in order:
            if what == "r":
                got.append(two.receive(first))
            else:
                two.reduce(0, "", [2, 3])
        one.send(last, "F", f)
        g = two.forward(early, *got, module=1)
        two.backward(g)
        two.send(first, "B", g)
        one.backward(f, one.receive(last))
    return logs


@pytest.mark.parametrize(("orders", "alike"), [(("ar", "ar"), True), (("ar", "ra"), False)])
def test_a_proof_covers_shared_collectives_only_if_the_pipelines_run_in_step(orders, alike):
    for recording, (rank, what), (other, its) in zip(
        assembled(tensor_parallel(*orders)),
        [(2, "calls all_reduce"), (3, "posts a receive")],
        [(3, "posts a receive"), (2, "calls all_reduce")],
        strict=True,
    ):
        assert not recording.schedule.failures
        assert prove(recording.schedule, smt=False).verdict == "proved"
        if alike:
            assert recording.caveats == ()
            assert recording.notes[-1].endswith("in the same order, so a proof covers these collectives")
        else:
            (caveat,) = recording.caveats
            assert caveat.startswith("the order of the collectives that it shares with other pipelines is not proved: ")
            here, there = f"{what} at rank{rank}.py:2", f"{its} at rank{other}.py:2"
            assert caveat.endswith(f": rank {rank} of the job {here}, where rank {other} of the job {there}")


@pytest.mark.parametrize(("early", "verdict"), [(False, "proved"), (True, "refuted")])
def test_a_collective_of_several_pipelines_joins_the_ranks_of_each(early, verdict):
    """As the norm of all gradients with tensor parallelism: in each pipeline its ranks wait for each other."""
    logs = [Rank(rank, 4) for rank in range(4)]
    for one, two, last in zip(logs[:2], logs[2:], (2, 3), strict=True):
        f = one.forward(module=0)
        if early:
            one.reduce(0, "", [0, 1, 2, 3])
        one.send(last, "F", f)
        g = two.forward(two.receive(last - 2), module=1)
        two.backward(g)
        two.send(last - 2, "B", g)
        one.backward(f, one.receive(last))
        for each in (two,) if early else (one, two):
            each.reduce(0, "", [0, 1, 2, 3])
    for recording in assembled(logs):
        assert recording.schedule.groups == ((0, 1),)
        assert recording.caveats == ()
        deadlock = prove(recording.schedule, smt=False).checks["deadlock"].verdict
        assert isinstance(deadlock, Refuted) == (verdict == "refuted")
