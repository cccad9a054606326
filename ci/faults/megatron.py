"""Faults of the Megatron drop-in in what a rank holds and in the split of its layers."""

from ci.faults.fault import fault

GROUPS, LAYERS, MODEL, OPTIMIZER, RANDOM = (
    f"dualpipe/megatron/{name}.py" for name in ("groups", "layers", "model", "optimizer", "random_streams")
)
WEIGHTGRAD = "dualpipe/runtime/weightgrad.py"
ACCUMULATE = "            torch.autograd.backward(complete, [sums.pop(_sum_of(entry.run, p)) for p in complete])\n"

FAULTS = (
    fault(
        13,
        "Megatron: W adds to the gradient past the data-parallel hooks",
        WEIGHTGRAD,
        "                run_backward(tuple(complete), tuple(sums))\n",
        "                for leaf, gradient in zip(complete, sums):\n"
        "                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient\n",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient of .*weight",
    ),
    fault(
        30,
        "Megatron: a deferred weight gradient overwrites the accumulated one",
        LAYERS,
        "        dy, whole = dy.reshape(-1, dy.shape[-1]), self._whole(x)",
        "        self.weight.main_grad.zero_()  # type: ignore[attr-defined]\n"
        "        dy, whole = dy.reshape(-1, dy.shape[-1]), self._whole(x)",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient of .*weight",
    ),
    fault(
        35,
        "Megatron: no layer defers its weight gradient to W",
        LAYERS,
        "    if args or torch.compiler.is_compiling():\n",
        "    if args or True:\n",
        check="tests",
        rule="test",
        says="test_b_leaves_no_weight_gradient_and_w_gives_megatrons_bits.*after_b",
    ),
    fault(
        15,
        "Megatron: the replicas of a stage are not reduced together",
        GROUPS,
        "groups = {kind: made[tuple(up[kind] + down[kind])] for kind in KINDS}",
        "groups = {kind: getattr(collection, kind) for kind in KINDS}",
        check="trial, Megatron",
        rule="run",
        says="gpt-P2, DualPipe: .*differs between ranks",
    ),
    fault(
        15,
        "Megatron: the replicas of a stage start with different weights",
        MODEL,
        "        dist.broadcast(tensor.data, src=source, group=groups.pair)",
        "        pass",
        check="trial, Megatron",
        rule="run",
        says="gpt-P2, DualPipe: .*differs between ranks",
    ),
    fault(
        16,
        "Megatron: the gradient norm counts both replicas of a stage",
        MODEL,
        "        if not ddp_config.use_distributed_optimizer:\n            _mark_shared(module, chunk)\n",
        "",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient norm",
    ),
    fault(
        17,
        "Megatron: the gradient norm of one stage only",
        OPTIMIZER,
        '"pp": own.pp, "intra_dist_opt": dist.group.WORLD}',
        '"pp": own.pp, "mp": own.tp, "intra_dist_opt": dist.group.WORLD}',
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient norm",
    ),
    fault(
        26,
        "Megatron: dropout depends on the order in which a rank runs its chunks",
        RANDOM,
        "        restore(self.states)\n        try:",
        "        try:",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2-dropout-overlapped, DualPipe: .*first step 0",
    ),
    fault(
        28,
        "Megatron: messages on the default group",
        MODEL,
        "return ProcessGroupTransport(groups.pipeline, ",
        "return ProcessGroupTransport(dist.group.WORLD, ",
        check="trial, Megatron",
        rule="run",
        says="gpt-P4-data-parallel-2, DualPipe: .*a schedule must run on as many processes as it has ranks",
    ),
    fault(
        37,
        "Megatron: the mirror chunk numbered as if it were at rank r",
        GROUPS,
        '        "pp": Position(stage, own.pp.size()),\n',
        "",
        check="trial, Megatron",
        rule="run",
        says="gpt-P2, DualPipe: .*whose first layer is",
    ),
    fault(
        37,
        "Megatron: the mirror chunk built while global state says rank r",
        MODEL,
        "        with at_stage(chunk.stage):\n",
        "        with nullcontext():\n",
        check="tests",
        rule="test",
        says="test_a_provider_reads_the_stage_that_it_builds_from_global_state",
    ),
    fault(
        0,
        "Megatron: both replicas of a stage are saved as the main one",
        MODEL,
        '        metadata = {**(metadata or {}), "dp_cp_group": collection.dp_cp}\n',
        "",
        check="tests",
        rule="test",
        says="test_resumed_training_equals_uninterrupted_training_bitwise.*Invalid access pattern for ShardedTensor",
    ),
)
