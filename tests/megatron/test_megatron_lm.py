"""Megatron-LM's own ``pretrain_gpt.py``, unchanged, trains on the CPU with DualPipe as with 1F1B, and is recorded.

These tests need a clone of Megatron-LM, whose folder ``MEGATRON_LM`` names (see CONTRIBUTING.md), and the packages that
its loop imports.  test_launch.py runs the launcher on a small stand-in for the loop.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dualpipe.schedule import MESSAGES, B, F
from dualpipe.schedule.generate import dualpipe, one_f_one_b
from dualpipe.schedule.text import loads
from tests.record.megatron import flat, get_schedule_table, order

FOLDER = os.environ.get("MEGATRON_LM")
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint is read in one process
    pytest.mark.long,
    pytest.mark.skipif(
        not FOLDER, reason="MEGATRON_LM names no clone of Megatron-LM; would train its pretrain_gpt.py with DualPipe"
    ),
]
OPTIONS = shlex.split("""
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --position-embedding-type rope --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --micro-batch-size 1 --global-batch-size 8 --train-iters 4 --lr 1e-3 --lr-decay-style constant
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --log-interval 1 --eval-interval 2 --eval-iters 2
    --ckpt-format torch_dist --save-interval 2
""")
DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
RECOMPUTED = (
    *DROPOUT,
    *shlex.split("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
)
LOSS = re.compile(r"lm loss(?: value)?: (\S+)")


def launch(clone: str | Path | None = FOLDER) -> list[str]:
    """The module and the arguments that run a clone's script on the CPU."""
    return ["-m", "dualpipe.megatron.launch", "--on-cpu", f"{clone}/pretrain_gpt.py", *OPTIONS]


def environment(clone: str | Path | None = FOLDER) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def pretrain(ranks: int, save: Path, *options: str) -> list[float]:
    """Run the script; returns the losses of training and of the evaluations."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [*launch(), "--save", str(save), *options]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-5000:]
    return [float(loss) for loss in LOSS.findall(run.stdout + run.stderr)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights and the optimizer's state in a checkpoint."""
    reader = dcp.FileSystemReader(folder / "iter_0000004")
    found = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in found.items() if hasattr(e, "size")}
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert state
    return state


def assert_equal(one: Path, other: Path) -> None:
    """The checkpoints have bitwise equal tensors under the same names."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(("flag", "stages"), [("--use-dualpipe", 2), ("--use-dualpipev", 4)])
def test_the_unchanged_script_trains_bitwise_as_with_1f1b(flag, stages, tmp_path):
    ours = pretrain(2, tmp_path / "ours", flag, "--pipeline-model-parallel-size", "2")
    own = pretrain(4, tmp_path / "own", "--pipeline-model-parallel-size", str(stages))
    assert len(ours) == len(own) > 4
    assert ours == pytest.approx(own, rel=1e-6)  # the loop adds losses of data-parallel ranks up in another order
    assert_equal(tmp_path / "ours", tmp_path / "own")


@pytest.mark.parametrize("flag", ["--use-dualpipe", "--use-dualpipev"])
def test_the_unchanged_script_resumes_bitwise_with_dropout(flag, tmp_path):
    options = [flag, "--pipeline-model-parallel-size", "2", *DROPOUT]
    pretrain(2, tmp_path / "whole", *options)
    (tmp_path / "whole" / "latest_checkpointed_iteration.txt").write_text("2")
    pretrain(2, tmp_path / "resumed", *options, "--load", str(tmp_path / "whole"))
    assert_equal(tmp_path / "whole", tmp_path / "resumed")


def record(folder: Path, ranks: int, *options: str, clone: str | Path | None = FOLDER) -> tuple[Any, dict[str, Any]]:
    """Record two steps of the script, prove the first one and compare it; returns its schedule and the report."""
    command = [sys.executable, "-m", "dualpipe", "record", "-P", str(ranks), "-o", str(folder / "theirs.txt")]
    command += ["--prove", "--compare", "--json", "--timeout", "280", "--", sys.executable, *launch(clone)]
    command += ["--pipeline-model-parallel-size", str(ranks), "--train-iters", "2", "--eval-iters", "0", *options]
    run = subprocess.run(command, env=environment(clone), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode in (0, 1, 3), run.stdout[-2000:] + run.stderr[-5000:]
    return loads((folder / "theirs.txt").read_text()), json.loads(run.stdout)


@pytest.mark.parametrize(("options", "planned"), [((), one_f_one_b), (("--use-dualpipe", *RECOMPUTED), dualpipe)])
def test_the_unchanged_script_is_recorded_and_proved(options, planned, tmp_path):
    schedule, report = record(tmp_path, 2, *options)
    expected = planned(2, 8)
    for kinds in (frozenset({F}), frozenset({B}), MESSAGES):
        assert flat(schedule.only(kinds).programs) == flat(expected.only(kinds).programs)
    assert report["proof"]["verdict"] == "proved"
    assert report["comparison"]["verdict"] == "equal"


def test_the_unchanged_script_is_recorded_with_interleaving_which_frees_outputs_too_early(tmp_path):
    """Its order is that of Megatron's table.  It frees an output before it waits for the send of this output."""
    schedule, report = record(tmp_path, 2, "--num-virtual-stages-per-pipeline-rank", "2")
    table = [tuple(place) for place in get_schedule_table(8, 2, 2)]
    assert [order(schedule, kind, rank) for kind in (F, B) for rank in range(2)] == [table] * 4
    refuted = [name for name, check in report["proof"]["checks"].items() if check["verdict"] == "refuted"]
    assert refuted == ["buffers"]
    assert report["comparison"]["verdict"] == "equal"


@pytest.mark.parametrize(("options", "planned"), [("--sequence-parallel", one_f_one_b), ("--use-dualpipe", dualpipe)])
def test_the_unchanged_script_is_recorded_with_tensor_parallelism(options, planned, tmp_path, monkeypatch):
    """Both pipelines, of the first and of the second members of the tensor-parallel groups."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-LM asks for it, as on GPUs
    options = f"--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 {options}".split()
    schedule, report = record(tmp_path, 4, *options)
    expected = planned(2, 8)
    for kinds in (frozenset({F}), frozenset({B}), MESSAGES):
        assert flat(schedule.only(kinds).programs) == flat(expected.only(kinds).programs)
    assert [each["pipeline_ranks"] for each in report["pipelines"]] == [[0, 2], [1, 3]]
    assert [each["proof"]["verdict"] for each in report["pipelines"]] == ["proved", "proved"]


P2P = "megatron/core/pipeline_parallel/p2p_communication.py"
SIZE = "args.pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("file", "old", "new", "ranks", "options", "check", "verdict"),
    [
        # issue 5100: in an exchange around a ring all ranks send first
        (P2P, "if group.rank() % 2 == 0:", "if True:", 4, "", "deadlock", "equal"),
        # issue 1450: a batch has two messages between the same two ranks, which the script's own check refuses
        (
            *("megatron/training/arguments.py", f"{SIZE} > 2", f"{SIZE} > 1"),
            *(2, "--no-overlap-p2p-communication", "messages", "different"),
        ),
    ],
)
def test_known_faults_planted_in_a_copy_are_refuted_with_the_line(
    file, old, new, ranks, options, check, verdict, tmp_path
):
    clone = tmp_path / "clone"
    shutil.copytree(FOLDER, clone, ignore=shutil.ignore_patterns(".git", "docs", "images", "tests"))
    source = (clone / file).read_text()
    assert source.count(old) == 1
    (clone / file).write_text(source.replace(old, new))
    options = f"--num-layers {2 * ranks} --num-virtual-stages-per-pipeline-rank 2 {options}".split()
    _, report = record(tmp_path, ranks, *options, clone=clone)
    found = report["proof"]["checks"][check]
    assert found["verdict"] == "refuted"
    assert f"{clone}/{P2P}:" in found["story"]
    assert report["comparison"]["verdict"] == verdict
