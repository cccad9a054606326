"""The flag, and the rules for the other settings: each rule is broken at least once, and a clean run passes."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dualpipe.errors import RuleError
from dualpipe.megatron.arguments import add_dualpipe_args, validate_dualpipe_args, validate_dualpipe_config
from dualpipe.megatron.rules import RULES, violations
from dualpipe.megatron.violations import SettingsError

CLEAN = {
    "use_dualpipe": True,
    "pipeline_model_parallel_size": 4,
    "tensor_model_parallel_size": 2,
    "data_parallel_size": 2,
    "micro_batch_size": 3,
    "global_batch_size": 48,  # 8 microbatches
    "rampup_batch_size": None,
    "virtual_pipeline_model_parallel_size": None,
    "untie_embeddings_and_output_weights": True,
    "mtp_num_layers": None,
    "moe_router_load_balancing_type": "aux_loss",
    "optimizer": "adam",
    "cuda_graph_impl": "none",
    "num_distributed_optimizer_instances": 1,
    "ckpt_format": "torch_dist",
    "save": "checkpoints",
    "load": None,
}


def given(**changes):
    return SimpleNamespace(**{**CLEAN, **changes})


def broken(args):
    with pytest.raises(SettingsError) as caught:
        validate_dualpipe_args(args)
    return caught.value.violations


TIED = {"untie_embeddings_and_output_weights": False}

# The start of a rule, settings that break it, and a part of what the message must report
PLANTED = [
    ("the pipeline size", {"pipeline_model_parallel_size": 3}, "pipeline_model_parallel_size is 3"),
    ("the pipeline size", {"pipeline_model_parallel_size": 1}, "is 1"),
    ("no virtual", {"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size is 2"),
    ("no virtual", {"virtual_pipeline_model_parallel_size": 1}, "is 1"),
    ("no virtual", {"num_layers_per_virtual_pipeline_stage": 1}, "num_layers_per_virtual"),
    ("no virtual", {"num_virtual_stages_per_pipeline_rank": 2}, "num_virtual_stages"),
    ("dualpipe_late_w is none, tail, all", {"dualpipe_late_w": "tial"}, "dualpipe_late_w is 'tial'"),
    ("DualPipe and DualPipeV", {"use_dualpipev": True}, "use_dualpipev is True"),
    ("Megatron's own split", {"moe_fb_overlap": True}, "moe_fb_overlap is True"),
    ("no initialization on the meta", {"init_model_with_meta_device": True}, "init_model_with_meta_device"),
    ("no distillation", {"freeze_all_layers": True}, "freeze_all_layers"),
    ("the number of microbatches", {"global_batch_size": 54}, "is 9 microbatches, which is odd"),
    ("the number of microbatches", {"global_batch_size": 36}, "is 6 microbatches for pipeline size 4"),
    ("the number of microbatches", {"global_batch_size": 50}, "leaves 2 samples over"),
    ("multi-token prediction layers", {"pipeline_model_parallel_layout": "Et|t|tm|L"}, "'Et|t|tm|L'"),
    ("no checkpoints of a model", {**TIED, "mtp_num_layers": 1}, "save is 'checkpoints'"),
    ("no overlapped reduction", {**TIED, "mtp_num_layers": 1, "save": None, "overlap_grad_reduce": True}, "overlap_gr"),
    ("the model must be a single decoder", {"decoder_seq_length": 128}, "decoder_seq_length is 128"),
    ("the model must be a single decoder", {"encoder_pipeline_model_parallel_size": 2}, "encoder_pipeline"),
    ("no hyper-connections", {"enable_mhc_connections": True}, "enable_mhc"),
    ("no vision", {"vision_pretraining": True}, "vision_pretraining"),
    ("no quantile balancing", {"moe_router_load_balancing_type": "quantile_balancing"}, "quantile_balancing"),
    (
        "no quantile balancing",
        {"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]},
        "'aux_loss', 'qua",
    ),
    ("no paged stash", {"moe_paged_stash": True}, "moe_paged_stash"),
    ("no paged stash", {"moe_expert_rank_capacity_factor": 1.5}, "1.5"),
    ("no upcycling", {"moe_use_upcycling": True}, "moe_use_upcycling"),
    ("no deferred weight gradients", {"defer_embedding_wgrad_compute": True}, "defer_embedding"),
    ("Megatron's own split", {"overlap_moe_expert_parallel_comm": True}, "overlap_moe"),
    ("Megatron's own split", {"overlap_dispatch_backward_with_experts_wgrad": True}, "overlap_dispatch"),
    ("no CUDA graphs", {"cuda_graph_impl": "local"}, "cuda_graph_impl is 'local'"),
    ("no CUDA graphs", {"enable_cuda_graph": True}, "enable_cuda_graph"),
    ("no CUDA graphs", {"external_cuda_graph": True}, "external_cuda_graph"),
    ("no offloading", {"cpu_offloading": True}, "cpu_offloading"),
    ("no offloading", {"fine_grained_activation_offloading": True}, "fine_grained"),
    ("all microbatches must be recomputed", {"num_microbatches_with_partial_activation_checkpoints": 0}, "is 0"),
    ("data parallelism", {"use_megatron_fsdp": True}, "use_megatron_fsdp"),
    ("data parallelism", {"use_custom_fsdp": True}, "use_custom_fsdp"),
    ("data parallelism", {"use_torch_fsdp2": True}, "use_torch_fsdp2"),
    ("parameters must be gathered before", {"overlap_param_gather_with_optimizer_step": True}, "overlap_param_gather"),
    ("parameters must be gathered over", {"create_all_gather_group": True}, "create_all_gather_group"),
    ("the optimizer must shard", {"optimizer": "dist_muon"}, "dist_muon"),
    ("the optimizer must shard", {"use_layer_wise_distributed_optimizer": True}, "layer_wise"),
    ("weights must not be sharded", {"gtp_weight_remat_size": 2}, "gtp_weight_remat_size is 2"),
    ("weights must not be sharded", {"expert_gtp_weight_remat_size": 2}, "expert_gtp"),
    ("no clipping", {"qk_clip": True, "use_distributed_optimizer": True}, "qk_clip"),
    ("fp8 scales must", {"fp8": "hybrid", "fp8_recipe": "delayed"}, "'delayed'"),
    ("fp8 scales must", {"fp8": "e4m3"}, "fp8 is 'e4m3' with fp8_recipe None"),
    ("sequences must be split", {"hybrid_context_parallel": True}, "hybrid_context_parallel"),
    ("the checkpoint format", {"ckpt_format": "torch"}, "ckpt_format is 'torch'"),
    ("no distillation", {"logits_save_dir": "there"}, "logits_save_dir"),
    ("no distillation", {"export_kd_teacher_load": "there"}, "export_kd"),
    ("no reinforcement", {"perform_rl_step": True}, "perform_rl_step"),
]


@pytest.mark.parametrize(("name", "changes", "got"), PLANTED)
def test_a_broken_rule_is_reported_alone_with_the_setting_that_breaks_it(name, changes, got):
    (violation,) = broken(given(**changes))
    assert violation.rule.startswith(name)
    assert got in violation.got
    assert violation.fix


V = {"use_dualpipe": False, "use_dualpipev": True, "pipeline_model_parallel_size": 3}


@pytest.mark.parametrize(
    ("name", "changes", "got"),
    [
        ("the number of microbatches must be at", {"global_batch_size": 30}, "is 5 microbatches for pipeline size 3"),
        ("no virtual pipeline", {"virtual_pipeline_model_parallel_size": 2}, "is 2"),
        ("data parallelism", {"use_megatron_fsdp": True}, "use_megatron_fsdp"),
        ("the checkpoint format", {"ckpt_format": "torch"}, "ckpt_format is 'torch'"),
    ],
)
def test_a_rule_of_dualpipev_is_reported_with_its_own_reason(name, changes, got):
    (violation,) = broken(given(**{**V, "global_batch_size": 42, **changes}))
    assert violation.rule.startswith(name)
    assert got in violation.got
    assert "lane" not in violation.rule


def test_dualpipev_needs_neither_an_even_pipeline_nor_an_even_number_of_microbatches():
    parsed = {"pipeline_model_parallel_layout": "Et|t|t|t|t|tL", "virtual_pipeline_model_parallel_size": 2}
    validate_dualpipe_args(given(**V, global_batch_size=42, **parsed))


def test_the_error_names_the_flag_of_dualpipev():
    with pytest.raises(SettingsError, match=r"^--use-dualpipev is incompatible with 2 settings"):
        validate_dualpipe_args(given(**V, global_batch_size=42, perform_rl_step=True, vision_pretraining=True))


def test_what_the_upstream_pull_request_refuses_is_a_warning(caplog):
    validate_dualpipe_args(given(**TIED))
    validate_dualpipe_args(given(mtp_num_layers=1))
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "dualpipe: embedding and output weights should be untied",
        "dualpipe: there should be no multi-token prediction",
    ]


def test_every_rule_is_broken_above():
    names = {name for name, _, _ in PLANTED}
    assert [rule.name for rule in RULES if not any(rule.name.startswith(name) for name in names)] == []


def test_a_clean_run_passes():
    assert validate_dualpipe_args(given()) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline_model_parallel_size": 2},
        {"num_virtual_stages_per_pipeline_rank": 1},
        {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]},
        {"overlap_param_gather": True, "align_param_gather": True},  # gathered as the forward needs them, as in 1F1B
        {"ddp_average_in_collective": True, "average_in_collective": True},  # the stage's group counts both replicas
        {"overlap_p2p_comm": True},  # has no effect: messages follow the schedule's order
        {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
        {"decoder_first_pipeline_num_layers": 1, "num_layers_in_first_pipeline_stage": 1},
        {"pipeline_model_parallel_layout": "Et|t|t|tmL", "mtp_num_layers": 1},
        TIED,
        {"fp8": "hybrid", "fp8_recipe": "blockwise"},
        {"ckpt_format": "torch", "save": None},
        {"eval_global_batch_size": 3, "eval_micro_batch_size": 1},  # any number of microbatches can be evaluated
        {"moe_router_enable_expert_bias": True},
        {"global_batch_size": None},  # a config has none
    ],
)
def test_settings_that_dualpipe_can_train_with_pass(changes):
    validate_dualpipe_args(given(**changes))


def test_without_the_flag_nothing_is_checked_or_changed():
    everything = {name: value for _, changes, _ in PLANTED for name, value in changes.items()}
    everything |= {"use_dualpipe": False, "use_dualpipev": False}
    before = given(**everything)
    after = given(**everything)
    validate_dualpipe_args(after)
    assert vars(after) == vars(before)
    del after.use_dualpipe
    validate_dualpipe_args(after)


def test_the_check_changes_no_argument():
    args = given()
    validate_dualpipe_args(args)
    assert vars(args) == vars(given())


def test_all_broken_rules_are_in_one_message():
    with pytest.raises(RuleError) as caught:
        validate_dualpipe_args(given(pipeline_model_parallel_size=3, vision_pretraining=True, use_dualpipev=True))
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "--use-dualpipe is incompatible with 3 settings: they are listed below; "
        "change each of them or leave out the flag"
    )
    assert [line[:27] for line in lines[1:]] == [
        "  - the pipeline size must ",
        "  - DualPipe and DualPipeV ",
        "  - no vision pretraining (",
    ]


def test_one_broken_rule_reads_as_one_sentence():
    (violation,) = broken(given(use_dualpipev=True))
    assert str(violation) == (
        "DualPipe and DualPipeV exclude each other (they place stages differently): use_dualpipev is True; "
        "leave out --use-dualpipev"
    )


# Batch sizes: data parallel size 2 and micro-batch size 3, so 6 samples are one microbatch on each rank


def rampup(start, increment, final):
    found = violations(given(rampup_batch_size=[str(start), str(increment), "1000"], global_batch_size=final))
    return found[0].got if found else None


def test_every_batch_size_of_a_ramp_up_is_checked():
    assert rampup(48, 12, 96) is None
    assert "= 54 over" in rampup(48, 6, 96)
    assert "= 36 over" in rampup(36, 12, 96)


def test_the_batch_size_after_a_ramp_up_is_checked():
    assert "--global-batch-size = 102 over" in rampup(48, 12, 102)


def test_a_ramp_up_without_an_increment_is_refused():
    assert "increment above 0" in rampup(48, 0, 96)


def test_a_batch_that_may_be_decreased_is_checked_as_decreased():
    validate_dualpipe_args(given(global_batch_size=50, decrease_batch_size_if_needed=True))
    (violation,) = broken(given(global_batch_size=47, decrease_batch_size_if_needed=True))
    assert "is 7 microbatches" in violation.got


def test_every_entry_of_a_schedule_of_batch_sizes_is_checked():
    validate_dualpipe_args(given(step_batch_size_schedule="0:48 250B:96", global_batch_size=1))
    (violation,) = broken(given(step_batch_size_schedule="0:48 250B:54,1T:96"))
    assert "at 250B:54 = 54 over" in violation.got


def test_a_schedule_of_batch_sizes_that_cannot_be_read_is_refused():
    (violation,) = broken(given(step_batch_size_schedule="0:many"))
    assert "'many'" in violation.got


def test_an_unset_data_parallel_size_is_computed_from_the_world_size():
    args = given(world_size=16, context_parallel_size=1)
    del args.data_parallel_size
    validate_dualpipe_args(args)
    args.world_size = 32
    (violation,) = broken(args)
    assert "data parallel size 4" in violation.got


# The flag


def test_the_flag_is_off_unless_given():
    parser = add_dualpipe_args(argparse.ArgumentParser())
    assert parser.parse_args([]).use_dualpipe is False
    assert parser.parse_args(["--use-dualpipe"]).use_dualpipe is True


def test_late_w_has_a_flag_of_its_own():
    parser = add_dualpipe_args(argparse.ArgumentParser())
    assert parser.parse_args([]).dualpipe_late_w == "none"
    assert parser.parse_args(["--use-dualpipe", "--dualpipe-late-w", "all"]).dualpipe_late_w == "all"
    assert parser.parse_args(["--use-dualpipe", "--dualpipe-overlap-moe"]).dualpipe_overlap_moe
    assert not parser.parse_args(["--use-dualpipe"]).dualpipe_overlap_moe
    with pytest.raises(SystemExit):
        parser.parse_args(["--dualpipe-late-w", "tial"])
    validate_dualpipe_args(given(dualpipe_late_w="tail"))


def test_a_parser_that_already_has_the_flag_is_not_changed():
    parser = argparse.ArgumentParser()
    own = parser.add_argument("--use-dualpipe", action="store_true", help="theirs")
    assert add_dualpipe_args(add_dualpipe_args(parser)) is parser
    assert [action.help for action in parser._actions if action.dest == "use_dualpipe"] == [own.help]


def test_a_parser_that_has_only_use_dualpipev_gets_the_flag():
    parser = argparse.ArgumentParser()
    parser.add_argument("--use-dualpipev", action="store_true")
    assert add_dualpipe_args(parser).parse_args(["--use-dualpipe"]).use_dualpipe is True


# The same table on configs


def test_the_rules_read_a_config_and_a_ddp_config_too():
    config = SimpleNamespace(pipeline_model_parallel_size=4, mtp_num_layers=None, fp8=None)
    ddp = SimpleNamespace(use_megatron_fsdp=False)
    validate_dualpipe_config(config, ddp)
    config.defer_embedding_wgrad_compute = True
    ddp.use_megatron_fsdp = True
    with pytest.raises(SettingsError) as caught:
        validate_dualpipe_config(config, ddp)
    assert len(caught.value.violations) == 2


def test_the_rules_need_neither_torch_nor_megatron():
    code = "import sys, dualpipe.megatron.arguments; print(*sorted({'torch', 'megatron'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == []
