"""The example script: its options, its data, and one run of each kind under torchrun."""

import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from tests.megatron.example import SCRIPT, SMALL, example, in_ranks, pretrain

FOUR = "--train-iters 2 --pipeline-model-parallel-size 2 "


def digits(output):
    """The lines of losses without their times, and the digest."""
    return [line.rpartition(" | ")[0] if "ms" in line else line for line in output.splitlines() if "loss" in line], [
        line for line in output.splitlines() if line.startswith("digest")
    ]


def torchrun(ranks, options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    result = subprocess.run(
        [*command, str(SCRIPT), *SMALL.split(), *options.split()],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.long
def test_under_torchrun_dualpipe_and_1f1b_print_the_same_losses_and_digest():
    options = FOUR + "--eval-interval 1 "
    losses, digest = digits(torchrun(2, options + "--use-dualpipe"))
    assert len(losses) == 4
    assert len(digest) == 1
    assert digits(torchrun(4, options)) == (losses, digest)


DISTRIBUTED = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --clip-grad 0"


@pytest.mark.parametrize(
    "options",
    ["--dropout 0.1", *(pytest.param(each, marks=pytest.mark.long) for each in (DISTRIBUTED, "--num-experts 2"))],
)
def test_dualpipe_prints_the_digest_of_1f1b_at_twice_the_data_parallelism_and_of_another_seed_another(options):
    digest = pretrain(2, f"{FOUR}{options} --use-dualpipe")
    assert digest == pretrain(4, f"{FOUR}{options}")
    assert digest != pretrain(2, f"{FOUR}{options} --use-dualpipe --seed 2")


@pytest.mark.long
def test_dualpipev_prints_the_digest_of_1f1b_on_twice_the_ranks():
    options = "--train-iters 2 --eval-interval 1 --mtp-num-layers 1 --tied-embeddings --dropout 0.1"
    of_v = pretrain(2, f"{options} --pipeline-model-parallel-size 2 --use-dualpipev")
    assert of_v == pretrain(4, f"{options} --pipeline-model-parallel-size 4")


def test_the_samples_of_a_step_are_read_once_each(monkeypatch):
    """Two replicas of four microbatches of one sample: together the step's eight samples, in Megatron's order."""
    text = example.Text(bytes(range(200)), 4, seed=7)
    args = Namespace(micro_batch_size=1, data_parallel_size=2, num_microbatches=4)
    found = []
    for rank in range(2):
        monkeypatch.setattr(example.parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        found.append([int(batch.tokens[0, 0]) for batch in text.microbatches(args, 8, torch.device("cpu"))])
    assert found[0] == [int(text.sample(number)[0]) for number in (8, 10, 12, 14)]
    assert found[1] == [int(text.sample(number)[0]) for number in (9, 11, 13, 15)]


def test_every_epoch_reads_every_sample_once_and_in_another_order():
    text = example.Text(bytes(range(41)), 4, seed=7)
    epochs = [[int(text.sample(number)[0]) for number in range(start, start + 10)] for start in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 40, 4))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--use-dualpipe", "the pipeline size must be even and at least 2"),
        ("--use-dualpipe --pipeline-model-parallel-size 2 --global-batch-size 7", "is 7 microbatches, which is odd"),
    ],
)
def test_settings_that_dualpipe_cannot_train_with_are_refused_before_building(options, error, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        example.parse_arguments([*SMALL.split(), *options.split()])
    assert error in capsys.readouterr().err


def test_replicas_that_differ_have_no_digest():
    def body(args):
        example.parallel_state.initialize_model_parallel(1, 2, create_gloo_process_groups=False)
        example.model_parallel_cuda_manual_seed(1)
        model, _ = example.build(args, "cpu")
        if example.dist.get_rank() == 0:
            next(model[0].parameters()).data += 1
        return example.digest(model)

    with pytest.raises(RuntimeError, match="the replicas of some weights differ"):
        in_ranks(2, f"{FOUR} --use-dualpipe", body)
