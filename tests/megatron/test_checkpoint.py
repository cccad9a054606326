"""Checkpoints: one main replica of each shard, independent of DualPipe, and training that resumes bitwise.

saved with        DualPipe, 2 stages        1F1B, 4 stages
loaded with       1F1B, 1, 2 or 4 stages    DualPipe, 2 or 4 stages
"""

from contextlib import contextmanager
from functools import cache
from unittest import mock

import pytest
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from dualpipe.megatron import checkpoint, load_checkpoint, model, sharded_state_dict
from tests.megatron.example import example, in_ranks, pretrain

TWO_STAGES = "--pipeline-model-parallel-size 2 "
DUALPIPE = TWO_STAGES + "--use-dualpipe "
KINDS = {
    "dropout": "--dropout 0.1",
    "distributed optimizer in bf16": "--use-distributed-optimizer --bf16 --overlap-grad-reduce --clip-grad 0",
    "experts": "--num-experts 2",
    "tied embeddings": "--tied-embeddings --use-distributed-optimizer",
    "multi-token prediction": "--mtp-num-layers 1 --num-experts 2 --use-distributed-optimizer --overlap-grad-reduce",
    "experts under the distributed optimizer": "--num-experts 2 --use-distributed-optimizer --clip-grad 0",
}


LONG = "experts", "experts under the distributed optimizer", "tied embeddings", "multi-token prediction"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Train each kind once: the digest after 3 iterations, and a folder with only the checkpoint of iteration 2."""

    def save(args, chunks, optimizer, common, real=example.save):
        if common["iteration"] == 2:
            real(args, chunks, optimizer, common)

    @cache
    def train(kind):
        folder = tmp_path_factory.mktemp("saved")
        with mock.patch.object(example, "save", save):
            whole = pretrain(2, f"{DUALPIPE}{KINDS[kind]} --train-iters 3 --save {folder}")
        return whole, folder

    return train


@pytest.fixture(scope="module")
def saved(interrupted):
    return interrupted("dropout")


@pytest.fixture(scope="module")
def at_two(saved):
    """The digest of the weights that the checkpoint holds."""
    return resumed(saved[1], iterations=2)


def resumed(folder, options=KINDS["dropout"], ranks=2, schedule=DUALPIPE, iterations=3):
    return pretrain(ranks, f"{schedule}{options} --train-iters {iterations} --load {folder}")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long) if kind in LONG else kind for kind in KINDS]
)
def test_resumed_training_equals_uninterrupted_training_bitwise(kind, interrupted):
    whole, folder = interrupted(kind)
    assert resumed(folder, KINDS[kind]) == whole


def test_the_iterations_after_the_checkpoint_change_the_weights(saved, at_two):
    assert at_two != saved[0]


@pytest.mark.parametrize("stages", [1, 4])
def test_1f1b_loads_what_dualpipe_saved_at_any_pipeline_size(stages, saved, at_two):
    _, folder = saved
    loaded = resumed(folder, ranks=stages, schedule=f"--pipeline-model-parallel-size {stages} ", iterations=2)
    assert loaded == at_two


def test_1f1b_resumes_dualpipe_bitwise(saved):
    whole, folder = saved
    assert resumed(folder, ranks=4, schedule=TWO_STAGES) == whole


@pytest.mark.parametrize("kind", [pytest.param("dropout", marks=pytest.mark.long), "distributed optimizer in bf16"])
def test_dualpipe_loads_what_1f1b_saved_at_another_pipeline_size(kind, tmp_path):
    four = "--pipeline-model-parallel-size 4 "
    true = pretrain(4, f"{four}{KINDS[kind]} --train-iters 2 --save {tmp_path}")
    assert resumed(tmp_path, KINDS[kind], iterations=2) == true
    if kind == "dropout":
        assert resumed(tmp_path, KINDS[kind], ranks=4, schedule=four + "--use-dualpipe ", iterations=2) == true


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tied embeddings", "multi-token prediction"])
def test_copies_of_the_embedding_load_at_any_pipeline_size_and_with_every_schedule(kind, interrupted):
    _, folder = interrupted(kind)
    at_two = resumed(folder, KINDS[kind], iterations=2)
    four = "--pipeline-model-parallel-size 4 "
    assert resumed(folder, KINDS[kind], ranks=4, schedule=four, iterations=2) == at_two
    assert resumed(folder, KINDS[kind], ranks=4, schedule=four + "--use-dualpipe ", iterations=2) == at_two
    assert resumed(folder, KINDS[kind], ranks=2, schedule=TWO_STAGES + "--use-dualpipev ", iterations=2) == at_two


def integrity(args):
    """Run megatron-core's own check before a save: exactly one main replica holds each shard."""
    parallel_state.initialize_model_parallel(1, 2, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    chunks, optimizer = example.build(args, "cpu")
    shards, _ = save_preprocess(sharded_state_dict(chunks, optimizer, is_loading=True), validate_access_integrity=True)
    return len({shard.key for shard in nested_values(shards)})


@pytest.mark.parametrize("kind", ["dropout", "experts under the distributed optimizer", "multi-token prediction"])
def test_every_shard_has_one_main_replica(kind):
    assert in_ranks(4, f"{DUALPIPE}{KINDS[kind]}", integrity) > 40


def test_with_the_groups_of_the_rank_every_shard_has_two_main_replicas(monkeypatch):
    monkeypatch.setattr(model, "_shard_over_stage", lambda module, collection: None)
    with pytest.raises(RuntimeError, match="CheckpointingException: Invalid access pattern"):
        in_ranks(2, DUALPIPE, integrity)


def test_an_optimizer_that_was_not_loaded_changes_the_result(saved, monkeypatch):
    whole, folder = saved
    monkeypatch.setattr(example, "load_checkpoint", lambda path, chunks, optimizer: load_checkpoint(path, chunks))
    assert resumed(folder) != whole


@pytest.mark.parametrize(
    ("module", "name"), [(checkpoint, "restore"), (checkpoint, "resume_random_stream")], ids=["lane >", "lane <"]
)
def test_random_states_that_were_not_restored_change_the_result(module, name, saved, monkeypatch):
    whole, folder = saved
    monkeypatch.setattr(module, name, lambda given: None)
    assert resumed(folder) != whole


def test_one_step_counter_for_all_parameters_changes_the_result(interrupted, monkeypatch):
    @contextmanager
    def shares_the_counter(optimizer):
        with checkpoint_loading(optimizer):
            yield
        for part in optimizer.chained_optimizers:
            states = list(part.optimizer.state.values())
            for state in states:
                state["step"] = states[0]["step"]

    checkpoint_loading = checkpoint.loading
    kind = "distributed optimizer in bf16"
    whole, folder = interrupted(kind)
    monkeypatch.setattr(checkpoint, "loading", shares_the_counter)
    assert resumed(folder, KINDS[kind]) != whole


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    def body(args):
        load_checkpoint(tmp_path, [])

    with pytest.raises(RuntimeError, match="a checkpoint must be a folder that save_checkpoint wrote"):
        in_ranks(1, "", body)


@pytest.mark.parametrize("kind", ["dp_reshardable", "fully_sharded_model_space"])
def test_formats_that_need_one_data_parallel_group_are_refused(kind):
    def body(args):
        parallel_state.initialize_model_parallel(1, 2, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1)
        _, optimizer = example.build(args, "cpu")
        optimizer.sharded_state_dict({}, metadata={"distrib_optim_sharding_type": kind})

    with pytest.raises(RuntimeError, match=f"got {kind}; set metadata"):
        in_ranks(2, f"{DUALPIPE} --use-distributed-optimizer", body)
