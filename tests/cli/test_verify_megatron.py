"""``dualpipe verify --model gpt``: equal as text and as JSON, and options that do not go together."""

import json

import pytest


def test_an_equal_run_prints_a_row_per_stage_and_exits_with_0(run):
    result = run("verify", "--model", "gpt", "-P", 2, "--steps", 1)
    assert result.code == 0
    assert "DualPipe: 1 x 4 microbatches on 2 ranks; Megatron's 1F1B: 2 x 2 on 4" in result.out
    rows = [line.split() for line in result.out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(row[-2:] == ["equal", "equal"] for row in rows)
    assert "are bitwise equal to those of Megatron's 1F1B" in result.out


def test_an_equal_run_of_dualpipev_in_json(run):
    options = ["dualpipev", "--without", "mla", "--without", "layout", "-P", 2, "--steps", 2, "--dtype", "bf16"]
    report = json.loads(run("verify", "--model", "deepseek", *options, "--json").out)
    chosen = {"schedule": "dualpipev", "mtp": 1, "layout": None, "expert_bias": True, "without": ["mla", "layout"]}
    assert {name: report[name] for name in chosen} == chosen
    assert report["verdict"] == "equal"
    assert report["losses"][0] > report["losses"][1]
    assert report["parties"].keys() == {"DualPipe", "plain PyTorch"}
    assert report["tensors"] > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", 2], "no such option: got --tp; add --model gpt"),
        (["--recompute", "--clip", 1], "got --recompute, --clip"),
        (["--model", "gpt", "--schedule", "1f1b"], "got the schedule 1f1b; leave it out"),
        (["--model", "moe", "some.txt"], "got the schedule some.txt; leave it out"),
        (["--model", "gpt", "--dtype", "fp64"], "fp32 or bf16: got fp64"),
        (["--model", "gpt", "-P", 3], "an even number of ranks: got 3"),
        (["--model", "gpt", "--without", "mla"], "got mla for gpt; use --model deepseek"),
        (["--model", "gpt", "--layout", "Et|tL"], "got Et|tL for 4 stages"),
        (["--mtp", 1, "--tied"], "got --mtp, --tied; add --model gpt"),
    ],
)
def test_options_that_do_not_go_together(run, options, message):
    result = run("verify", *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
