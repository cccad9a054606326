"""A script of Megatron-LM runs unchanged with DualPipe's flags, here on a stand-in for its training loop."""

import argparse
import sys
import types

import pytest
import torch

from dualpipe.megatron import launch
from dualpipe.megatron.on_cpu import remove_cpu_standins
from dualpipe.megatron.schedule import forward_backward_dualpipe
from tests.megatron.conftest import MEGATRONS

SCRIPT = """
from megatron.training import arguments, training

def own_options(parser):
    parser.add_argument("--own-option", type=int)
    return parser

if __name__ == "__main__":
    args = arguments.parse_args(own_options, args_defaults={"known": 1})
    arguments.seen.append((args, training.get_forward_backward_func()))
"""


@pytest.fixture
def loop(training, monkeypatch):
    """A stand-in for ``megatron.training``, whose parser takes the options of a provider."""
    arguments = types.ModuleType("megatron.training.arguments")
    variables = types.ModuleType("megatron.training.global_vars")
    arguments.seen = []

    def parse_args(extra_args_provider=None, args_defaults=None):
        parser = argparse.ArgumentParser()
        parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
        variables.args = extra_args_provider(parser).parse_args()
        return variables.args

    arguments.parse_args = parse_args
    training.parse_args = parse_args  # imported by name
    variables.get_args = lambda: variables.args
    initialize = types.ModuleType("megatron.training.initialize")
    initialize.set_jit_fusion_options = lambda: "needs a GPU"
    initialize.initialize_megatron = lambda allow_no_cuda=False: allow_no_cuda
    training.initialize_megatron = initialize.initialize_megatron
    package = types.ModuleType("megatron.training")
    package.arguments, package.training = arguments, training
    for module in (package, arguments, variables, initialize, types.ModuleType("megatron.training.checkpointing")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return arguments


@pytest.mark.usefixtures("uninstalled")
@pytest.mark.parametrize("flag", ["--use-dualpipe", "--use-dualpipev"])
def test_the_script_gets_the_flags_beside_its_own_options_and_the_schedule(flag, loop, training, tmp_path):
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(SCRIPT)
    before = loop.parse_args
    options = ["--own-option", "3", "--pipeline-model-parallel-size", "2"]
    assert launch.main([str(script), *options, flag]) == 0
    ((args, schedule),) = loop.seen
    assert (args.own_option, args.pipeline_model_parallel_size, args.dualpipe_late_w) == (3, 2, "none")
    assert schedule is forward_backward_dualpipe
    assert training.parse_args is loop.parse_args is not before
    assert launch.with_dualpipe_args is not loop.parse_args


@pytest.mark.usefixtures("uninstalled", "training")
def test_without_a_flag_the_script_gets_megatrons_selector_and_options(loop, tmp_path, monkeypatch):
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(SCRIPT.replace("own_options, ", "").replace("training.get_forward_backward_func()", "args"))
    assert launch.main([str(script)]) == 0
    assert not loop.seen[0][0].use_dualpipe
    assert MEGATRONS.selector is not None


@pytest.mark.usefixtures("uninstalled")
def test_on_the_cpu_the_loop_starts_without_a_gpu_and_with_the_options_of_a_cpu(loop, training, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(
        SCRIPT.replace("training.get_forward_backward_func()", "training.initialize_megatron()").replace(
            "own_options, ", "lambda p: p.add_argument('--distributed-backend', default='nccl') and p, "
        )
    )
    try:
        assert launch.main(["--on-cpu", str(script), "--use-dualpipe"]) == 0
        assert torch.zeros(2, device="cuda").to("cuda", torch.float64).device.type == "cpu"
        assert torch.zeros(2).to(device=torch.device("cuda:1")).device.type == "cpu"
        assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"
        torch.manual_seed(1)
        apart = torch.rand(2)
        torch.manual_seed(1)
        iter(torch.utils.data.DataLoader([1]))
        assert torch.equal(torch.rand(2), apart)
        assert torch.cuda.memory_stats()["any"] == torch.cuda.memory_allocated() == 0
    finally:
        remove_cpu_standins()
    assert loop.seen[0][0].distributed_backend == "gloo"
    assert loop.seen[0][1] is True  # allow_no_cuda
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        torch.zeros(2, device="cuda")


@pytest.mark.parametrize(("arguments", "error"), [(["nowhere.py"], "must be a file: got nowhere.py"), ([], "")])
def test_a_command_line_without_a_script_is_refused(arguments, error, capsys):
    assert launch.main(arguments) == 2
    assert error in capsys.readouterr().err


def test_a_script_without_megatrons_loop_beside_it_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = tmp_path / "alone.py"
    script.write_text("")
    assert launch.main([str(script)]) == 2
    assert "add the clone to PYTHONPATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "fix"),
    [("regex", "install regex"), ("typing", "use the version of Python that this Megatron-LM needs: this is 3.")],
)
def test_a_loop_that_cannot_be_imported_says_what_to_install(missing, fix, tmp_path, capsys, monkeypatch):
    def import_module(name):
        raise ImportError(f"cannot import from {missing}", name=missing)

    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(launch.importlib, "import_module", import_module)
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("")
    assert launch.main([str(script)]) == 2
    assert fix in capsys.readouterr().err
