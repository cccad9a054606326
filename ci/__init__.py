"""The gate: shows what a change does to the schedules, and refuses a change unless every check passes.

The gate imports nothing of the tree that it checks.  It runs that tree in other processes, each with a time limit, so
that a broken tree cannot break the gate.
"""


class GateError(ValueError):
    """Bad input: the rule that was broken, what was given, and how to fix it.

    It has the form of ``dualpipe.errors.RuleError``, which the gate does not import.
    """

    def __init__(self, rule: str, got: str, fix: str) -> None:
        self.rule, self.got, self.fix = rule, got, fix
        super().__init__(f"{rule}: {got}; {fix}")
