"""Faults of the executor, its transport and its stage modules, and of the reduction over the replicas of a stage."""

from ci.faults.fault import Edit, fault

EXECUTE, PROGRAM, LIVE, MODULES, REPLICAS, TRANSPORT = (
    f"dualpipe/runtime/{name}.py" for name in ("executor", "program", "live", "modules", "replicas", "process_group")
)
PIPELINE = "dualpipe/pipeline.py"
WIRE, OUTSTANDING = "dualpipe/runtime/wire.py", "dualpipe/runtime/outstanding.py"

FAULTS = (
    fault(
        35,
        "nothing is deferred to W, which does nothing",
        EXECUTE,
        "split.forward(step.weight, not step.full):",
        "split.forward(step.weight, False):",
        check="trial",
        rule="run",
        says="adds in B, outside the layer, to the gradients of ",
    ),
    fault(
        11,
        "W does not run its deferred weight gradients",
        EXECUTE,
        "        elif not step.full:\n            self.store.run(step.weight)",
        "",
        check="trial",
        rule="run",
        says="these weight gradients were never computed",
    ),
    fault(
        20,
        "the gradient of the loss divided by the microbatches a second time",
        LIVE,
        "(torch.ones_like(loss),)",
        "(torch.ones_like(loss) / 8,)",
        check="trial",
        rule="bitwise",
        says="first step 0, stage 0: gradient of its lane of ",
    ),
    fault(
        27,
        "labels of the two lanes swapped",
        MODULES,
        "_data(self.feed.labels, op)",
        "_data(dict(zip(self.feed.labels, reversed(self.feed.labels.values()))), op)",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: loss of ",
    ),
    fault(
        32,
        "the losses are lost before they are returned",
        MODULES,
        "        self.result.losses.setdefault(op.lane, {})[op.mb] = loss.detach()",
        "        self.result.losses[op.lane] = {op.mb: loss.detach()}",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: loss of ",
    ),
    fault(
        4,
        "the runtime posts the messages of a slot in another order on one rank",
        EXECUTE,
        "        self.transport.post(messages)\n        if self.blocking",
        "        self.transport.post(messages[:: -1 if self.transport.rank == 1 else 1])\n        if self.blocking",
        check="trial",
        rule="bitwise",
        says="first step 0, stage 1: loss of 1> differs",
    ),
    fault(
        23,
        "an output that is a view is detached in place",
        EXECUTE,
        "[output.detach() for output in outputs]",
        "[output.detach_() for output in outputs]",
        check="tests",
        rule="test",
        says="test_dualpipe_trains_and_evaluates_as_their_example_does.*Can't detach views in-place",
    ),
    fault(
        0,
        "the B of an F&B pair does not defer its weight gradients",
        EXECUTE,
        "            stack.enter_context(self.deferring(b))\n",
        "",
        check="tests",
        rule="test",
        says="test_the_method_gets_every_pair_and_the_gradients_are_those_of_f_then_b",
    ),
    fault(
        0,
        "an overlapped method that leaves out the backward goes unnoticed",
        "dualpipe/runtime/overlap.py",
        "    if len(started) < len(nodes):\n",
        "    if len(started) > len(nodes):\n",
        check="tests",
        rule="test",
        says="test_a_method_that_breaks_the_contract_ends_the_step_with_the_reason_and_the_pair",
    ),
    fault(
        0,
        "a send counts as received one answer too early",
        "dualpipe/runtime/echoes.py",
        "            at = bisect_right(numbers, user)\n",
        "            at = bisect_right(numbers, user) - 1\n",
        check="tests",
        rule="test",
        says="test_an_echo_was_posted_after_the_compute_that_needed_what_it_echoes|"
        "test_a_view_that_was_sent_is_freed_with_its_base",
    ),
    fault(
        0,
        "a checked stream takes every access as ordered",
        "dualpipe/testing/streams.py",
        "        if not earlier.before(access.stream):\n",
        "        if not earlier:\n",
        check="tests",
        rule="test",
        says="test_a_use_without_a_wait_is_refused",
    ),
    fault(
        24,
        "an output is kept until its backward",
        LIVE,
        "    return get_gradient_edge(output) if output.requires_grad else None",
        "    if output.requires_grad:\n"
        '        get_gradient_edge(output).node.metadata["kept"] = output\n'
        "    return get_gradient_edge(output) if output.requires_grad else None",
        check="tests",
        rule="test",
        says="test_a_view_that_was_sent_is_freed_with_its_base|"
        "test_what_messages_hold_does_not_grow_with_the_number_of_microbatches",
    ),
    fault(
        9,
        "an unused received tensor goes unnoticed",
        PROGRAM,
        """        left += [f"what {op} receives was not used" for op in self.registers if op in self.arrivals]
        left += [f"{Op(F, *task)} has no backward" for task in self.live if not self.forward_only]
""",
        """        left = [] if left or not self.arrivals else ["what a receive brought was not used"]
""",
        check="tests",
        rule="test",
        says="test_a_gradient_that_is_never_sent_is_reported_by_the_rank_that_kept_it.*was not used|"
        "test_what_no_op_uses_is_listed",
    ),
    fault(
        5,
        "ranks do not compare their set-ups before the first message",
        PIPELINE,
        "            self.transport.agree(self._record())\n",
        "",
        check="tests",
        rule="test",
        says="test_a_rank_with_another_schedule_is_found_before_the_first_message.*StepError.*DisagreementError",
    ),
    fault(
        38,
        "gradients are reduced before the last W",
        PIPELINE,
        """        with self.transport.phase("evaluation" if forward_only else "step"):
            require_feed(feed, self.schedule, self.transport.rank, self.criterion is not None)
            if not forward_only:
                self._set_aside(copies=True)
            executor.run()
        if reduce_gradients and not forward_only:
            self.reduce_gradients()
""",
        """        if reduce_gradients and not forward_only:
            self.reduce_gradients()
        with self.transport.phase("evaluation" if forward_only else "step"):
            executor.run()
""",
        check="tests",
        rule="test",
        says="test_a_step_leaves_the_gradients_summed_over_both_replicas.*is not the sum",
    ),
    fault(
        15,
        "each replica of a stage starts with its own weights",
        REPLICAS,
        "{lane: packed if replica == chunk else received[replica] for replica, lane in of_lane.items()}",
        "{chunk.lane: packed} | {of_lane[other]: received[other] for other in of_lane if other != chunk}",  # sums stay
        check="tests",
        rule="test",
        says="test_every_replica_of_a_stage_starts_from_the_first_lanes_weights.*differs from lane >",
    ),
    fault(
        15,
        "the two replicas of a stage are not reduced together",
        REPLICAS,
        "total = gradient if total is None else total + gradient",
        "total = gradient if total is None else total",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of [^ ]+ ",
    ),
    fault(
        18,
        "gradients rescaled at the reduction",
        REPLICAS,
        "        parameter.grad = total\n",
        "        parameter.grad = None if total is None else total / len(replicas)\n",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of [^ ]+ ",
    ),
    fault(
        0,
        "replicas whose buffers drift apart are not compared",
        REPLICAS,
        "                if len(set(found)) > 1:",
        "                if len(set(found)) > len(replicas):",
        check="tests",
        rule="test",
        says="test_what_cannot_be_trained_is_an_error_on_every_rank",
    ),
    fault(
        0,
        "a second step sums the gradients of the first again",
        PIPELINE,
        "            self._set_aside(copies=True)\n",
        "            pass\n",
        check="tests",
        rule="test",
        says="test_unusual_stages_train_to_the_bits_of_autograd",
    ),
    fault(
        21,
        "gradients dropped if one replica has none",
        REPLICAS,
        "            if flags[index]:",
        "            if all(row[index] for row in present):",
        Edit(REPLICAS, "total: Tensor | None = None", "total: Tensor | None = parameter.grad"),
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of [^ ]+ ",
    ),
    fault(
        28,
        "messages posted on the default group",
        WIRE,
        "shared = [Channel(group, group._get_backend(device), peer) for peer in order]",
        "group = dist.group.WORLD\n"
        "        shared = [Channel(group, group._get_backend(device), peer) for peer in order]",
        check="trial, Megatron",
        rule="run",
        says="gpt-P4-data-parallel-2, DualPipe: .*(send|receive) .* rank . failed after ",
    ),
    fault(
        6,
        "only one of the works of a message is waited for",
        OUTSTANDING,
        "            for work in message.works:\n",
        "            for work in message.works[1:]:\n",
        check="trial",
        rule="run",
        says="differs between the lanes before the first update",
    ),
    fault(
        4,
        "two sends of one slot posted in reverse",
        TRANSPORT,
        "        for message in messages:\n            self._allocate(message)",
        "        sends = [m for m in messages if m.sends]\n"
        "        if len({m.tensors[0].shape for m in sends}) == 1:  # others would not fit into their receives\n"
        "            messages = [sends.pop() if m.sends else m for m in messages]\n"
        "        for message in messages:\n            self._allocate(message)",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: ",
    ),
    fault(
        0,
        "a received tensor returned before it has arrived",
        TRANSPORT,
        "        self._outstanding.wait(message)\n",
        "        early = [tensor.clone() for tensor in message.tensors]\n"
        "        self._outstanding.wait(message)\n"
        "        message.tensors = early\n",
        check="trial",
        rule="run",
        says="differs between the lanes before the first update",
    ),
    fault(
        0,
        "an exchanged shape kept for the next microbatch",
        "dualpipe/runtime/boundary.py",
        "self._exchanged[post.crossed, post.op.lane, post.op.mb] = specs",
        "self._exchanged[post.crossed, post.op.lane, post.op.mb + 1] = specs",
        check="tests",
        rule="test",
        says="test_gradients_are_those_of_a_plain_loop",
    ),
)
