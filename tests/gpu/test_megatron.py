"""The Megatron drop-in on GPUs, over NCCL: the example with DualPipe and with Megatron's own 1F1B.

2 GPUs    DualPipe, pipeline 2, one replica of the data          pytest tests/gpu/test_megatron.py
4 GPUs    1F1B, pipeline 2, two replicas of half the data each
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count()
SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_gpt.py"
OPTIONS = "--pipeline-model-parallel-size 2 --train-iters 10 --eval-interval 5 --deterministic"

needs_two_gpus = pytest.mark.skipif(
    GPUS < 2,
    reason=f"needs 2 GPUs, has {GPUS}: would have shown that the drop-in trains over NCCL, and resumes bitwise",
)
needs_four_gpus = pytest.mark.skipif(
    GPUS < 4,
    reason=f"needs 4 GPUs, has {GPUS}: would have shown that DualPipe over NCCL gives the weights of Megatron's 1F1B",
)


def pretrain(ranks: int, *options: str) -> tuple[list[float], str]:
    """The losses that the example prints, and the digest of its weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    outer = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    alone = {key: value for key, value in os.environ.items() if key not in outer}
    result = subprocess.run(
        [*command, str(SCRIPT), *OPTIONS.split(), *options], capture_output=True, text=True, timeout=500, env=alone
    )
    assert result.returncode == 0, result.stderr
    (digest,) = re.findall(r"^digest (\w+)$", result.stdout, re.MULTILINE)
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)], digest


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("options", [[], ["--bf16", "--overlap-grad-reduce"], ["--num-experts", "4"]])
def test_training_over_nccl_learns_and_resumes_where_it_stopped(tmp_path, options):
    losses, whole = pretrain(2, "--use-dualpipe", *options, "--save", str(tmp_path), "--save-interval", "5")
    assert losses[-1] < losses[0]
    for left in tmp_path.glob("iter_0000010"):
        left.rename(tmp_path / "finished")
    assert pretrain(2, "--use-dualpipe", *options, "--load", str(tmp_path))[1] == whole


@pytest.mark.gpu
@needs_four_gpus
def test_dualpipe_over_nccl_gives_the_weights_of_1f1b_at_twice_the_data_parallelism():
    assert pretrain(2, "--use-dualpipe") == pretrain(4)
