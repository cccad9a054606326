import pytest

from proofs.theorems import TheoremResult, prove_all


@pytest.fixture(scope="session")
def proved() -> dict[str, TheoremResult]:
    """Every theorem, proved once for all tests."""
    return {result.name: result for result in prove_all()}
