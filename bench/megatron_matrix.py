"""Verifies a matrix of cases on Megatron: every option at every size, and combinations that may interact.

Prints a line for each cell.  ``--cells WORDS`` runs the cells whose name has all of the comma-separated words, such as
``pp4,moe``.  ``--random N --seed S`` runs N cells whose settings are drawn at random instead, since faults hide in
combinations that nobody listed.  Exits with code 1 if any cell differs, or none was selected, and else with 3 if
Megatron's own 1F1B could not run a cell.
"""

import argparse
import random
import sys
import time

from dualpipe.errors import RuleError, UndecidedError
from reference.megatron.case import Case, Model, Part
from reference.megatron.verify import verify

SIZES = {"pp2": {"pp": 2}, "pp4": {"pp": 4}, "pp2 dp2": {"pp": 2, "dp": 2}, "pp4 dp2": {"pp": 4, "dp": 2}}
SIZES |= {"pp2 tp2": {"pp": 2, "tp": 2}, "pp2 tp2 sp": {"pp": 2, "tp": 2, "sequence_parallel": True}}
OPTIONS = {
    "": {},
    "overlap": {"overlap_grad_reduce": True},
    "distopt": {"distributed_optimizer": True},
    "recompute": {"recompute": True},
    "bf16": {"dtype": "bf16"},
    "all": {"overlap_grad_reduce": True, "distributed_optimizer": True, "recompute": True, "dtype": "bf16"},
}
MORE = {
    "gpt pp2 no clipping": Case(clip=0),
    "gpt pp4 12 microbatches": Case(pp=4, microbatches=12),
    "gpt pp2 dropout": Case(dropout=0.1),
    "gpt pp4 dropout recompute": Case(pp=4, dropout=0.1, recompute=True),
    "gpt pp2 tp2 sp dropout": Case(tp=2, sequence_parallel=True, dropout=0.1),
    "gpt pp2 per token": Case(per_token_loss=True),
    "gpt pp4 dp2 per token": Case(pp=4, dp=2, per_token_loss=True),
    "moe pp2 per token": Case(Model.MOE, per_token_loss=True),
    "gpt pp2 tp2 sp dp2 all": Case(dp=2, tp=2, sequence_parallel=True, **OPTIONS["all"]),
    "gpt pp6": Case(pp=6),
    "gpt pp4 lengths": Case(pp=4, variable_lengths=True),
    "gpt pp2 tp2 sp bf16 lengths": Case(tp=2, sequence_parallel=True, dtype="bf16", variable_lengths=True),
    "gpt v pp2 lengths": Case(schedule="dualpipev", variable_lengths=True),
    "moe pp2 dp2 ep2 F&B pairs lengths": Case(Model.MOE, dp=2, ep=2, overlap_moe=True, variable_lengths=True),
    "deepseek pp4 dp2 ep2 lengths recompute": Case(
        Model.DEEPSEEK, pp=4, dp=2, ep=2, variable_lengths=True, recompute=True
    ),
    "gpt pp4 dp2 instances": Case(pp=4, dp=2, distributed_optimizer=True, instances=2, clip=0.1),
    "moe pp2 dp4 ep2 bf16 overlap instances": Case(
        Model.MOE, dp=4, ep=2, distributed_optimizer=True, instances=2, overlap_grad_reduce=True, dtype="bf16", clip=0.1
    ),
    "gpt v pp2 dp2 overlap instances": Case(
        dp=2, schedule="dualpipev", distributed_optimizer=True, instances=2, overlap_grad_reduce=True, clip=0.1
    ),
    "moe pp2 dp2 ep2": Case(Model.MOE, dp=2, ep=2),
    "moe pp2 dp2 ep2 distopt overlap": Case(
        Model.MOE, dp=2, ep=2, distributed_optimizer=True, overlap_grad_reduce=True
    ),
    "moe pp2 dp2 ep2 F&B pairs": Case(Model.MOE, dp=2, ep=2, overlap_moe=True),
    "moe pp2 global": Case(Model.MOE, global_aux_loss=True),
    "moe pp4 dp2 ep2 global overlap recompute": Case(
        Model.MOE, pp=4, dp=2, ep=2, global_aux_loss=True, overlap_grad_reduce=True, recompute=True
    ),
    "deepseek pp2 global": Case(Model.DEEPSEEK, global_aux_loss=True),
    "deepseek pp4 dp2 ep2 bf16 global bias": Case(
        Model.DEEPSEEK, pp=4, dp=2, ep=2, dtype="bf16", global_aux_loss=True, expert_bias=True
    ),
    "moe v pp2 dp2 global": Case(Model.MOE, dp=2, schedule="dualpipev", global_aux_loss=True),
    "moe pp2 bias": Case(Model.MOE, expert_bias=True),
    "moe pp4 dp2 ep2 bias": Case(Model.MOE, pp=4, dp=2, ep=2, expert_bias=True),
    "gpt pp4 distopt overlap clip": Case(pp=4, distributed_optimizer=True, overlap_grad_reduce=True, clip=0.1),
}
SHARED = {"tied": {"tied": True}, "mtp": {"mtp": 1}, "tied mtp": {"tied": True, "mtp": 1}}
"""Models that use the embedding at both ends."""
for name, model in SHARED.items():
    MORE |= {f"gpt {size} {name}": Case(**layout, **model) for size, layout in SIZES.items() if "tp2" not in size}
    MORE[f"gpt pp2 dp2 distopt bf16 {name}"] = Case(dp=2, distributed_optimizer=True, dtype="bf16", **model)
    MORE[f"moe pp2 per token {name}"] = Case(Model.MOE, per_token_loss=True, **model)
    MORE[f"gpt pp2 tp2 sp {name}"] = Case(tp=2, sequence_parallel=True, **model)
    MORE[f"gpt v pp2 {name}"] = Case(schedule="dualpipev", **model)
for option, settings in OPTIONS.items():
    MORE[f"gpt v pp2 {option}".strip()] = Case(schedule="dualpipev", **settings)
    MORE[f"moe v pp2 dp2 {option}".strip()] = Case(Model.MOE, dp=2, schedule="dualpipev", **settings)
    MORE[f"deepseek pp2 dp2 ep2 {option}".strip()] = Case(Model.DEEPSEEK, dp=2, ep=2, **settings)
for part in Part:
    MORE[f"deepseek pp2 without {part}"] = Case(Model.DEEPSEEK, without=(part,))
MORE |= {
    "gpt pp4 mtp layout": Case(pp=4, mtp=1, layout="Et|tt|tt|ttmL"),
    "gpt pp6 mtp": Case(pp=6, mtp=1),
    "gpt pp6 tied mtp": Case(pp=6, mtp=1, tied=True),
    "gpt v pp3": Case(pp=3, schedule="dualpipev"),
    "gpt v pp4": Case(pp=4, schedule="dualpipev"),
    "gpt v pp2 dropout": Case(schedule="dualpipev", dropout=0.1),
    "gpt v pp2 dp2 distopt overlap clip": Case(
        dp=2, schedule="dualpipev", distributed_optimizer=True, overlap_grad_reduce=True, clip=0.1
    ),
    "deepseek pp2": Case(Model.DEEPSEEK),
    "deepseek pp2 cp2": Case(Model.DEEPSEEK, cp=2),
    "deepseek pp4 dp2 cp2 ep2 all": Case(Model.DEEPSEEK, pp=4, dp=2, cp=2, ep=2, **OPTIONS["all"]),
    "deepseek v pp2 cp2 bf16 per token": Case(
        Model.DEEPSEEK, cp=2, schedule="dualpipev", dtype="bf16", per_token_loss=True
    ),
    "deepseek pp2 bf16 qk": Case(Model.DEEPSEEK, dtype="bf16", qk_clip=True),
    "deepseek pp4 dp2 ep2 bf16 recompute qk": Case(
        Model.DEEPSEEK, pp=4, dp=2, ep=2, dtype="bf16", recompute=True, qk_clip=True
    ),
    "deepseek v pp2 bf16 qk": Case(Model.DEEPSEEK, schedule="dualpipev", dtype="bf16", qk_clip=True),
    "deepseek pp4 dp2 ep2 all": Case(Model.DEEPSEEK, pp=4, dp=2, ep=2, **OPTIONS["all"]),
    "deepseek v pp2 dp2 ep2 all": Case(Model.DEEPSEEK, dp=2, ep=2, schedule="dualpipev", **OPTIONS["all"]),
}


def cells() -> dict[str, Case]:
    """Every cell by its name; without ``moe tp2``, as experts under tensor parallelism need sequence parallelism."""
    found = {}
    for model in (Model.GPT, Model.MOE):
        for size, layout in SIZES.items():
            if model is Model.MOE and size == "pp2 tp2":
                continue
            for option, settings in OPTIONS.items():
                found[f"{model} {size} {option}".strip()] = Case(model, **layout, **settings)
    return found | MORE


DRAWN = {
    "pp": (4,),
    "dp": (2, 4),
    "tp": (2,),
    "ep": (2,),
    "cp": (2,),
    "dtype": ("bf16",),
    "dropout": (0.1,),
    "mtp": (1,),
    "instances": (2,),
    "schedule": ("dualpipev",),
    "late_w": ("tail", "all"),
    "clip": (0.0, 0.1),
}
"""The values of settings that are not switches, beside the default, for cells drawn at random."""
SWITCHES = (
    *("sequence_parallel", "overlap_grad_reduce", "distributed_optimizer", "recompute", "per_token_loss", "tied"),
    *("expert_bias", "global_aux_loss", "variable_lengths", "qk_clip", "overlap_moe"),
)
RANKS = 16
"""The most ranks of a cell drawn at random, those of Megatron's 1F1B."""


def drawn(count: int, seed: int) -> dict[str, Case]:
    """Cells with settings at random, of those that the rules of ``Case`` and of Megatron allow."""
    choose = random.Random(seed)
    found: dict[str, Case] = {}
    while len(found) < count:
        model = choose.choice(list(Model))
        values = {name: choose.choice(all_of) for name, all_of in DRAWN.items() if choose.random() < 0.3}
        values |= {name: True for name in SWITCHES if choose.random() < 0.3}
        try:
            case = Case(model, steps=2, **values)
        except RuleError:
            continue
        if 2 * case.pp * case.dp * case.tp * case.cp <= RANKS:
            shown = (f"{name}={value}" if value is not True else name for name, value in values.items())
            found[f"{model} {' '.join(shown)}"] = case
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cells",
        default="",
        help="comma-separated words, all of which must be in a cell's name",
    )
    parser.add_argument("--random", type=int, metavar="N", help="run N cells drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="what the random cells are drawn from")
    given = parser.parse_args()
    words = [word for word in given.cells.split(",") if word]
    all_cells = cells() if given.random is None else drawn(given.random, given.seed)
    chosen = {name: case for name, case in all_cells.items() if all(word in name.split() for word in words)}
    unequal, undecided, started = 0, 0, time.monotonic()
    for name, case in chosen.items():
        try:
            report = verify(case)
        except UndecidedError as error:  # of Megatron's own 1F1B
            undecided += 1
            print(f"{name:34} undecided: {error}", flush=True)
            continue
        unequal += not report.equal
        verdicts = "  ".join(f"{party.name} {party.verdict}" for party in report.comparisons)
        rounding = max(party.norm_difference for party in report.comparisons)
        print(f"{name:34} {verdicts:34} {report.tensors:6} tensors  {report.seconds:5.1f} s", end="")
        print(f"  norm rounded by {rounding:.1g}" if rounding else "", flush=True)
        for complaint in report.complaints[:2]:
            print(f"    sanity check failed: {complaint}")
        for party in report.comparisons:
            for trouble in [*party.failures, *party.differences][:2]:
                print(f"    {party.name}: {trouble}")
    print(f"{len(chosen)} cells, {unequal} not equal, {undecided} undecided, {time.monotonic() - started:.0f} s")
    return 1 if unequal or not chosen else 3 if undecided else 0


if __name__ == "__main__":
    sys.exit(main())
