"""Runs ``examples/pretrain_gpt.py`` in ranks forked from this process, so that a run takes seconds."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from unittest import mock

from dualpipe.megatron.on_cpu import install_cpu_standins
from dualpipe.testing.launch import launch
from reference.megatron.importing import expected_warnings

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_gpt.py"
SMALL = "--num-layers 4 --hidden-size 32 --seq-length 16 --global-batch-size 8 --micro-batch-size 1 --eval-interval 0 "
SMALL += "--lr-decay-iters 4 --lr-warmup-iters 0 --save-interval 2 "


def _load():
    spec = importlib.util.spec_from_file_location("pretrain_gpt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with expected_warnings(), mock.patch.object(sys, "path", [str(SCRIPT.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


example = _load()


def in_ranks(ranks, options, body, timeout=60.0):
    """Run ``body(args)`` in ``ranks`` ranks, with the arguments of these options; returns the result of rank 0."""

    def rank(context):
        os.environ["WORLD_SIZE"] = str(ranks)
        install_cpu_standins()
        with expected_warnings():
            return body(example.parse_arguments(shlex.split(SMALL + options)))

    return launch(ranks, rank, timeout=timeout, grace=5.0).values()[0]


def pretrain(ranks, options):
    """Run the example and return the digest of all weights."""
    return in_ranks(ranks, options, lambda args: example.pretrain(args))
