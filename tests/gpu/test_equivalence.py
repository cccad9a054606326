"""The comparisons of the CPU suite on a GPU's own kernels.

one GPU      P ranks share it, messages staged through pinned host memory over gloo:   pytest tests/gpu
N GPUs       one rank each, messages over NCCL:    torchrun --nproc-per-node N -m pytest tests/gpu
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.torchrun import compare_ranks

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
GPUS = torch.cuda.device_count()  # asks the driver's management library, so CUDA is not initialised by it

needs_a_gpu = pytest.mark.skipif(
    GPUS == 0,
    reason="no GPU: would have shown that P ranks on one GPU, messages staged through host memory, match the oracle "
    "bitwise on the GPU's kernels",
)
needs_torchrun = pytest.mark.skipif(
    WORLD < 2 or GPUS < WORLD,
    reason=f"torchrun with one GPU per rank, 2 or more, is needed (have {WORLD} ranks, {GPUS} GPUs): would have shown "
    "that ranks over NCCL match the oracle bitwise",
)
once = pytest.mark.skipif(
    WORLD > 1,
    reason="forks ranks of its own, so it runs without torchrun: pytest tests/gpu; shows ranks that share a GPU",
)


@pytest.mark.gpu
@needs_a_gpu
@once
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "ranks"), [("dualpipe", 2), ("dualpipe", 4), ("dualpipe", 8), ("dualpipev", 2)])
def test_ranks_that_share_a_gpu_match_the_oracle_bitwise(name, ranks, dtype):
    command = [sys.executable, "-m", "dualpipe.cli", "verify", "--schedule", name, "-P", str(ranks), "--dtype", dtype]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    result = subprocess.run(
        [*command, "--device", "cuda", "--transport", "staged"], capture_output=True, text=True, timeout=400, env=alone
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "EQUAL" in result.stdout


@pytest.mark.gpu
@needs_torchrun
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "1f1b", "zb1p"])
def test_ranks_over_nccl_match_the_oracle_bitwise(name, dtype):
    if name == "dualpipe" and WORLD % 2:
        pytest.skip(
            f"dualpipe needs an even number of ranks, torchrun started {WORLD}: would have shown that it matches the "
            "oracle bitwise over NCCL; start an even number"
        )
    assert compare_ranks(name, dtype, "nccl") == []
