"""What one forward pass computes, passed to the model as an argument."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """Tokens of all sequences of a step, one sequence after the other. All tensors on the model's device."""

    token_ids: Tensor  # [tokens] int32
    positions: Tensor  # [tokens] int32
    slots: Tensor  # [tokens] int64: block * block_size + offset, where the token's KV goes
    token_begins: Tensor  # [sequences + 1] int32
    context_lens: Tensor  # [sequences] int32: tokens in the cache after this step
    block_tables: Tensor  # [sequences, max_blocks] int32
