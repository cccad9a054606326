"""Faults of the split of a backward into B and W."""

from ci.faults.fault import Edit, fault

WEIGHTGRAD = "dualpipe/runtime/weightgrad.py"
SPLITLINEAR, SPLITSTAGE = "dualpipe/runtime/split_linear.py", "dualpipe/runtime/split_stage.py"

FAULTS = (
    fault(
        12,
        "a weight counted twice in the split",
        SPLITSTAGE,
        "        stage.store.defer(use, x.detach(), dy)\n",
        "        for _ in range(2):\n            stage.store.defer(use, x.detach(), dy)\n",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of its lane of .*weight ",
    ),
    fault(
        30,
        "a deferred weight gradient overwrites the accumulated one",
        WEIGHTGRAD,
        "                    complete.append(parameter)\n",
        "                    complete.append(parameter)\n                    parameter.grad = None\n",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of its lane of .*weight ",
    ),
    fault(
        14,
        "the last weight gradient arrives after the reduction",
        WEIGHTGRAD,
        "                run_backward(tuple(complete), tuple(sums))\n",
        "                _LATE.append((tuple(complete), tuple(sums)))\n"
        "                if len(_LATE) > 1:\n"
        "                    run_backward(*_LATE.pop(0))\n",
        Edit(WEIGHTGRAD, "Closure = Callable[[], None]\n", "Closure = Callable[[], None]\n_LATE: list[Any] = []\n"),
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of ",
    ),
    fault(
        24,
        "the inputs of W are kept after W",
        WEIGHTGRAD,
        "entries = self._deferred.pop(key, None)",
        "entries = self._deferred.get(key, None)",
        check="trial",
        rule="run",
        says="these weight gradients were never computed: ",
    ),
    fault(
        0,
        "the bias left out of W",
        SPLITLINEAR,
        "else dy.sum(0) for parameter",
        "else dy.sum(0).zero_() for parameter",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of its lane of .*bias ",
    ),
    fault(
        12,
        "a layer that a microbatch uses twice is accumulated twice, not summed first",
        WEIGHTGRAD,
        "    return run, id(parameter)\n",
        "    return run, torch.rand(1).item()\n",
        check="trial, Megatron",
        rule="bitwise",
        says="gpt-P2-dropout-overlapped, DualPipe: .*first step 1, stage .: loss of microbatch ",
    ),
    fault(
        0,
        "weights used outside their layer are split nevertheless",
        SPLITSTAGE,
        "            if parameter in self._names and parameter not in self.unsplit and node not in self._nodes:\n",
        "            if False:\n",
        check="tests",
        rule="test",
        says="test_what_cannot_be_split_runs_unsplit_and_is_named_once",
    ),
    fault(
        0,
        "a gradient taken within the stage is deferred to W",
        SPLITSTAGE,
        "        if stage.store.key is None or torch.is_grad_enabled() or not _accumulates(anchor):\n",
        "        if stage.store.key is None:\n",
        check="tests",
        rule="test",
        says="test_what_the_first_microbatch_did_not_show_is_an_error_and_never_a_wrong_gradient",
    ),
    fault(
        29,
        "a first layer whose input needs no gradient gets none itself",
        SPLITSTAGE,
        "    anchor = x.new_empty(0, requires_grad=True)",
        "    anchor = x.new_empty(0)",
        check="trial",
        rule="run",
        says="takes a gradient through .*, which its first microbatch did not",
    ),
)
