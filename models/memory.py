"""Bytes before they are taken: the figures that planning prints and that allocation then uses."""

from dataclasses import dataclass

import torch

from octavo.kernels.backend import exact, kernels
from octavo.kernels.matmul import packed_bytes
from octavo.kernels.matmul_4bit import packed_4bit_bytes
from octavo.models.batch import activation_widths
from octavo.models.config import ModelConfig
from octavo.models.quantization.base import EMBEDDING, HEAD, form_of

LOGITS_ROWS = 64  # rows of the vocabulary-wide logits that exist at once


def linears(config: ModelConfig) -> list[tuple[dict[str, int], int]]:
    """(modules stacked in it -> outputs, inputs) of every weight matrix: embedding, a head of its own, layers."""
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    found = [({name: config.vocab_size}, hidden) for name in (EMBEDDING, HEAD)[: 1 + config.has_head]]
    for index in range(config.num_layers):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        found += [
            ({f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}, hidden),
            ({f"{attention}.o_proj": hidden}, q),
            ({f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}, hidden),
            ({f"{mlp}.down_proj": hidden}, inner),
        ]
    return found


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of every weight matrix."""
    return [(sum(parts.values()), k) for parts, k in linears(config)]


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


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights as they lie in memory."""
    num_bytes = 4 * num_vector_parameters(config)
    for parts, k in linears(config):
        n, form = sum(parts.values()), form_of(config.quantization, parts, k)
        has_order = form is not None and config.quantization.order(next(iter(parts))) is not None
        num_bytes += packed_bytes(n, k, dtype) if form is None else packed_4bit_bytes(n, k, form) + 4 * k * has_order
    return num_bytes


def kv_block_shape(config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, int, int, int, int]:
    """Shape of one layer's KV cache."""
    return (num_blocks, 2, config.num_kv_heads, block_size, config.head_size)


def kv_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return config.num_layers * 2 * config.num_kv_heads * block_size * config.head_size * dtype.itemsize


def workspace_bytes(config: ModelConfig, num_tokens: int, max_len: int, dtype: torch.dtype) -> int:
    """Bytes of the activations of a step of `num_tokens` tokens, of its logits, and of what kernels allocate."""
    num_bytes = num_tokens * sum(activation_widths(config)) * dtype.itemsize + 4 * LOGITS_ROWS * config.vocab_size
    if kernels() == "triton":
        # Here, since importing Triton takes its time.
        from octavo.kernels.gpu.paged_attention import partial_bytes
        from octavo.kernels.gpu.sample import scratch_bytes

        num_bytes += scratch_bytes(LOGITS_ROWS, config.vocab_size)
        of_layers = partial_bytes(dtype, num_tokens, config.num_heads, config.head_size, max_len)
        if not exact():  # a vendor's products know no gate, and round their sums before they are float32 logits
            of_layers += 2 * num_tokens * config.intermediate_size * dtype.itemsize
            num_bytes += LOGITS_ROWS * config.vocab_size * dtype.itemsize
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
