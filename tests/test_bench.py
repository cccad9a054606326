"""The measurements of bench/ still run: each on the least that it can be asked for."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import typer

from dualpipe import Schedule, dualpipe, one_f_one_b

BENCH = Path(__file__).parent.parent / "bench"


def script(name):
    return runpy.run_path(str(BENCH / name), run_name="bench")


@pytest.fixture(autouse=True)
def _own_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_fake_ranks_are_timed_against_the_oracle(capsys):
    main = script("fake_vs_oracle.py")["main"]
    main(ranks=2, microbatches=4, hidden=8, sequence=4, steps=1, rounds=1)
    assert "fake ranks" in capsys.readouterr().out


def test_both_methods_of_proving_are_timed(capsys):
    script("provers.py")["main"](sizes="2/4", rounds=1, theorems="1f1b")
    out = capsys.readouterr().out
    assert "dualpipe at 2/4, rounds: 1; plain search" in out
    assert "11 theorems of 1f1b: " in out


def test_schedules_are_generated_checked_and_compared_with_the_construction_of_torch(tmp_path, capsys):
    """Each kind at two ranks, in this process: a process of its own would import torch again."""
    namespace = script("scale.py")["main"].__globals__
    measured = {kind: namespace["measure"](kind, 2, 8) for kind in namespace["KINDS"]}
    assert measured["ours dualpipe"]["ops"] == sum(len(slot) for program in dualpipe(2, 8).programs for slot in program)
    namespace["_in_a_process"] = lambda kind, ranks, limit: measured[kind] if ranks == 2 else {"over": limit}
    namespace["main"](sizes="2,4,8", output=tmp_path / "scale.json")
    head, _, first, second, third = capsys.readouterr().out.splitlines()[-5:]
    assert head.startswith(
        "| P / M | ours dualpipe: generate | ours dualpipe: one rank, ms | ours dualpipe: check | MiB |"
    )
    assert first.startswith("| 2 / 8 | 0.0")
    assert second.startswith("| 4 / 16 | over 60 s in all |  |  |  | over 60 s in all |")
    assert set(third.split(" | ")[1:]) <= {"", " |"}
    written = json.loads((tmp_path / "scale.json").read_text())
    assert len(written["results"]) == 2 * len(measured)
    assert written["machine"]["cores"] >= 1


def test_a_schedule_that_is_not_proved_is_not_timed(monkeypatch):
    measure = script("scale.py")["measure"]
    faulty = Schedule(one_f_one_b(2, 2).routes, ((), ()))
    monkeypatch.setattr("dualpipe.schedule.generate.generate", lambda *size: faulty)
    with pytest.raises(SystemExit, match="1f1b at 2/2 is refuted"):
        measure("ours 1f1b", 2, 2)


def test_mutants_are_proved_and_run(capsys):
    with pytest.raises(typer.Exit) as ended:
        script("soundness.py")["main"](mutants=3, seed=0, processes=0)
    assert ended.value.exit_code == 0
    assert "3 mutants" in capsys.readouterr().out


@pytest.mark.long
def test_the_cells_of_the_matrix_are_verified(monkeypatch, capsys):
    """One schedule in one format, and each size of it the smallest there is."""
    main = script("matrix.py")["main"]
    fewest = {"PLANS": ["1f1b"], "DTYPES": {"fp32": torch.float32}, "generate": lambda name, *size: one_f_one_b(2, 2)}
    for name, value in fewest.items():
        monkeypatch.setitem(main.__globals__, name, value)
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 not equal")


def test_a_cell_of_the_matrix_on_megatron_is_verified(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megatron_matrix.py", "--cells", "gpt,clipping"])
    assert script("megatron_matrix.py")["main"]() == 0
    assert "gpt pp2 no clipping" in capsys.readouterr().out


def test_a_campaign_of_faults_is_run(capsys):
    with pytest.raises(typer.Exit) as ended:
        script("campaign.py")["main"](trials=1, seed=3, steps=4, timeout=3.0)
    assert ended.value.exit_code == 0
    out = capsys.readouterr().out
    assert "rank 3: 0 of 4 steps wrong" in out


def test_the_bubbles_of_executors_are_measured_and_their_results_checked(capsys):
    main = script("bubble.py")["main"]
    main(sizes="2/4", unit=2.0, weights="1", delays="0,0.5", every=False, repeats=1, executors="tail,zbv")
    out = capsys.readouterr().out
    assert "P=2 M=4, F=B=2 ms, W=1 F, delay 0.5 F, 1 steps" in out
    assert "torch zbv" in out
    assert "1.208" in out, "the simulated figure of ZBV with the delay"
    assert out.endswith("every step had the losses and gradients of the plain loop\n")


@pytest.mark.parametrize("spoiled", ["loss", "gradient", "microbatch"])
def test_an_executor_with_other_results_than_the_plain_loop_is_refused(spoiled):
    check, case, truth = (script("bubble.py")[name] for name in ("check", "Case", "truth"))
    wanted = truth(case(2, 4, 0, 0, 0, 0), 4)
    losses, gradients = dict(wanted[0]), dict(wanted[1])
    assert (sorted(losses), sorted(gradients)) == ([0, 1, 2, 3], [(layer, "weight") for layer in range(4)])
    check("mine", [(losses, list(gradients.items()))], wanted)
    if spoiled == "loss":
        losses[1] = losses[1] * 1.001
    elif spoiled == "gradient":
        gradients[2, "weight"] = gradients[2, "weight"] * 1.001
    else:
        del losses[3]
    with pytest.raises(RuntimeError, match="mine has other losses or gradients"):
        check("mine", [(losses, list(gradients.items()))], wanted)


@pytest.mark.long
def test_a_step_on_megatron_is_measured_and_its_losses_are_compared(tmp_path, capsys, monkeypatch):
    import reference.megatron  # noqa: F401 # imports megatron-core, quietly
    from reference.megatron import data

    monkeypatch.setattr(data, "batch", data.batch)
    step = script("megatron_step.py")
    with pytest.raises(SystemExit, match=r"DualPipe at 2/4: losses \["):
        step["measure"]("2/4", 1, 2)  # the lanes read other microbatches than 1F1B
    step["main"](sizes="2/4", rounds=1, steps=2, output=tmp_path / "step.json")
    out = capsys.readouterr().out
    assert out.endswith("every step of DualPipe had the mean loss of 1F1B's\n")
    (result,) = json.loads((tmp_path / "step.json").read_text())["results"]
    assert list(result["rounds"]) == ["1F1B", "DualPipe", "DualPipe, late W", "DualPipeV"]
    assert all(row["cpu"] > 0 and row["wall"] > 0 for rows in result["rounds"].values() for row in rows)


def test_the_cost_of_executors_is_measured_and_their_results_checked(tmp_path, capsys):
    main = script("executor.py")["main"]
    main(sizes="2/4", rounds=1, steps=1, executors="ours", output=tmp_path / "figures.json")
    assert capsys.readouterr().out.endswith("every step over gloo had the losses and gradients of the plain loop\n")
    columns = json.loads((tmp_path / "figures.json").read_text())["sizes"]["2/4"]
    assert sorted(columns) == ["cpu", "host", "wall"]
    assert all(column["ours"]["us"] > 0 for column in columns.values())


def test_the_machine_of_a_measurement_is_described():
    describe, machine = (script("machine.py")[name] for name in ("describe", "machine"))
    assert f"torch {torch.__version__.partition('+')[0]}" in describe(machine())


def test_every_script_has_a_test():
    source = Path(__file__).read_text()
    assert [file.name for file in BENCH.glob("*.py") if f'script("{file.name}")' not in source] == []
