"""Calibrated quantising of a checkpoint, one layer in memory at a time: as it is, and quantised.

The hidden states of all calibration tokens go from layer to layer through both models. Modules are quantised in the
order in which they run: for the inputs that they get from the quantised ones before, and the outputs that the exact
model has at the same tokens (asymmetric calibration: Li et al., arXiv 2504.02692). What is added to the residual stream
counts by the size of the exact stream there, since all that reads it divides by that: without this the few tokens whose
states are huge decide.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

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
Run = Callable[[Layer, ForwardBatch, Tensor], Tensor]  # half a layer on hidden states


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


@dataclass(slots=True)
class _States:
    """Sequences of one step, and their hidden states on the way through both models: [tokens, hidden]."""

    batch: ForwardBatch
    exact: Tensor
    quantised: Tensor


class _Calibration:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, token_ids: Tensor) -> None:
        self._checkpoint, self._config, self._dtype = checkpoint, config, dtype
        length = token_ids.shape[1]
        num_sequences = max(1, STEP_TOKENS // length)
        self._activations = Activations.empty(config, num_sequences * length, dtype)
        shape = kv_block_shape(config, num_sequences * -(-length // BLOCK_SIZE), BLOCK_SIZE)
        self._kv_cache = torch.zeros(shape, dtype=dtype)
        self._cos_sin = rotary_table(config.rope, config.head_size, length)
        embedding = Embedding(EMBEDDING, whole(config.vocab_size), config.hidden_size, dtype, config.quantization)
        fill(embedding.parameters(), checkpoint)
        self._states = []
        for some in token_ids.split(num_sequences):
            a = self._activations.first(some.numel())
            batch = _batch(some)
            embedding(batch.token_ids, a)
            self._states.append(_States(batch, a.hidden.clone(), a.hidden.clone()))

    def layer(self, index: int, form_of: Callable[[str], CodeFormat]) -> Iterator[tuple[str, QuantizedRows]]:
        exact, layer = (Layer(index, self._config, self._dtype, Shard()) for _ in range(2))
        for some in (exact, layer):
            fill(some.parameters(), self._checkpoint)
        for run, norm, first, second in (
            (self._attend, layer.attention_norm, layer.attention.qkv, layer.attention.output),
            (self._mlp, layer.mlp_norm, layer.mlp.gate_up, layer.mlp.down),
        ):
            yield from self._quantize(list(first.parts), first.parameters(), self._normed(norm), form_of)
            inputs = self._inner(run, exact, layer)
            yield from self._quantize([second.name], second.parameters(), inputs, form_of)
            for states in self._states:
                run(layer, states.batch, states.quantised)

    def head(self, form_of: Callable[[str], CodeFormat]) -> Iterator[tuple[str, QuantizedRows]]:
        config = self._config
        norm = Norm("model.norm", config.hidden_size, config.rms_norm_eps)
        fill(norm.parameters(), self._checkpoint)
        head = Linear(config.hidden_size, {HEAD: whole(config.vocab_size)}, self._dtype, config.quantization)
        yield from self._quantize([HEAD], head.parameters(), self._normed(norm), form_of)

    def _attend(self, layer: Layer, batch: ForwardBatch, hidden: Tensor) -> Tensor:
        """The first half of a layer, which adds to `hidden`. Returns the inputs of its output projection."""
        a = replace(self._activations.first(len(hidden)), hidden=hidden)
        layer.attention_norm(a.hidden, a.normed)
        layer.attention(a, batch, self._cos_sin, self._kv_cache)
        return a.attended

    def _mlp(self, layer: Layer, batch: ForwardBatch, hidden: Tensor) -> Tensor:
        """The second half of a layer, which adds to `hidden`. Returns the inputs of its down projection."""
        a = replace(self._activations.first(len(hidden)), hidden=hidden)
        layer.mlp_norm(a.hidden, a.normed)
        layer.mlp(a)
        return a.gated

    def _normed(self, norm: Norm) -> Iterator[tuple[Tensor, Tensor]]:
        """What the modules behind a norm get in the exact model and in the quantised one."""
        for states in self._states:
            exact, quantised = (norm(x, torch.empty_like(x)) for x in (states.exact, states.quantised))
            yield exact.float(), quantised.float()

    def _inner(self, run: Run, exact: Layer, layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
        """What the second projection of half a layer gets, by size; the exact model's states go on behind that half."""
        for states in self._states:
            x = run(exact, states.batch, states.exact)
            size = states.exact.float().square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
            yield x / size, run(layer, states.batch, states.quantised.clone()) / size

    def _quantize(
        self,
        names: list[str],
        parameters: Parameters,
        inputs: Iterable[tuple[Tensor, Tensor]],
        form_of: Callable[[str], CodeFormat],
    ) -> Iterator[tuple[str, QuantizedRows]]:
        """Modules of the same inputs, (exact, quantised) [tokens, k] float32; the layer then computes with them."""
        gram, drift = torch.zeros(()), torch.zeros(())
        for exact, quantised in inputs:
            gram = gram + quantised.T @ quantised
            drift = drift + (exact - quantised).T @ quantised
        for name in names:
            weight = f"{name}.weight"
            rows = quantize_for(self._checkpoint.read(weight), form_of(name), gram, drift)
            parameters[weight].place({weight: rows.dequantize(self._dtype)})
            yield name, rows


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
