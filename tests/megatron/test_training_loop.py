"""With the flag, a training loop builds, saves and loads its model for DualPipe, through Megatron's own signatures."""

import inspect
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dualpipe.errors import RuleError
from reference.megatron.importing import expected_warnings
from tests.megatron.conftest import OFF, ON
from tests.megatron.ranks import CASE, on_each_rank
from tests.megatron.test_groups import config

with expected_warnings():
    import dualpipe.megatron.checkpoint
    import dualpipe.megatron.model
    import dualpipe.megatron.optimizer
    from dualpipe.megatron import installation
    from dualpipe.megatron.schedule import forward_backward_dualpipe as step

pytestmark = pytest.mark.usefixtures("uninstalled")


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
    assert options == {"schedule": "dualpipe", "wrap_with_ddp": True, "data_parallel_random_init": False}
    assert (ddp.bucket_size, ddp.grad_reduce_in_fp32, ddp.overlap_grad_reduce) == (1000, True, True)
    assert ddp.check_for_nan_in_grad is False


def test_with_dualpipev_the_model_is_built_for_twice_the_pipeline_ranks(training, built):
    args = SimpleNamespace(use_dualpipev=True, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    args.pipeline_model_parallel_layout = "Et|t|t|tL"  # Megatron-LM's parser makes a virtual pipeline of it
    installation.install(args)
    given = config(num_layers=4, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|t|t|tL")
    seen = []

    def provider(pre_process, post_process, config):
        seen.append((args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size, config))
        return Layer()

    training.get_model(provider, config=given)
    assert seen == [(4, None, given)] * 2
    assert (args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size) == (2, 2)
    assert built[0][2]["schedule"] == "dualpipev"
    assert (given.pipeline_model_parallel_size, given.virtual_pipeline_model_parallel_size) == (4, None)
    assert [len(part[0]) for part in given.pipeline_model_parallel_layout.layout] == [2, 1, 1, 2]


def test_the_loop_reads_the_ranks_groups_from_a_chunk(training, built):
    installation.install(ON)
    chunk, _ = training.get_model(lambda **_: Layer())
    assert chunk.pg_collection == "the rank's"


def test_settings_that_would_train_wrongly_are_refused_before_building(training, built):
    installation.install(SimpleNamespace(**{**vars(ON), "vision_pretraining": True}))
    with pytest.raises(RuleError, match="vision_pretraining is True"):
        training.get_model(lambda **_: Layer())
    assert built == []


@pytest.fixture
def flagscale(monkeypatch):
    """A module of the shape of FlagScale's loop: its ``get_model`` takes no config and passes no groups."""
    loop = types.ModuleType("flagscale.train.train")

    def get_model(model_provider_func, model_type="any", wrap_with_ddp=True):
        return "FlagScale's model"

    loop.get_model = get_model
    monkeypatch.setitem(sys.modules, loop.__name__, loop)
    return loop


def test_flagscales_own_get_model_builds_two_chunks_too(flagscale, built):
    installation.install(OFF)
    assert flagscale.get_model(lambda **_: Layer()) == "FlagScale's model"
    installation.install(ON)
    seen = []

    def provider(pre_process=True, post_process=True, vp_stage=None, pg_collection=None):
        seen.append((pre_process, post_process))
        return Layer()

    model = flagscale.get_model(provider, "decoder")
    assert seen == [(True, False), (False, True)]
    assert [chunk.model_type for chunk in model] == ["decoder", "decoder"]
    assert "pg_collection" in inspect.signature(built[0][0]).parameters


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"use_dualpipe": False, "use_dualpipev": True}, "selects FlagScale's own schedule"),
        ({"peft_type": "lora"}, "PEFT changes the model"),
    ],
)
def test_what_flagscale_changes_itself_is_refused(settings, error, flagscale, built):
    installation.install(SimpleNamespace(**{**vars(ON), **settings}))
    with pytest.raises(RuleError, match=error):
        flagscale.get_model(lambda **_: Layer())
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
    assert built[0][1:] == ("ddp", {"schedule": "dualpipe", "wrap_with_ddp": True, "data_parallel_random_init": True})


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


def test_chunks_that_show_the_ranks_groups_still_cast_like_their_stage():
    """The loop reads the rank's groups from the chunk; Float16Module reads those of its stage."""

    def body(model, **keywords):
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import get_attr_wrapped_model, unwrap_model

        from dualpipe.megatron.training_loop import _show_groups_of_rank

        for chunk in model:
            _show_groups_of_rank(chunk)
        own = ProcessGroupCollection.use_mpu_process_groups().pp
        assert all(get_attr_wrapped_model(chunk, "pg_collection").pp is own for chunk in model)
        assert all(unwrap_model(chunk).pg_collection.pp is own for chunk in model)
        return len(step(model=model, **keywords))

    assert on_each_rank(body, replace(CASE, dtype="bf16")) == [0, CASE.count]
