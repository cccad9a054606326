"""What the GPU tests rely on, as far as a CPU can show it."""

from types import SimpleNamespace

import pytest
from torch import nn

from dualpipe.errors import RuleError
from dualpipe.pipeline import Pipeline
from dualpipe.schedule import COMPUTE, MESSAGES, UP
from dualpipe.schedule.text import loads
from dualpipe.testing.launch import launch
from reference.case import Case, SettingsError, require_deterministic
from reference.verify import verify
from tests.gpu.torchrun import compare_ranks
from tests.production.cases import processes, tiny


def test_messages_staged_through_host_memory_change_no_bit():
    report = verify(tiny(ranks=4, microbatches=8, staged=True, timeout=60.0))
    assert report.equal, str(processes(report).differences[:1] or processes(report).failures)


def test_the_comparison_that_torchrun_starts_finds_no_difference():
    assert launch(2, lambda context: compare_ranks("dualpipe", "fp32", "gloo"), timeout=60).values() == [[], []]


def test_collectives_which_nothing_would_run_are_refused_by_verification_and_pipeline():
    schedule = loads("lane > 0\nrank 0: 0US> 0F0> 0B0>+0W0> 0RG>\n")
    with pytest.raises(
        RuleError, match="a verification must have only computes and messages: rank 0 has the collective 0US>"
    ):
        Case(schedule)
    with pytest.raises(RuleError, match="a pipeline runs computes and messages: rank 0 is to run the collective 0US>"):
        Pipeline(schedule, {(UP, 0): nn.Linear(2, 2)}, nn.functional.mse_loss, [], SimpleNamespace(rank=0, ranks=1))
    Case(schedule.only(COMPUTE | MESSAGES))


def test_a_setting_that_is_not_deterministic_is_named(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(SettingsError, match="CUBLAS_WORKSPACE_CONFIG") as caught:
        require_deterministic()
    assert "use_deterministic_algorithms" in str(caught.value)
