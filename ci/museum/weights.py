"""Faults of the split of a backward into B and W."""

from ci.museum.exhibit import fault

WEIGHTGRAD = "dualpipe/weightgrad.py"

FAULTS = (
    fault(
        12,
        "a weight counted twice in the split",
        WEIGHTGRAD,
        "        ctx.store.put(ctx.key, lambda linear=ctx.linear: _accumulate(linear, x2, dy))\n",
        "        for _ in range(2):\n"
        "            ctx.store.put(ctx.key, lambda linear=ctx.linear: _accumulate(linear, x2, dy))\n",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of its lane of .*weight ",
    ),
    fault(
        30,
        "a weight gradient that comes late overwrites the one that is there",
        WEIGHTGRAD,
        "        leaves.append(linear.weight)\n",
        "        linear.weight.grad = None\n        leaves.append(linear.weight)\n",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of its lane of .*weight ",
    ),
    fault(
        13,
        "W adds to the gradient past the hooks on the parameters",
        WEIGHTGRAD,
        "    torch.autograd.backward(leaves, gradients)\n",
        "    for leaf, gradient in zip(leaves, gradients, strict=True):\n"
        "        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient\n",
        check="tests",
        rule="test",
        says="test_hooks_on_a_parameter_fire_at_w_and_not_at_b",
    ),
    fault(
        24,
        "what W needed is held after W",
        WEIGHTGRAD,
        "closures = self._waiting.pop(key, None)",
        "closures = self._waiting.get(key, None)",
        check="trial",
        rule="run",
        says="these weight gradients were never computed: ",
    ),
    fault(
        0,
        "the bias left out of W",
        WEIGHTGRAD,
        "        leaves.append(linear.bias)\n        gradients.append(dy.sum(0))\n",
        "        pass\n",
        check="trial",
        rule="bitwise",
        says="first step 0, stage .: gradient of its lane of .*bias ",
    ),
    fault(
        29,
        "a first layer whose input needs no gradient gets none itself",
        WEIGHTGRAD,
        "    anchor = x.new_empty(0, requires_grad=True)",
        "    anchor = x.new_empty(0)",
        check="tests",
        rule="test",
        says="test_a_first_layer_whose_input_needs_no_gradient_still_gets_its_own",
    ),
)
