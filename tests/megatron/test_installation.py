"""Which schedule a program gets, and which of Megatron's functions ``install`` replaces and ``uninstall`` restores."""

import inspect
import sys
import types
from types import SimpleNamespace

import pytest

from dualpipe.errors import RuleError
from reference.megatron.importing import expected_warnings

with expected_warnings():
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel.schedules as schedules

    import dualpipe.megatron.checkpoint
    import dualpipe.megatron.model
    import dualpipe.megatron.optimizer
    from dualpipe.megatron import installation
    from dualpipe.megatron.schedule import forward_backward_dualpipe

MEGATRONS = SimpleNamespace(  # not names of this module, or they would be replaced as in any other
    selector=schedules.get_forward_backward_func, optimizer=megatron.core.optimizer.get_megatron_optimizer
)

ON = SimpleNamespace(
    use_dualpipe=True,
    pipeline_model_parallel_size=2,
    accumulate_allreduce_grads_in_fp32=True,
    check_for_nan_in_loss_and_grad=False,
    ddp_bucket_size=1000,
    overlap_grad_reduce=True,
)
OFF = SimpleNamespace(use_dualpipe=False)


@pytest.fixture(autouse=True)
def _everything_is_megatrons_again_afterwards():
    yield
    installation.uninstall()
    assert megatron.core.pipeline_parallel.get_forward_backward_func is MEGATRONS.selector
    assert schedules.get_forward_backward_func is MEGATRONS.selector
    assert megatron.core.optimizer.get_megatron_optimizer is MEGATRONS.optimizer


@pytest.fixture
def training(monkeypatch):
    """A training loop like Megatron-LM's: it imports the functions by name, and defines its own get_model."""
    loop = types.ModuleType("megatron.training.training")

    def get_model(model_provider_func, model_type="any", wrap_with_ddp=True, config=None, pg_collection=None):
        return "Megatron's model", model_provider_func, model_type, wrap_with_ddp, config

    loop.get_model = get_model
    loop.get_forward_backward_func = MEGATRONS.selector
    loop.their_name_for_it = MEGATRONS.selector
    loop.get_megatron_optimizer = MEGATRONS.optimizer
    monkeypatch.setitem(sys.modules, loop.__name__, loop)
    return loop


def held(training):
    return dict(vars(training))


# Your own training script


def test_with_the_flag_dualpipe_is_selected():
    assert installation.get_forward_backward_func(ON) is forward_backward_dualpipe
    assert installation.get_forward_backward_func(ON, pp_size=4, vp_size=None) is forward_backward_dualpipe


def test_late_w_of_the_arguments_is_passed_to_dualpipe():
    plain = SimpleNamespace(use_dualpipe=True, dualpipe_late_w="none")
    assert installation.get_forward_backward_func(plain) is forward_backward_dualpipe
    chosen = installation.get_forward_backward_func(SimpleNamespace(use_dualpipe=True, dualpipe_late_w="tail"))
    assert (chosen.func, chosen.keywords) == (forward_backward_dualpipe, {"late_w": "tail"})


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


# With the flag, the loop builds the model for DualPipe


class Layer:
    """The part of a model chunk that a loop reads."""

    def __init__(self):
        self.pg_collection = "the stage's"


@pytest.fixture
def built(monkeypatch):
    """Records the calls that would build the model."""
    calls = []

    def build_dualpipe_model(provider, ddp_config=None, **options):
        calls.append((provider, ddp_config, options))
        return [provider(pre_process=True, post_process=False), provider(pre_process=False, post_process=True)]

    def rank_groups(*_, **__):
        return "the rank's"

    monkeypatch.setattr(dualpipe.megatron.model, "build_dualpipe_model", build_dualpipe_model)
    monkeypatch.setattr(
        "megatron.core.process_groups_config.ProcessGroupCollection.use_mpu_process_groups", rank_groups
    )
    return calls


def test_get_model_builds_two_chunks_from_the_loops_arguments(training, built):
    installation.install(ON)
    calls = []

    def provider(pre_process, post_process, config):
        calls.append((pre_process, post_process, config))
        return Layer()

    model = training.get_model(provider, "decoder", config="given")
    assert calls == [(True, False, "given"), (False, True, "given")]
    assert [chunk.model_type for chunk in model] == ["decoder", "decoder"]
    assert ON.model_type == "decoder"
    ((_, ddp, options),) = built
    assert options == {"wrap_with_ddp": True, "data_parallel_random_init": False}
    assert (ddp.bucket_size, ddp.grad_reduce_in_fp32, ddp.overlap_grad_reduce) == (1000, True, True)
    assert ddp.check_for_nan_in_grad is False


def test_the_loop_reads_the_ranks_groups_from_a_chunk(training, built):
    installation.install(ON)
    chunk, _ = training.get_model(lambda **_: Layer())
    assert chunk.pg_collection == "the rank's"


def test_settings_that_would_train_wrongly_are_refused_before_building(training, built):
    installation.install(SimpleNamespace(**{**vars(ON), "mtp_num_layers": 1}))
    with pytest.raises(RuleError, match="mtp_num_layers is 1"):
        training.get_model(lambda **_: Layer())
    assert built == []


def test_the_model_builders_of_later_megatron_lm_build_two_chunks_too(built, monkeypatch):
    builders = types.ModuleType("megatron.training.models.dist_utils")

    def unimodal_build_distributed_models(
        build_model_func,
        transformer_config,
        pg_collection,
        ddp_config=None,
        wrap_with_ddp=True,
        data_parallel_random_init=True,
        pre_wrap_hook=None,
        model_type="decoder",
    ):
        return "Megatron's"

    builders.unimodal_build_distributed_models = unimodal_build_distributed_models
    monkeypatch.setitem(sys.modules, builders.__name__, builders)

    def hook(chunks):
        chunks[0].hooked = True  # and returns None, as Megatron-LM allows

    def build():
        return builders.unimodal_build_distributed_models(
            lambda **_: Layer(), "config", "groups", "ddp", pre_wrap_hook=hook
        )

    installation.install(OFF)
    assert build() == "Megatron's"
    installation.install(ON)
    model = build()
    assert [chunk.hooked for chunk in model] == [True, True]
    assert built[0][1:] == ("ddp", {"wrap_with_ddp": True, "data_parallel_random_init": True})


def test_the_distributed_optimizer_is_saved_parameter_by_parameter(monkeypatch):
    checkpointing = types.ModuleType("megatron.training.checkpointing")
    checkpointing._build_sharded_state_dict_metadata = lambda args: dict(args)
    monkeypatch.setitem(sys.modules, checkpointing.__name__, checkpointing)
    efficient = "distrib_optim_fully_reshardable_mem_efficient"
    sharded, plain = {"distrib_optim_sharding_type": "dp_reshardable", efficient: True, "more": 1}, {"more": 1}
    with installation.installed(ON):
        built = checkpointing._build_sharded_state_dict_metadata
        assert built(sharded) == {"distrib_optim_sharding_type": "fully_reshardable", "more": 1}
        assert built(plain) == plain
    with installation.installed(OFF):
        assert checkpointing._build_sharded_state_dict_metadata(sharded) == sharded


def test_after_a_loop_loads_a_checkpoint_the_random_numbers_of_lane_down_are_restored(monkeypatch):
    checkpointing = types.ModuleType("megatron.training.checkpointing")
    calls = []

    def load_checkpoint(ddp_model, optimizer, opt_param_scheduler, strict=True):
        calls.append("Megatron's")
        return 7, 0

    checkpointing.load_checkpoint = load_checkpoint
    monkeypatch.setitem(sys.modules, checkpointing.__name__, checkpointing)
    monkeypatch.setattr(dualpipe.megatron.checkpoint, "resume_random_stream", calls.append)
    with installation.installed(ON):
        assert checkpointing.load_checkpoint(["low", "high"], None, None) == (7, 0)
    assert calls == ["Megatron's", ["low", "high"]]
    with installation.installed(OFF):
        checkpointing.load_checkpoint(["low"], None, None)
    assert calls[2:] == ["Megatron's"]


def test_the_optimizer_is_built_over_both_chunks(training, monkeypatch):
    calls = []
    monkeypatch.setattr(
        dualpipe.megatron.optimizer, "build_dualpipe_optimizer", lambda *given, **named: calls.append((given, named))
    )
    installation.install(ON)
    training.get_megatron_optimizer("config", ["low", "high"], config_overrides={}, use_gloo_process_groups=True)
    assert calls == [(("config", ["low", "high"]), {"config_overrides": {}})]


def test_dualpipes_own_optimizer_still_calls_megatrons(training):
    installation.install(ON)
    assert dualpipe.megatron.optimizer.get_megatron_optimizer is MEGATRONS.optimizer
