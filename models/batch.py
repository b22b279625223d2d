"""What one forward pass computes and where, passed to the model as an argument."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from octavo.models.config import ModelConfig


@dataclass(slots=True)
class ForwardBatch:
    """Tokens of all sequences of a step, one sequence after the other. All tensors on the model's device."""

    token_ids: Tensor  # [tokens] int32
    positions: Tensor  # [tokens] int32
    slots: Tensor  # [tokens] int64: block * block_size + offset, where the token's KV goes
    token_begins: Tensor  # [sequences + 1] int32
    context_lens: Tensor  # [sequences] int32: tokens in the cache after this step
    block_tables: Tensor  # [sequences, max_blocks] int32

    @classmethod
    def empty(cls, max_tokens: int, max_sequences: int, max_blocks: int) -> "ForwardBatch":
        """Room for the largest step: one sequence of all tokens, at first."""
        zeros, int32 = torch.zeros, torch.int32
        return cls(
            token_ids=zeros(max_tokens, dtype=int32),
            positions=zeros(max_tokens, dtype=int32),
            slots=zeros(max_tokens, dtype=torch.int64),
            token_begins=torch.tensor([0] + max_sequences * [max_tokens], dtype=int32),
            context_lens=torch.full((max_sequences,), max_tokens, dtype=int32),
            block_tables=zeros((max_sequences, max_blocks), dtype=int32),
        )

    def first(self, num_tokens: int) -> "ForwardBatch":
        """The same memory, cut to the sequences that have the first `num_tokens` tokens."""
        sequences = int((self.token_begins == num_tokens).nonzero()[0])
        return ForwardBatch(
            token_ids=self.token_ids[:num_tokens],
            positions=self.positions[:num_tokens],
            slots=self.slots[:num_tokens],
            token_begins=self.token_begins[: sequences + 1],
            context_lens=self.context_lens[:sequences],
            block_tables=self.block_tables[:sequences],
        )


@dataclass(slots=True)
class Activations:
    """What layers hand on, in buffers that all of them share: [tokens, width] each, in the compute type."""

    hidden: Tensor  # the residual stream
    normed: Tensor  # [tokens, hidden]
    qkv: Tensor
    attended: Tensor  # [tokens, heads * head_size]
    gated: Tensor  # [tokens, intermediate]

    @classmethod
    def empty(cls, config: ModelConfig, max_tokens: int, dtype: torch.dtype) -> "Activations":
        """Buffers for steps of up to `max_tokens` tokens."""
        return cls(*(torch.empty((max_tokens, width), dtype=dtype) for width in activation_widths(config)))

    def first(self, num_tokens: int) -> "Activations":
        """The same memory, cut to the first `num_tokens` tokens."""
        return Activations(*(getattr(self, field.name)[:num_tokens] for field in fields(self)))


def activation_widths(config: ModelConfig) -> tuple[int, int, int, int, int]:
    """Elements per token of each buffer of `Activations`."""
    hidden = config.hidden_size
    return hidden, hidden, config.q_size + 2 * config.kv_size, config.q_size, config.intermediate_size
