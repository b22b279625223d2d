"""Calibrated quantising of a checkpoint, one layer in memory at a time.

The hidden states of all calibration tokens go from layer to layer. A layer's weights are quantised for the inputs that
they get from the layers before, which are quantised by then. What is added to the residual stream counts by the size of
the stream there, since all that reads it divides by that: without this the few tokens whose states are huge decide.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.batch import Activations, ForwardBatch
from octavo.models.checkpoint import Checkpoint
from octavo.models.config import ModelConfig
from octavo.models.layers import Embedding, Linear, Norm, Parameters, rotary_table
from octavo.models.llama import Layer
from octavo.models.loader import fill
from octavo.models.memory import kv_block_shape
from octavo.models.quantization.base import EMBEDDING, HEAD, QuantizedRows
from octavo.models.quantization.calibrated import quantize_for
from octavo.models.shard import Shard, whole

BLOCK_SIZE = 16  # tokens, of the KV cache
STEP_TOKENS = 4096  # at a time, or one sequence's


def calibrated_rows(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    token_ids: Tensor,
    form_of: Callable[[str], CodeFormat],
    quantize_head: bool,
) -> Iterator[tuple[str, QuantizedRows]]:
    """The linear layers' modules, quantised: with `quantize_head` the output head, which must not be tied, as well.

    config: not quantised; token_ids: [sequences, tokens of each] int64; form_of: a module's format, with a table and
    without shifts. Raises CheckpointError.
    """
    calibration = _Calibration(checkpoint, config, dtype, token_ids)
    for index in range(config.num_layers):
        yield from calibration.layer(index, form_of)
    if quantize_head:
        yield from calibration.head(form_of)


class _Calibration:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, token_ids: Tensor) -> None:
        self._checkpoint, self._config, self._dtype = checkpoint, config, dtype
        length = token_ids.shape[1]
        num_sequences = max(1, STEP_TOKENS // length)
        self._batches = [_batch(some) for some in token_ids.split(num_sequences)]
        self._activations = Activations.empty(config, num_sequences * length, dtype)
        shape = kv_block_shape(config, num_sequences * -(-length // BLOCK_SIZE), BLOCK_SIZE)
        self._kv_cache = torch.zeros(shape, dtype=dtype)
        self._cos_sin = rotary_table(config.rope, config.head_size, length)
        embedding = Embedding(EMBEDDING, whole(config.vocab_size), config.hidden_size, dtype, config.quantization)
        fill(embedding.parameters(), checkpoint)
        self._hidden = []  # of each batch, before the layer that is next
        for batch in self._batches:
            a = self._activations.first(len(batch.token_ids))
            embedding(batch.token_ids, a)
            self._hidden.append(a.hidden.clone())

    def layer(self, index: int, form_of: Callable[[str], CodeFormat]) -> Iterator[tuple[str, QuantizedRows]]:
        layer = Layer(index, self._config, self._dtype, Shard())
        parameters = layer.parameters()
        fill(parameters, self._checkpoint)
        attention, mlp = layer.attention, layer.mlp
        grams: list[Tensor] = [
            torch.zeros((k, k))
            for k in (
                attention.qkv.weight.k,
                attention.output.weights[0].k,
                mlp.gate_up.weight.k,
                mlp.down.weights[0].k,
            )
        ]
        for batch, hidden in zip(self._batches, self._hidden, strict=True):
            a = self._activations.first(len(hidden))
            a.hidden.copy_(hidden)
            grams[0] += _gram(layer.attention_norm(a.hidden, a.normed))
            layer(a, batch, self._cos_sin, self._kv_cache)
            size = a.hidden.float().square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
            grams[1] += _gram(a.attended / size)
            grams[2] += _gram(a.normed)
            grams[3] += _gram(a.gated / size)
        modules = (attention.qkv.parts, (attention.output.name,), mlp.gate_up.parts, (mlp.down.name,))
        for gram, names in zip(grams, modules, strict=True):
            yield from self._quantize(list(names), parameters, gram, form_of)
        for i, batch in enumerate(self._batches):
            a = self._activations.first(len(self._hidden[i]))
            a.hidden.copy_(self._hidden[i])
            layer(a, batch, self._cos_sin, self._kv_cache)
            self._hidden[i].copy_(a.hidden)

    def head(self, form_of: Callable[[str], CodeFormat]) -> Iterator[tuple[str, QuantizedRows]]:
        config = self._config
        norm = Norm("model.norm", config.hidden_size, config.rms_norm_eps)
        fill(norm.parameters(), self._checkpoint)
        gram = torch.zeros((config.hidden_size, config.hidden_size))
        for hidden in self._hidden:
            gram += _gram(norm(hidden, torch.empty_like(hidden)))
        head = Linear(config.hidden_size, {HEAD: whole(config.vocab_size)}, self._dtype, config.quantization)
        yield from self._quantize([HEAD], head.parameters(), gram, form_of)

    def _quantize(
        self, names: list[str], parameters: Parameters, gram: Tensor, form_of: Callable[[str], CodeFormat]
    ) -> Iterator[tuple[str, QuantizedRows]]:
        """Modules of the same inputs, which the layer then computes with."""
        for name in names:
            weight = f"{name}.weight"
            rows = quantize_for(self._checkpoint.read(weight), form_of(name), gram)
            parameters[weight].place({weight: rows.dequantize(self._dtype)})
            yield name, rows


def _gram(x: Tensor) -> Tensor:
    """x^T x of [tokens, k], in float32."""
    x = x.float()
    return x.T @ x


def _batch(token_ids: Tensor) -> ForwardBatch:
    """Sequences of equal length, each in KV blocks of its own."""
    count, length = token_ids.shape
    tables = torch.arange(count * -(-length // BLOCK_SIZE), dtype=torch.int32).view(count, -1)
    positions = torch.arange(length)
    slots = tables[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    return ForwardBatch(
        token_ids=token_ids.flatten().int(),
        positions=positions.repeat(count).int(),
        slots=slots.flatten(),
        token_begins=torch.arange(0, count * length + 1, length, dtype=torch.int32),
        context_lens=torch.full((count,), length, dtype=torch.int32),
        block_tables=tables,
        max_query_len=length,
        max_context_len=length,
    )
