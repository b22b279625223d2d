"""The pieces a decoder is made of. Each knows the checkpoint tensors it is filled from, and how to place them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.all_reduce import all_reduce
from octavo.kernels.backend import device
from octavo.kernels.embedding import embedding
from octavo.kernels.gather_columns import gather_columns
from octavo.kernels.matmul import PackedWeight, empty_packed, gated_matmul, matmul
from octavo.kernels.matmul_4bit import CodeFormat, Packed4Bit, empty_packed_4bit, gated_matmul_4bit, matmul_4bit
from octavo.kernels.paged_attention import paged_attention
from octavo.kernels.rms_norm import rms_norm, rms_norm_heads
from octavo.kernels.rotary_kv_write import rotary_kv_write
from octavo.models.batch import Activations, ForwardBatch
from octavo.models.checkpoint import TensorSpec
from octavo.models.config import ModelConfig, RopeConfig
from octavo.models.quantization.base import Quantization, QuantizedRows
from octavo.models.shard import Shard, Span, form_of_part, whole

Weight = PackedWeight | Packed4Bit


@dataclass(slots=True)
class Parameter:
    """What a layer wants of the checkpoint: tensors, by name, and the function that takes their values."""

    tensors: dict[str, TensorSpec]
    place: Callable[[Mapping[str, Tensor]], object]
    share: float = 1.0  # of the tensors' values, that are looked at


Parameters = dict[str, Parameter]  # name of the parameter -> parameter


def vector(name: str, values: Tensor, span: Span | None = None) -> Parameters:
    """A parameter that is one tensor of the checkpoint, or a span of one, copied to `values`, [size] float32."""
    span = span or whole(len(values))

    def place(tensors: Mapping[str, Tensor]) -> None:
        values.copy_(tensors[name][span.slice])

    return {name: Parameter({name: TensorSpec((span.whole,))}, place, len(span) / span.whole)}


def rows(
    quantization: Quantization, name: str, n: Span, inputs: list[Span], weights: list[Weight], begin: int = 0
) -> Parameters:
    """Rows `n` of the checkpoint's module `name`, of whose columns each weight takes those of its inputs.

    They are placed at rows from `begin` on.
    """
    k = inputs[0].whole

    def place(tensors: Mapping[str, Tensor]) -> None:
        first, end = inputs[0].begin, inputs[-1].end
        if isinstance(weights[0], PackedWeight):  # whose inputs need not be whole groups, nor in the rows' order
            first, end = 0, k
        values = quantization.read(name, n.whole, k, tensors, n.slice, slice(first, end))
        if isinstance(values, QuantizedRows) and isinstance(weights[0], PackedWeight):
            values = values.dequantize(weights[0].dtype)
            if (order := quantization.order(name)) is not None:
                values = torch.empty_like(values).index_copy_(1, order, values)
        for span, weight in zip(inputs, weights, strict=True):
            columns = slice(span.begin - first, span.end - first)
            if isinstance(values, QuantizedRows):
                assert isinstance(weight, Packed4Bit)
                part = values.part(slice(0, len(n)), columns)
                weight.write_rows(begin, part.codes, part.scales, part.shifts)
            else:
                assert isinstance(weight, PackedWeight)
                weight.write_rows(begin, values[:, columns])

    wanted = quantization.tensors(name, n.whole, k)
    share = len(n) * sum(map(len, inputs)) / (n.whole * k) if len(wanted) == 1 else 1.0
    return {f"{name}.weight": Parameter(wanted, place, share)}


def empty_weight(n: int, k: int, dtype: torch.dtype, form: CodeFormat | None, num_parts: int = 1) -> Weight:
    """A weight [n, k] to be filled, in codes where a form of these is given."""
    return empty_packed(n, k, dtype, num_parts) if form is None else empty_packed_4bit(n, k, dtype, form, num_parts)


def product(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    """`matmul`, or `gated_matmul` of a weight of two parts, whatever the weight is stored as. Returns out."""
    if isinstance(weight, Packed4Bit):
        if weight.num_parts == 2:
            return gated_matmul_4bit(x, weight, bias, out)
        return matmul_4bit(x, weight, bias, residual, out.dtype, out)
    if weight.num_parts == 2:
        return gated_matmul(x, weight, bias, out)
    return matmul(x, weight, bias, residual, out.dtype, out)


def order_of(quantization: Quantization, name: str, form: CodeFormat | None) -> Tensor | None:
    """[k] int32: which of x's columns each of a weight's belongs to; None where they are in order."""
    order = None if form is None else quantization.order(name)
    return None if order is None else order.to(device(), torch.int32)


class Linear:
    """out = x @ weight.T + bias; several checkpoint weights may be stacked along the outputs, which ranks divide.

    With `gated` they are two, and out = silu(first half) * second half.
    """

    def __init__(
        self,
        k: int,
        parts: dict[str, Span],
        dtype: torch.dtype,
        quantization: Quantization,
        bias: bool = False,
        gated: bool = False,
    ) -> None:
        """k: inputs; parts: checkpoint module name -> outputs that are this rank's, stacked in this order."""
        self.parts, self._quantization = parts, quantization
        n, form = sum(map(len, parts.values())), form_of_part(quantization, parts, [whole(k)])
        self.weight = empty_weight(n, k, dtype, form, num_parts=2 if gated else 1)
        self.order = order_of(quantization, next(iter(parts)), form)
        self.bias = torch.zeros(n, dtype=torch.float32, device=device()) if bias else None

    def __call__(self, x: Tensor, out: Tensor, ordered: Tensor | None = None) -> Tensor:
        """x: [rows, k]; out: [rows, n] (or n / 2). Returns out.

        ordered: [rows, k or more] memory for x's columns in the weight's order, where that has one.
        """
        if self.order is not None:
            x = gather_columns(x, self.order, None if ordered is None else ordered[:, : self.weight.k])
        return product(x, self.weight, self.bias, None, out)

    def parameters(self) -> Parameters:
        """Weights (and biases) by checkpoint name."""
        found: Parameters = {}
        begin = 0
        for name, n in self.parts.items():
            found |= rows(self._quantization, name, n, [whole(self.weight.k)], [self.weight], begin)
            if self.bias is not None:
                found |= vector(f"{name}.bias", self.bias[begin : begin + len(n)], n)
            begin += len(n)
        return found


class SummedLinear:
    """hidden += x @ weight.T + bias, where ranks divide the inputs and add up what comes of them."""

    def __init__(
        self,
        name: str,
        n: int,
        inputs: list[Span],
        dtype: torch.dtype,
        quantization: Quantization,
        bias: bool = False,
    ) -> None:
        """name: of the checkpoint module; inputs: what each of this rank's parts of the sum takes, on end."""
        self.name, self.inputs, self._quantization = name, inputs, quantization
        form = form_of_part(quantization, {name: whole(n)}, inputs)
        self.weights = [empty_weight(n, len(span), dtype, form) for span in inputs]
        self.order = order_of(quantization, name, form)
        self.bias = torch.zeros(n, dtype=torch.float32, device=device()) if bias else None

    def __call__(self, x: Tensor, a: Activations) -> None:
        """x: [rows, inputs of this rank]. Adds to a.hidden."""
        if self.order is not None:
            x = gather_columns(x, self.order, a.ordered[:, : x.shape[1]])
        if self.inputs[0].is_whole:
            product(x, self.weights[0], self.bias, a.hidden, a.hidden)
            return
        columns = x.split([len(span) for span in self.inputs], dim=1)
        for some, weight, part in zip(columns, self.weights, a.parts, strict=True):
            product(some, weight, None, None, part)
        a.check()
        all_reduce(a.parts, a.hidden, a.ranks, sums=a.sums, bias=self.bias, residual=a.hidden)

    def parameters(self) -> Parameters:
        """The weight (and bias) by checkpoint name."""
        found = rows(self._quantization, self.name, whole(self.weights[0].n), self.inputs, self.weights)
        return found if self.bias is None else found | vector(f"{self.name}.bias", self.bias)


class Norm:
    """RMSNorm with its weight in float32."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        self.name, self.eps = name, eps
        self.weight = torch.zeros(size, dtype=torch.float32, device=device())

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """x and out: [rows, size]. Returns out."""
        return rms_norm(x, self.weight, self.eps, out)

    def parameters(self) -> Parameters:
        """The weight by checkpoint name."""
        return vector(f"{self.name}.weight", self.weight)


class Embedding:
    """Token embedding, which may also serve as the output head. Ranks divide the vocabulary."""

    def __init__(
        self, name: str, vocab: Span, hidden_size: int, dtype: torch.dtype, quantization: Quantization
    ) -> None:
        """vocab: the rows that are this rank's."""
        self.name, self.vocab, self._quantization = name, vocab, quantization
        self.weight = empty_packed(len(vocab), hidden_size, dtype)

    def __call__(self, token_ids: Tensor, a: Activations) -> None:
        """token_ids: [tokens] int32. Leaves their embeddings in a.hidden."""
        if a.ranks.num_ranks == 1:
            embedding(token_ids, self.weight, a.hidden)
            return
        # A rank has zeros for what is another's, so the sum is exact in the compute type.
        part = a.parts[0].view(-1).view(a.hidden.dtype)[: a.hidden.numel()].view_as(a.hidden)
        embedding(token_ids, self.weight, part, first_id=self.vocab.begin)
        all_reduce(part[None], a.hidden, a.ranks, sums=a.sums)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden: [rows, hidden]; out: [rows, this rank's vocabulary] float32. Returns out."""
        return matmul(hidden, self.weight, out_dtype=torch.float32, out=out)

    def parameters(self) -> Parameters:
        """The weight by checkpoint name."""
        return rows(self._quantization, self.name, self.vocab, [whole(self.weight.k)], [self.weight])


class Attention:
    """Self-attention of one layer: QKV, optional norm of queries and keys, rotary, paged attention, output.

    Ranks divide the query heads, and have the KV heads that theirs need.
    """

    def __init__(self, name: str, config: ModelConfig, window: int, dtype: torch.dtype, shard: Shard) -> None:
        self.window, self.head_size = window, config.head_size
        heads, kv_heads = shard.heads(config), shard.kv_heads(config)
        self.num_heads, self.num_kv_heads = len(heads), len(kv_heads)
        # Groups of query heads are cut at both ends, unless they are one, which then is a whole group of its own.
        group = config.num_heads // config.num_kv_heads
        self.group_size, self.first_head = (group, heads.begin % group) if len(kv_heads) > 1 else (len(heads), 0)
        q, kv = heads * config.head_size, kv_heads * config.head_size
        parts = {f"{name}.q_proj": q, f"{name}.k_proj": kv, f"{name}.v_proj": kv}
        hidden, quantization = config.hidden_size, config.quantization
        self.qkv = Linear(hidden, parts, dtype, quantization, bias=config.qkv_bias)
        inputs = [part.heads(config) * config.head_size for part in shard.parts]
        self.output = SummedLinear(f"{name}.o_proj", hidden, inputs, dtype, quantization, bias=config.output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = Norm(f"{name}.q_norm", config.head_size, config.rms_norm_eps)
            self.k_norm = Norm(f"{name}.k_norm", config.head_size, config.rms_norm_eps)

    def __call__(self, a: Activations, batch: ForwardBatch, cos_sin: Tensor, kv_cache: Tensor) -> None:
        """Adds attention(a.normed) to a.hidden. kv_cache: this layer's."""
        qkv = self.qkv(a.normed, a.qkv, ordered=a.ordered)
        if self.q_norm is not None and self.k_norm is not None:
            q_size = self.num_heads * self.head_size
            rms_norm_heads(qkv, 0, self.num_heads, self.q_norm.weight, self.q_norm.eps)
            rms_norm_heads(qkv, q_size, self.num_kv_heads, self.k_norm.weight, self.k_norm.eps)
        rotary_kv_write(qkv, cos_sin, batch.positions, batch.slots, kv_cache, self.num_heads)
        paged_attention(
            qkv,
            kv_cache,
            batch.block_tables,
            batch.token_begins,
            batch.context_lens,
            self.num_heads,
            self.head_size**-0.5,
            self.window,
            a.attended,
            group_size=self.group_size,
            first_head=self.first_head,
            max_query_len=batch.max_query_len,
            max_context_len=batch.max_context_len,
        )
        self.output(a.attended, a)

    def parameters(self) -> Parameters:
        """All tensors by checkpoint name."""
        norms = {**self.q_norm.parameters(), **self.k_norm.parameters()} if self.q_norm and self.k_norm else {}
        return {**self.qkv.parameters(), **self.output.parameters(), **norms}


class Mlp:
    """SwiGLU MLP of one layer. Ranks divide its columns."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype, shard: Shard) -> None:
        columns, hidden, quantization = shard.columns(config), config.hidden_size, config.quantization
        parts = {f"{name}.gate_proj": columns, f"{name}.up_proj": columns}
        self.gate_up = Linear(hidden, parts, dtype, quantization, bias=config.mlp_bias, gated=True)
        inputs = [part.columns(config) for part in shard.parts]
        self.down = SummedLinear(f"{name}.down_proj", hidden, inputs, dtype, quantization, bias=config.mlp_bias)

    def __call__(self, a: Activations) -> None:
        """Adds mlp(a.normed) to a.hidden."""
        self.gate_up(a.normed, a.gated, ordered=a.ordered)
        self.down(a.gated, a)

    def parameters(self) -> Parameters:
        """All tensors by checkpoint name."""
        return {**self.gate_up.parameters(), **self.down.parameters()}


def rotary_table(rope: RopeConfig, head_size: int, max_len: int) -> Tensor:
    """cosines, then sines, of each position's angles: [max_len, head_size] float32.

    Angles are float32 products, as the reference implementations compute them, and computed on the CPU whatever the
    device. The llama3 kind stretches wavelengths beyond original_max_position / low_freq_factor by `factor`, keeps
    those under original / high_freq_factor, and blends in between; the factors kind has that worked out. The yarn kind
    blends over the angles' indices, from those that turn beta_fast times in original_max_position to those that turn
    beta_slow times (Peng et al., arXiv 2309.00071).
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    if rope.kind == "factors":
        inverse = inverse / torch.tensor(rope.factors)
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        ratio = rope.original_max_position / wavelength
        blend = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        inverse = (1 - blend) * inverse / rope.factor + blend * inverse
    if rope.kind == "yarn":
        low, high = (
            head_size * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        blend = (torch.arange(head_size // 2, dtype=torch.float32) - low) / (high - low or 0.001)
        blend = blend.clamp(0.0, 1.0)
        inverse = blend * inverse / rope.factor + (1 - blend) * inverse
    table = torch.empty((max_len, head_size), dtype=torch.float32)
    cos, sin = table.chunk(2, dim=1)
    torch.mul(torch.arange(max_len, dtype=torch.float32)[:, None], inverse[None, :], out=cos)
    torch.sin(cos, out=sin)
    cos.cos_()
    if rope.kind == "yarn":
        table.mul_(rope.attention_factor)
    return table.to(device())
