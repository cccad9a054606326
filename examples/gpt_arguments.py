"""The command line of ``pretrain_gpt.py``, with Megatron's option names where Megatron has the option."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dualpipe.errors import RuleError
from dualpipe.megatron import add_dualpipe_args, validate_dualpipe_args


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a GPT on the bytes of a text.")
    add = parser.add_argument
    add("--data", type=Path, help="a text file; by default the help topics that come with Python")
    add("--save", type=Path, help="a folder for checkpoints")
    add("--load", type=Path, help="resume from the newest complete checkpoint in this folder, if there is one")
    add("--save-interval", type=int, default=10, help="iterations between checkpoints; there is also one at the end")
    add("--train-iters", type=int, default=20)
    add("--eval-interval", type=int, default=10)
    add("--eval-iters", type=int, default=2)
    add("--global-batch-size", type=int, default=32)
    add("--micro-batch-size", type=int, default=2)
    add("--num-layers", type=int, default=8)
    add("--hidden-size", type=int, default=64)
    add("--num-attention-heads", type=int, default=4)
    add("--seq-length", type=int, default=64)
    add("--num-experts", type=int, help="experts in each layer; by default the model is dense")
    add("--mtp-num-layers", type=int, help="multi-token prediction layers; by default there are none")
    add("--tied-embeddings", action="store_true", help="use the embedding as the output layer, too")
    add("--pipeline-model-parallel-layout", help="the layers of each stage, such as Et|tt|tt|ttmL; by default even")
    add("--dropout", type=float, default=0.0)
    add("--lr", type=float, default=3e-3)
    add("--min-lr", type=float, default=3e-4)
    add("--lr-decay-iters", type=int, help="by default the number of training iterations")
    add("--lr-warmup-iters", type=int, help="by default a fifth of --lr-decay-iters")
    add("--weight-decay", type=float, default=0.1)
    add("--clip-grad", type=float, default=1.0, help="the norm to clip gradients to; 0 for no clipping")
    add("--pipeline-model-parallel-size", type=int, default=1)
    add("--tensor-model-parallel-size", type=int, default=1)
    add("--sequence-parallel", action="store_true")
    add("--bf16", action="store_true")
    add("--use-distributed-optimizer", action="store_true")
    add("--overlap-grad-reduce", action="store_true")
    add("--seed", type=int, default=1234)
    add("--deterministic", action="store_true", help="give the same bits at every run, also on a GPU; slower")
    add("--timeout-minutes", type=float, default=10.0, help="how long a message or a collective may take")
    add_dualpipe_args(parser)  # DualPipe 1: the flag
    args = parser.parse_args(arguments)
    world = int(os.environ["WORLD_SIZE"])
    args.data_parallel_size = world // (args.pipeline_model_parallel_size * args.tensor_model_parallel_size)
    try:
        validate_dualpipe_args(args)
    except RuleError as error:
        parser.error(str(error))
    args.num_microbatches, rest = divmod(args.global_batch_size, args.micro_batch_size * args.data_parallel_size)
    if rest:
        parser.error(
            f"a global batch must be a whole number of micro-batches on each of {args.data_parallel_size} replicas: "
            f"got {args.global_batch_size} samples and --micro-batch-size {args.micro_batch_size}"
        )
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters
    if args.lr_warmup_iters is None:
        args.lr_warmup_iters = args.lr_decay_iters // 5
    if not 0 <= args.lr_warmup_iters < args.lr_decay_iters:
        parser.error(f"warm-up must end before decay: got {args.lr_warmup_iters} and {args.lr_decay_iters} iterations")
    return args
