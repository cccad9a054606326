"""Faults of the Megatron drop-in in a training step: forwards and backwards, losses, finalizing gradients."""

from ci.faults.fault import fault

COMPUTATION, LOSSES, SCHEDULE = (f"dualpipe/megatron/{name}.py" for name in ("computation", "losses", "schedule"))

FAULTS = (
    fault(
        18,
        "Megatron: gradients rescaled at each accumulation",
        COMPUTATION,
        "            if op.kind is W:\n",
        "            if op.kind is W:\n                self.model[op.lane, op.stage][0].scale_gradients(0.5)\n",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient of",
    ),
    fault(
        19,
        "Megatron: gradients not normalised by the microbatches",
        COMPUTATION,
        "                self.schedule.microbatches[op.lane],  # each lane",
        "                1,  # each lane",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient of",
    ),
    fault(
        20,
        "Megatron: gradients normalised by the microbatches of both lanes",
        COMPUTATION,
        "                self.schedule.microbatches[op.lane],  # each lane",
        "                sum(self.schedule.microbatches.values()),  # each lane",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient of",
    ),
    fault(
        21,
        "Megatron: gradients cleared in mid-accumulation",
        COMPUTATION,
        "        with at_stage(op.stage, self.schedule.stages), self.synchronising(op):",
        "        if op.kind is B and op.mb == 1:\n"
        "            for parameter in self.model[op.lane, op.stage][0].parameters():\n"
        "                parameter.main_grad.zero_()\n"
        "        with at_stage(op.stage, self.schedule.stages), self.synchronising(op):",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient of",
    ),
    fault(
        36,
        "Megatron: an output is freed before it is sent",
        COMPUTATION,
        "            return (output,)\n",
        "            output.data = output.data.new_empty(1)\n            return (output,)\n",
        check="trial, Megatron",
        rule="run",
        says="gpt-P2, DualPipe: .*sends .1. float32 where the boundary is ",
    ),
    fault(
        37,
        "Megatron: the mirror chunk runs while global state says rank r",
        COMPUTATION,
        "        with setup.drawing(), at_stage(op.stage, self.schedule.stages):\n",
        "        with setup.drawing():\n",
        check="tests",
        rule="test",
        says="test_a_forward_step_reads_the_stage_that_it_runs_from_global_state",
    ),
    fault(
        22,
        "Megatron: the losses of lane < lost on the way to the last rank",
        LOSSES,
        "if rank == last else _receive(lane, rank, transport, device))",
        "if rank == last else _receive(lane, rank, transport, device)[:0])",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*loss of microbatch . of replica 1 is missing",
    ),
    fault(
        22,
        "Megatron: the losses of lane < stay on the first rank",
        LOSSES,
        "            _send(collected.get(lane, []), lane, last, transport, device)\n",
        "            _send([], lane, last, transport, device)\n            found.append(collected.get(lane, []))\n",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*loss of microbatch . of replica 1 is missing",
    ),
    fault(
        27,
        "Megatron: on the first rank the data of the two lanes swapped",
        SCHEDULE,
        "{setup.chunk: data[setup.chunk] for setup in setups}",
        "{a.chunk: data[a.chunk if shared.groups.rank else b.chunk] for a, b in zip(setups, setups[::-1])}",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: loss of microbatch",
    ),
    fault(
        32,
        "Megatron: the losses are cleared before they are returned",
        SCHEDULE,
        "        collected = collect_losses(computation.collected, ",
        "        for values in computation.collected.values():\n"
        "            values.clear()\n"
        "        collected = collect_losses(computation.collected, ",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*loss of microbatch . of replica . is missing",
    ),
    fault(
        33,
        "Megatron: the mirror chunk used by the wrong lane behind the middle",
        SCHEDULE,
        "        {setup.chunk: (module, setup) for module, setup in zip(model, setups, strict=True)},\n",
        "        dict(\n"
        "            zip(\n"
        "                chunks_of(model),\n"
        "                list(zip(model, setups, strict=True))[\n"
        "                    :: -1 if 1 < shared.groups.rank == schedule.ranks // 2 else 1\n"
        "                ],\n"
        "                strict=True,\n"
        "            )\n"
        "        ),\n",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P4-data-parallel-2, DualPipe: .*first step 0",
    ),
    fault(
        38,
        "Megatron: gradients are never finalized",
        SCHEDULE,
        "    if not forward_only:\n        with transport",
        "    if not forward_only and force_all_reduce:\n        with transport",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2, DualPipe: .*first step 0, stage .: gradient of",
    ),
    fault(
        38,
        "Megatron: gradients are finalized before the last W",
        SCHEDULE,
        "        executor.run()\n",
        "        if not forward_only:\n"
        "            _finalize(model, setups, config, groups, computation, force_all_reduce)\n"
        "        executor.run()\n"
        "        force_all_reduce, forward_only = False, True\n",
        check="trial, Megatron",
        rule="run",
        says="gpt-P2, DualPipe: .*differs between ranks",
    ),
)
