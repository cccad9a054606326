"""Bad input of the gate, in the same form as the project's other complaints (which the gate does not import)."""


class GateError(ValueError):
    """Bad input: the rule that was broken, what came, and what to do about it."""

    def __init__(self, rule: str, got: str, fix: str) -> None:
        self.rule, self.got, self.fix = rule, got, fix
        super().__init__(f"{rule}: {got}; {fix}")
