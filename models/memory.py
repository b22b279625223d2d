"""Bytes before they are taken: the figures that planning prints and that allocation then uses.

Where a function takes no shard, its configuration describes what one rank holds: `Shard.local`.
"""

from dataclasses import dataclass

import torch

from octavo.kernels.backend import exact, kernels
from octavo.kernels.matmul import packed_bytes
from octavo.kernels.matmul_4bit import packed_4bit_bytes
from octavo.kernels.ranks import buffer_bytes
from octavo.models.batch import activation_widths, sum_bytes
from octavo.models.config import ModelConfig
from octavo.models.quantization.base import EMBEDDING, HEAD
from octavo.models.shard import Shard, Span, form_of_part, whole

LOGITS_ROWS = 64  # rows of the vocabulary-wide logits that exist at once
MAX_CHANGED_BLOCKS = 63  # KV blocks of which a rank can say in a step that they have changed


def linears(config: ModelConfig, shard: Shard | None = None) -> list[tuple[dict[str, Span], list[Span]]]:
    """(modules stacked in it -> outputs, inputs of each of its parts) of every weight matrix that a rank has."""
    shard = shard or Shard()
    hidden, columns, vocab = whole(config.hidden_size), shard.columns(config), shard.vocab(config)
    q, kv = shard.heads(config) * config.head_size, shard.kv_heads(config) * config.head_size
    attended = [part.heads(config) * config.head_size for part in shard.parts]
    gated = [part.columns(config) for part in shard.parts]
    found = [({name: vocab}, [hidden]) for name in (EMBEDDING, HEAD)[: 1 + config.has_head]]
    for index in range(config.num_layers):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        found += [
            ({f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}, [hidden]),
            ({f"{attention}.o_proj": hidden}, attended),
            ({f"{mlp}.gate_proj": columns, f"{mlp}.up_proj": columns}, [hidden]),
            ({f"{mlp}.down_proj": hidden}, gated),
        ]
    return found


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of every weight matrix."""
    return [(sum(map(len, parts.values())), inputs[0].whole) for parts, inputs in linears(config)]


def num_vector_parameters(config: ModelConfig) -> int:
    """Elements of norms and biases, kept in float32."""
    qkv = config.q_size + 2 * config.kv_size
    layer = 2 * config.hidden_size + config.qkv_bias * qkv + config.output_bias * config.hidden_size
    layer += config.mlp_bias * (2 * config.intermediate_size + config.hidden_size)
    layer += config.qk_norm * 2 * config.head_size
    return config.num_layers * layer + config.hidden_size


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, tied ones counted once."""
    tied = config.vocab_size * config.hidden_size * (config.has_head and config.tie_word_embeddings)
    return sum(n * k for n, k in linear_shapes(config)) - tied + num_vector_parameters(config)


def weight_bytes(config: ModelConfig, dtype: torch.dtype, shard: Shard | None = None) -> int:
    """Bytes of all weights of a rank as they lie in memory."""
    num_bytes = 4 * num_vector_parameters(config if shard is None else shard.local(config))
    for parts, inputs in linears(config, shard):
        n, form = sum(map(len, parts.values())), form_of_part(config.quantization, parts, inputs)
        for k in map(len, inputs):
            num_bytes += packed_bytes(n, k, dtype) if form is None else packed_4bit_bytes(n, k, form)
        if form is not None and config.quantization.order(next(iter(parts))) is not None:
            num_bytes += 4 * inputs[0].whole
    return num_bytes


def replicated_bytes(config: ModelConfig, num_ranks: int, dtype: torch.dtype) -> int:
    """Bytes of weights, not quantised, that ranks hold more than once: norms, what is added after sums, KV heads."""
    shards = Shard(0, num_ranks, num_ranks).peers
    kv_size = 2 * config.head_size * (sum(len(shard.kv_heads(config)) for shard in shards) - config.num_kv_heads)
    kv_bytes = packed_bytes(kv_size, config.hidden_size, dtype) + 4 * config.qkv_bias * kv_size
    vectors = (2 + config.output_bias + config.mlp_bias) * config.hidden_size + config.qk_norm * 2 * config.head_size
    return config.num_layers * kv_bytes + 4 * (num_ranks - 1) * (config.num_layers * vectors + config.hidden_size)


def kv_block_shape(config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, int, int, int, int]:
    """Shape of one layer's KV cache."""
    return (num_blocks, 2, config.num_kv_heads, block_size, config.head_size)


def kv_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return config.num_layers * 2 * config.num_kv_heads * block_size * config.head_size * dtype.itemsize


def logits_shape(config: ModelConfig, shard: Shard) -> tuple[int, int]:
    """Shape of a rank's own logits, the widest rank's."""
    return LOGITS_ROWS, max(len(peer.vocab(config)) for peer in shard.peers)


def shared_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype, shard: Shard) -> int:
    """Bytes of a rank's buffers that others read: parts of sums, logits, the tokens sampled of these, checksums."""
    logits, tokens = buffer_bytes(logits_shape(config, shard), torch.float32), buffer_bytes((LOGITS_ROWS,), torch.int32)
    checks = sum(buffer_bytes((size,), torch.int64) for size in check_sizes(config))
    return sum_bytes(config, num_tokens, dtype, shard) + logits + tokens + checks


def check_sizes(config: ModelConfig) -> tuple[int, int]:
    """What a rank says of changed bits, in int64: of KV blocks how many and which, of a forward pass checksums."""
    return 1 + MAX_CHANGED_BLOCKS, 2 * config.num_layers + 1


def workspace_bytes(
    config: ModelConfig, num_tokens: int, max_len: int, dtype: torch.dtype, shard: Shard | None = None
) -> int:
    """Bytes of the activations of a step of `num_tokens` tokens, of its logits, and of what kernels allocate."""
    shard = shard or Shard()
    local = shard.local(config)
    num_bytes = num_tokens * sum(activation_widths(local)) * dtype.itemsize
    num_bytes += shared_bytes(config, num_tokens, dtype, shard)
    if shard.num_ranks > 1 and shard.rank == 0:
        num_bytes += 4 * LOGITS_ROWS * config.vocab_size
    if kernels() == "triton":
        # Here, since importing Triton takes its time.
        from octavo.kernels.gpu.paged_attention import partial_bytes
        from octavo.kernels.gpu.sample import scratch_bytes

        num_bytes += scratch_bytes(LOGITS_ROWS, config.vocab_size)
        of_layers = partial_bytes(dtype, num_tokens, local.num_heads, config.head_size, max_len)
        if shard.num_ranks > 1:  # what ranks send each other, and what they get
            of_layers += (8 + 2 * dtype.itemsize) * num_tokens * config.hidden_size
        if not exact():  # a vendor's products know no gate, and round their sums before they are float32 logits
            of_layers += 2 * num_tokens * local.intermediate_size * dtype.itemsize
            num_bytes += LOGITS_ROWS * local.vocab_size * dtype.itemsize
        num_bytes += 2 * of_layers  # once more for graphs, which have a memory of their own
    return num_bytes


def state_bytes(config: ModelConfig, num_slots: int, max_len: int, block_size: int) -> int:
    """Bytes of the rotary table, and of the tokens and block tables of all slots, the latter once more for a step."""
    return 4 * max_len * config.head_size + 4 * num_slots * (max_len + 2 * -(-max_len // block_size))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What one rank's memory is for, in bytes."""

    weight_bytes: int
    workspace_bytes: int  # a step's activations and logits, and the state of all slots
    reserve_bytes: int  # for what is not ours to count: a runtime, its libraries, what they allocate
    block_bytes: int  # of one KV block
    num_blocks: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.num_blocks * self.block_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of everything."""
        return self.weight_bytes + self.workspace_bytes + self.reserve_bytes + self.kv_bytes


def plan_memory(
    *,
    weight_bytes: int,
    workspace_bytes: int,
    reserve_bytes: int,
    block_bytes: int,
    min_blocks: int,
    kv_bytes: int | None,
    limit_bytes: int,
) -> MemoryPlan:
    """As many KV blocks as `kv_bytes` hold (None: what is left of the limit), but at least `min_blocks`.

    The plan exceeds the limit where that cannot be held.
    """
    if kv_bytes is None:
        kv_bytes = max(limit_bytes - weight_bytes - workspace_bytes - reserve_bytes, 0)
    num_blocks = max(kv_bytes // block_bytes, min_blocks)
    return MemoryPlan(weight_bytes, workspace_bytes, reserve_bytes, block_bytes, num_blocks)
