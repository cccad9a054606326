"""Faults of the interpreter, of what it runs, and of the reduction of the two copies of a stage."""

from ci.museum.exhibit import Edit, fault

EXECUTE, MODULES, PIPELINE, REPLICAS = (
    "dualpipe/execute.py",
    "dualpipe/modules.py",
    "dualpipe/pipeline.py",
    "dualpipe/replicas.py",
)

FAULTS = (
    fault(
        35,
        "the store for weight gradients is never fed, so W does nothing",
        EXECUTE,
        "with self.store.splitting(None if key in self.whole or not trains else key):",
        "with self.store.splitting(None):",
        check="tests",
        rule="test",
        says="",
    ),
    fault(
        11,
        "W does not run what waits for it",
        EXECUTE,
        "                self.store.run(key)",
        "                pass",
        check="trial",
        rule="run",
        says="these weight gradients were never computed",
    ),
    fault(
        20,
        "the gradient of the loss divided by the microbatches a second time",
        EXECUTE,
        "(torch.ones_like(loss),)",
        "(torch.ones_like(loss) / sum(self.schedule.microbatches.values()),)",
        check="trial",
        rule="bitwise",
        says="gradient",
    ),
    fault(
        27,
        "labels of the two lanes swapped",
        MODULES,
        '_data(self.feed.labels, op, "labels")',
        '_data(dict(zip(self.feed.labels, reversed(self.feed.labels.values()))), op, "labels")',
        check="trial",
        rule="bitwise",
        says="loss",
    ),
    fault(
        32,
        "the losses are lost before they are returned",
        MODULES,
        "        self.result.losses.setdefault(op.lane, {})[op.mb] = loss.detach()",
        "        self.result.losses[op.lane] = {op.mb: loss.detach()}",
        check="trial",
        rule="bitwise",
        says="loss",
    ),
    fault(
        4,
        "the runtime posts a batch in another order on one rank",
        EXECUTE,
        "        self.transport.post(messages)",
        "        self.transport.post(messages[:: -1 if self.transport.rank == 1 else 1])",
        check="trial",
        rule="bitwise",
        says="differences",
    ),
    fault(
        23,
        "an output is sent before autograd lets go of it",
        EXECUTE,
        "    return get_gradient_edge(output) if output.requires_grad else None",
        "    return get_gradient_edge(output.clone()) if output.requires_grad else None",
        check="tests",
        rule="test",
        says="",
    ),
    fault(
        9,
        "what was received and not used goes unnoticed",
        EXECUTE,
        """        left += [f"what {op} receives was not used" for op in self.arrivals]
        left += [f"no backward came for {Op(F, *key)}" for key in self.live if torch.is_grad_enabled()]
        if left:""",
        """        if not left and self.arrivals:""",
        check="tests",
        rule="test",
        says="",
    ),
    fault(
        5,
        "ranks do not compare their set-ups before the first message",
        PIPELINE,
        "            self._worker.transport.agree(self._record())\n",
        "",
        check="tests",
        rule="test",
        says="",
    ),
    fault(
        38,
        "gradients are reduced before the last W",
        PIPELINE,
        """        run_step(self._worker, computation, forward_only)
        if reduce_gradients and not forward_only:
            self.reduce_gradients()
""",
        """        if reduce_gradients and not forward_only:
            self.reduce_gradients()
        run_step(self._worker, computation, forward_only)
""",
        check="tests",
        rule="test",
        says="",
    ),
    fault(
        15,
        "the two copies of a stage are not reduced together",
        REPLICAS,
        "total = gradient if total is None else total + gradient",
        "total = gradient if total is None else total",
        check="trial",
        rule="bitwise",
        says="gradient",
    ),
    fault(
        18,
        "gradients rescaled at the reduction",
        REPLICAS,
        "        parameter.grad = total\n",
        "        parameter.grad = None if total is None else total / len(copies)\n",
        check="trial",
        rule="bitwise",
        says="gradient",
    ),
    fault(
        21,
        "gradients dropped where one copy has none",
        REPLICAS,
        "            if flags[index]:",
        "            if all(row[index] for row in present):",
        Edit(REPLICAS, "total: Tensor | None = None", "total: Tensor | None = parameter.grad"),
        check="trial",
        rule="bitwise",
        says="gradient",
    ),
)
