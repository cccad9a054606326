"""Which schedule a program gets, and which of Megatron's functions ``install`` replaces and ``uninstall`` restores."""

import inspect
import sys
import types
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from reference.megatron.importing import expected_warnings
from tests.megatron.conftest import MEGATRONS, OFF, ON

with expected_warnings():
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel.schedules as schedules

    import dualpipe.megatron.checkpoint
    import dualpipe.megatron.model
    import dualpipe.megatron.optimizer
    from dualpipe.megatron import installation
    from dualpipe.megatron.schedule import forward_backward_dualpipe

pytestmark = pytest.mark.usefixtures("uninstalled")


def held(training):
    return dict(vars(training))


# Your own training script


def test_with_the_flag_dualpipe_is_selected():
    assert installation.get_forward_backward_func(ON) is forward_backward_dualpipe
    assert installation.get_forward_backward_func(ON, pp_size=4, vp_size=None) is forward_backward_dualpipe


def test_with_the_flag_of_dualpipev_the_same_function_is_selected_and_follows_the_model():
    assert installation.get_forward_backward_func(SimpleNamespace(use_dualpipev=True)) is forward_backward_dualpipe


def test_late_w_of_the_arguments_is_passed_to_dualpipe():
    plain = SimpleNamespace(use_dualpipe=True, dualpipe_late_w="none")
    assert installation.get_forward_backward_func(plain) is forward_backward_dualpipe
    chosen = installation.get_forward_backward_func(SimpleNamespace(use_dualpipe=True, dualpipe_late_w="tail"))
    assert (chosen.func, chosen.keywords) == (forward_backward_dualpipe, {"late_w": "tail"})
    chosen = installation.get_forward_backward_func(SimpleNamespace(use_dualpipe=True, dualpipe_overlap_moe=True))
    assert (chosen.func, chosen.keywords) == (forward_backward_dualpipe, {"overlap_moe": True})


@pytest.mark.parametrize("settings", [OFF, SimpleNamespace(), None])
def test_without_the_flag_megatrons_own_function_is_selected(settings):
    chosen = installation.get_forward_backward_func(settings, pp_size=4)
    assert chosen is schedules.forward_backward_pipelining_without_interleaving
    chosen = installation.get_forward_backward_func(settings, 4, 2)
    assert chosen is schedules.forward_backward_pipelining_with_interleaving
    assert installation.get_forward_backward_func(settings, 1) is schedules.forward_backward_no_pipelining


def test_selecting_directly_gives_the_same_while_a_loop_is_patched():
    with installation.installed(ON):
        chosen = installation.get_forward_backward_func(OFF, pp_size=4)
    assert chosen is schedules.forward_backward_pipelining_without_interleaving


# A training loop


def test_install_replaces_a_function_under_every_name(training):
    installation.install(ON)
    for selector in (
        schedules.get_forward_backward_func,
        megatron.core.pipeline_parallel.get_forward_backward_func,
        training.get_forward_backward_func,
        training.their_name_for_it,
    ):
        assert selector(schedule_pg_collection=None) is forward_backward_dualpipe


def test_install_covers_later_imports():
    installation.install(ON)
    from megatron.core.pipeline_parallel import get_forward_backward_func

    assert get_forward_backward_func() is forward_backward_dualpipe


def test_a_second_install_covers_a_loop_imported_after_the_first(request):
    installation.install(ON)
    training = request.getfixturevalue("training")
    own = training.get_model
    installation.install(ON)
    assert training.get_model is not own
    installation.uninstall()
    assert training.get_model is own


def test_uninstall_restores_the_original_objects(training):
    before = held(training)
    installation.install(ON)
    assert held(training) != before
    installation.uninstall()
    assert held(training) == before
    assert all(held(training)[name] is value for name, value in before.items())


def test_a_second_install_wraps_nothing_twice(training):
    installation.install(ON)
    once = held(training)
    installation.install(ON)
    assert held(training) == once


def test_a_second_install_takes_the_new_arguments(training):
    installation.install(ON)
    installation.install(OFF)
    own = schedules.forward_backward_pipelining_without_interleaving
    assert training.get_forward_backward_func(pp_size=2) is own


def test_uninstall_without_install_changes_nothing(training):
    before = held(training)
    installation.uninstall()
    assert held(training) == before


def test_the_block_form_uninstalls_after_an_error(training):
    before = held(training)
    with pytest.raises(RuntimeError), installation.installed(ON):
        raise RuntimeError
    assert held(training) == before


def test_stand_ins_keep_name_and_signature(training):
    installation.install(ON)
    for now, own in (
        (training.get_forward_backward_func, MEGATRONS.selector),
        (training.get_megatron_optimizer, MEGATRONS.optimizer),
    ):
        assert now.__name__ == own.__name__
        assert inspect.signature(now) == inspect.signature(own)


# Without the flag, everything is Megatron's


def test_without_the_flag_a_patched_loop_runs_megatrons_own(training):
    installation.install(OFF)
    own = schedules.forward_backward_pipelining_without_interleaving
    assert training.get_forward_backward_func(pp_size=2) is own
    assert training.get_model("provider", wrap_with_ddp=False)[0] == "Megatron's model"


def test_arguments_without_the_flag_make_every_stand_in_call_the_original(training, monkeypatch):
    """Call every function that ``install`` replaces with the arguments of a program without DualPipe."""
    checkpointing = types.ModuleType("megatron.training.checkpointing")
    builders = types.ModuleType("megatron.training.models.dist_utils")
    called = []
    for module, name, _ in installation._REPLACED:
        if module in (checkpointing.__name__, builders.__name__):
            owner = checkpointing if module == checkpointing.__name__ else builders
            setattr(owner, name, lambda *_, name=name: called.append(name))
    monkeypatch.setitem(sys.modules, checkpointing.__name__, checkpointing)
    monkeypatch.setitem(sys.modules, builders.__name__, builders)
    monkeypatch.setattr(training, "get_megatron_optimizer", MEGATRONS.optimizer)
    installation.install(SimpleNamespace())
    for owner in (checkpointing, builders):
        for name in [name for name in vars(owner) if not name.startswith("__")]:
            getattr(owner, name)()
    assert called == [name for module, name, _ in installation._REPLACED if module == checkpointing.__name__] + [
        "unimodal_build_distributed_models"
    ]
    assert training.get_model("provider")[0] == "Megatron's model"
    own = schedules.forward_backward_pipelining_without_interleaving
    assert training.get_forward_backward_func(pp_size=2) is own


def test_a_loop_compares_the_replicas_before_it_saves(monkeypatch):
    checkpointing, calls = types.ModuleType("megatron.training.checkpointing"), []
    checkpointing.save_checkpoint = lambda iteration, model, optimizer: calls.append("saved")
    monkeypatch.setitem(sys.modules, checkpointing.__name__, checkpointing)
    monkeypatch.setattr(dualpipe.megatron.checkpoint, "require_equal_replicas", calls.append)
    monkeypatch.setattr(dualpipe.megatron.checkpoint, "random_stream_saved", lambda model: nullcontext())
    with installation.installed(ON):
        checkpointing.save_checkpoint(1, ["low", "high"], None)
    assert calls == [["low", "high"], "saved"]
    with installation.installed(OFF):
        checkpointing.save_checkpoint(1, ["low", "high"], None)
    assert calls[2:] == ["saved"]


def test_without_global_arguments_the_flag_is_off(training):
    installation.install()
    own = schedules.forward_backward_pipelining_without_interleaving
    assert training.get_forward_backward_func(pp_size=2) is own


def test_the_flag_is_read_from_the_global_arguments_once_they_are_parsed(training, monkeypatch):
    variables = types.ModuleType("megatron.training.global_vars")
    parsed = []

    def get_args():
        assert parsed, "args is not initialized."
        return parsed[0]

    variables.get_args = get_args
    monkeypatch.setitem(sys.modules, variables.__name__, variables)
    installation.install()
    own = schedules.forward_backward_pipelining_without_interleaving
    assert training.get_forward_backward_func(pp_size=2) is own
    parsed.append(ON)
    assert training.get_forward_backward_func(pp_size=2) is forward_backward_dualpipe


def test_dualpipes_own_optimizer_still_calls_megatrons(training):
    installation.install(ON)
    assert dualpipe.megatron.optimizer.get_megatron_optimizer is MEGATRONS.optimizer
