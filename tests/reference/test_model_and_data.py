"""The decoder and its training text."""

import pytest
import torch
from torch import nn

from reference.data import batches, corpus, training_data
from reference.model import ModelConfig, ModelError, build_stage, build_stages, criterion
from tests.reference.trials import SMALL, same


def test_a_stage_built_alone_has_the_weights_it_has_in_the_whole_model():
    whole = build_stages(SMALL, 4, seed=1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for stage in (3, 0, 2, 1):
        assert same(build_stage(SMALL, stage, 4, seed=1).state_dict(), whole[stage].state_dict())
    assert torch.equal(torch.get_rng_state(), before)  # the global random state was not used


def test_another_seed_or_stage_has_other_weights():
    name = "block0.attention.qkv.weight"
    drawn = [build_stage(SMALL, stage, 4, seed).state_dict()[name] for seed in (1, 2) for stage in (1, 2)]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_low_precision_weights_are_rounded_float64_weights():
    exact = build_stage(ModelConfig(16, 2, 8, dtype=torch.float64), 1, 2, seed=0).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        rounded = build_stage(ModelConfig(16, 2, 8, dtype=dtype), 1, 2, seed=0).state_dict()
        assert same({name: weight.to(dtype) for name, weight in exact.items()}, rounded)


def test_the_first_stage_has_the_embedding_and_the_last_one_the_output():
    def layers(stage, stages):
        return [name for name, _ in build_stage(SMALL, stage, stages, seed=0).named_children()]

    assert [layers(stage, 3) for stage in range(3)] == [
        ["embedding", "block0"],
        ["block0"],
        ["block0", "norm", "output"],
    ]
    assert layers(0, 1) == ["embedding", "block0", "norm", "output"]


def test_the_model_has_stock_layers_with_biases_and_an_untied_output():
    model = nn.Sequential(*build_stages(SMALL, 2, seed=0))
    kinds = {type(layer) for layer in model.modules() if not list(layer.children())}
    assert kinds == {nn.Linear, nn.LayerNorm, nn.Embedding, nn.GELU}
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.LayerNorm)]
    assert all(layer.bias is not None for layer in layers)
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.named_parameters(remove_duplicate=False)))


def test_attention_sees_the_past_and_not_the_future():
    model = nn.Sequential(*build_stages(SMALL, 2, seed=0))
    tokens = torch.arange(16).view(2, 8)
    changed = tokens.clone()
    changed[:, 5] += 100
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 7], after[:, 7])


def test_the_loss_is_the_mean_over_tokens_times_the_scale():
    logits, targets = torch.zeros(2, 8, 256, dtype=torch.bfloat16), torch.zeros(2, 8, dtype=torch.int64)
    loss = criterion(logits, targets, scale=0.25)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(256.0).log() / 4)  # tolerance: two routes to a logarithm
    assert criterion(logits.double(), targets, 1.0).dtype == torch.float64


@pytest.mark.parametrize("sizes", [{"hidden": 30, "heads": 4}, {"sequence": 0}, {"dtype": torch.int64}])
def test_impossible_sizes_are_rejected_with_a_fix(sizes):
    with pytest.raises(ModelError) as error:
        ModelConfig(**sizes)
    assert error.value.fix


def test_a_stage_beyond_the_model_is_rejected():
    with pytest.raises(ModelError, match="got stage 2 of 2"):
        build_stage(SMALL, 2, 2, seed=0)


def test_the_text_is_the_documentation_of_the_standard_library():
    text = bytes(corpus().to(torch.uint8).tolist()).decode()
    assert "The *assert* statement" in text or 'The "assert" statement' in text
    assert len(text) > 100_000


def test_targets_are_the_text_one_byte_later():
    text = bytes(corpus().to(torch.uint8).tolist())
    for tokens, targets in batches(3, 2, 16, seed=0):
        assert tokens.shape == targets.shape == (2, 16)
        assert tokens.dtype == targets.dtype == torch.int64
        for row, following in zip(tokens.tolist(), targets.tolist(), strict=True):
            assert bytes([*row, following[-1]]) in text
            assert row[1:] == following[:-1]


def test_every_batch_has_storage_of_its_own():
    drawn = [tensor for batch in batches(4, 2, 8, seed=0) for tensor in batch]
    assert all(t.is_contiguous() and t.storage_offset() == 0 for t in drawn)
    assert len({t.untyped_storage().data_ptr() for t in drawn}) == len(drawn)


def test_data_depends_on_the_seed_and_differs_between_steps():
    first, again, other = (training_data(2, [2, 3], 2, 8, seed) for seed in (1, 1, 2))
    assert [[len(lane) for lane in step] for step in first] == [[2, 3], [2, 3]]

    def flat(steps):
        return [batch.tokens for step in steps for lane in step for batch in lane]

    assert all(map(torch.equal, flat(first), flat(again)))
    assert not any(map(torch.equal, flat(first), flat(other)))
    assert not any(torch.equal(a, b) for i, a in enumerate(flat(first)) for b in flat(first)[:i])
