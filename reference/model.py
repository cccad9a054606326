"""A small decoder, cut into stages that any process can build by itself.

::

    stage 0      embedding   block ...
    stage s                  block ...
    last stage               block ...   norm   output

The layers are stock ``nn.Linear``, ``nn.LayerNorm`` and ``nn.Embedding``.  Attention is written out, so that two runs
cannot use different attention kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.utils import skip_init as _skip_init

from dualpipe.errors import RuleError

skip_init: Callable[..., nn.Module] = _skip_init
"""Build a layer without initialising its weights, and so without using the global random state."""


class ModelError(RuleError):
    """A model that cannot be built."""


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the decoder and of its microbatches.  The defaults are those of ``dualpipe verify``.

    ``hidden`` is the width of a token's vector, ``batch`` the number of sequences in a microbatch, ``sequence`` the
    number of tokens in each, ``vocab`` the number of different tokens.

    Raises ``ModelError`` if a size is below 1, if ``hidden`` is not a multiple of ``heads``, or if ``dtype`` is not a
    floating-point type.
    """

    hidden: int = 64
    heads: int = 4
    sequence: int = 32
    batch: int = 2
    vocab: int = 256
    dtype: torch.dtype = torch.float32
    blocks_per_stage: int = 1

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "sequence", "batch", "vocab", "blocks_per_stage"):
            size = getattr(self, name)
            if size < 1:
                raise ModelError("a model's sizes must be at least 1", f"got {name}={size}", f"use {name}=1 or more")
        if self.hidden % self.heads:
            raise ModelError(
                "the hidden size must be a multiple of the number of heads",
                f"got hidden={self.hidden} for {self.heads} heads",
                f"use a multiple of {self.heads}",
            )
        if not self.dtype.is_floating_point:
            raise ModelError("weights must be floating-point numbers", f"got {self.dtype}", "use torch.float32")


class Embedding(nn.Module):
    """Token plus position embedding: int64 ``[b, s]`` to ``[b, s, hidden]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token = skip_init(nn.Embedding, config.vocab, config.hidden, dtype=torch.float64)
        self.position = skip_init(nn.Embedding, config.sequence, config.hidden, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.token(tokens) + self.position(positions)
        return embedded


class Attention(nn.Module):
    """Causal self-attention, ``softmax(Q K^T / sqrt(d)) V`` by matrix products, ``[b, s, hidden]`` to the same."""

    future: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = 1 / math.sqrt(config.hidden // config.heads)
        self.qkv = skip_init(nn.Linear, config.hidden, 3 * config.hidden, dtype=torch.float64)
        self.out = skip_init(nn.Linear, config.hidden, config.hidden, dtype=torch.float64)
        ahead = torch.ones(config.sequence, config.sequence, dtype=torch.bool).triu(1)
        self.register_buffer("future", ahead, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, hidden = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * self.scale).masked_fill(self.future[:s, :s], -math.inf)
        mixed: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, hidden))
        return mixed


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``: ``[b, s, hidden]`` to the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, dtype=torch.float64)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden, dtype=torch.float64)
        self.mlp = nn.Sequential(
            skip_init(nn.Linear, config.hidden, 4 * config.hidden, dtype=torch.float64),
            nn.GELU(),
            skip_init(nn.Linear, 4 * config.hidden, config.hidden, dtype=torch.float64),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        grown: Tensor = x + self.mlp(self.mlp_norm(x))
        return grown


def build_stage(
    config: ModelConfig, stage: int, stages: int, seed: int, device: torch.device | str = "cpu"
) -> nn.Sequential:
    """Stage ``stage`` of ``stages``.  Its weights depend only on ``(seed, stage)``, whichever process builds it.

    The first stage takes tokens, int64 ``[batch, sequence]``, and the last returns logits, ``[batch, sequence,
    vocab]``.  Stages pass each other hidden states, ``[batch, sequence, hidden]``.  Logits and hidden states are in
    ``config.dtype``.  Weights are drawn in float64 and then cast, without using the global random state.

    Raises ``ModelError`` for a stage that the model does not have.
    """
    if not 0 <= stage < stages:
        raise ModelError(
            "a stage's number must be from 0 to one below the number of stages",
            f"got stage {stage} of {stages}",
            f"use 0 to {stages - 1}" if stages > 0 else "build a model of at least one stage",
        )
    module = nn.Sequential()
    if stage == 0:
        module.add_module("embedding", Embedding(config))
    for number in range(config.blocks_per_stage):
        module.add_module(f"block{number}", Block(config))
    if stage == stages - 1:
        module.add_module("norm", nn.LayerNorm(config.hidden, dtype=torch.float64))
        module.add_module("output", skip_init(nn.Linear, config.hidden, config.vocab, dtype=torch.float64))
    _draw_weights(module, torch.Generator().manual_seed(seed * 1_000_003 + stage))
    return module.to(dtype=config.dtype, device=device)


def build_stages(
    config: ModelConfig, stages: int, seed: int, device: torch.device | str = "cpu"
) -> tuple[nn.Sequential, ...]:
    """All stages of the model, in order."""
    return tuple(build_stage(config, stage, stages, seed, device) for stage in range(stages))


def _draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Fill the module's weights in place.

    Biases and norms start slightly off their neutral values (0 and 1), so that a run that leaves them out differs.
    """
    with torch.no_grad():
        for layer in module.modules():
            match layer:
                case nn.Linear():
                    layer.weight.normal_(0, 1 / math.sqrt(layer.in_features), generator=generator)
                    layer.bias.normal_(0, 0.02, generator=generator)
                case nn.LayerNorm():
                    layer.weight.normal_(1, 0.02, generator=generator)
                    layer.bias.normal_(0, 0.02, generator=generator)
                case nn.Embedding():
                    layer.weight.normal_(0, 1, generator=generator)


def criterion(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Cross-entropy, averaged over the tokens, times ``scale``: a scalar, float64 for float64 logits, else float32.

    ``logits`` is ``[..., vocab]``, ``targets`` int64 ``[...]``.  If ``scale`` is 1 over the number of microbatches of a
    step, the results for all microbatches add up to the step's mean loss.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide.flatten(0, -2), targets.flatten()) * scale
