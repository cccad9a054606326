"""The form of every complaint about input."""


class RuleError(ValueError):
    """Bad input: the rule that was broken, what came, and what to do about it."""

    def __init__(self, rule: str, came: str, remedy: str) -> None:
        self.rule, self.came, self.remedy = rule, came, remedy
        super().__init__(f"{rule}: {came}; {remedy}")


class UndecidedError(RuntimeError):
    """A question that could not be answered, which is neither a yes nor a no."""
