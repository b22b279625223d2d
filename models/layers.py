"""The pieces a decoder is made of. Each knows the checkpoint tensors it is filled from, and how to place them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.backend import device
from octavo.kernels.embedding import embedding
from octavo.kernels.gather_columns import gather_columns
from octavo.kernels.matmul import PackedWeight, empty_packed, gated_matmul, matmul
from octavo.kernels.matmul_4bit import Packed4Bit, empty_packed_4bit, gated_matmul_4bit, matmul_4bit
from octavo.kernels.paged_attention import paged_attention
from octavo.kernels.rms_norm import rms_norm, rms_norm_heads
from octavo.kernels.rotary_kv_write import rotary_kv_write
from octavo.models.batch import Activations, ForwardBatch
from octavo.models.checkpoint import TensorSpec
from octavo.models.config import ModelConfig, RopeConfig
from octavo.models.quantization.base import Quantization, QuantizedRows, form_of


@dataclass(slots=True)
class Parameter:
    """What a layer wants of the checkpoint: tensors, by name, and the function that takes their values."""

    tensors: dict[str, TensorSpec]
    place: Callable[[Mapping[str, Tensor]], object]


Parameters = dict[str, Parameter]  # name of the parameter -> parameter


def vector(name: str, values: Tensor) -> Parameters:
    """A parameter that is one tensor of the checkpoint, copied to `values`, [size] float32."""
    return {name: Parameter({name: TensorSpec(tuple(values.shape))}, lambda tensors: values.copy_(tensors[name]))}


def rows(
    quantization: Quantization, name: str, n: int, weight: PackedWeight | Packed4Bit, begin: int = 0
) -> Parameters:
    """The weight [n, k] of the checkpoint's module `name`, placed at rows [begin, begin + n) of `weight`."""
    k = weight.k

    def place(tensors: Mapping[str, Tensor]) -> None:
        values = quantization.read(name, n, k, tensors)
        if isinstance(values, QuantizedRows) and isinstance(weight, Packed4Bit):
            weight.write_rows(begin, values.codes, values.scales, values.shifts)
            return
        assert isinstance(weight, PackedWeight)
        if isinstance(values, QuantizedRows):
            values = values.dequantize(weight.dtype)
            if (order := quantization.order(name)) is not None:
                values = torch.empty_like(values).index_copy_(1, order, values)
        weight.write_rows(begin, values)

    return {f"{name}.weight": Parameter(quantization.tensors(name, n, k), place)}


class Linear:
    """out = x @ weight.T + bias; several checkpoint weights may be stacked along the outputs.

    With `gated` they are two, and out = silu(first half) * second half.
    """

    def __init__(
        self,
        k: int,
        parts: dict[str, int],
        dtype: torch.dtype,
        quantization: Quantization,
        bias: bool = False,
        gated: bool = False,
    ) -> None:
        """k: inputs; parts: checkpoint module name -> outputs, stacked in this order."""
        self.parts, self._quantization = parts, quantization
        n, num_parts, form = sum(parts.values()), 2 if gated else 1, form_of(quantization, parts, k)
        self.weight: PackedWeight | Packed4Bit
        self.order: Tensor | None = None  # [k] int32: which of x's columns each of the weight's belongs to
        if form is None:
            self.weight = empty_packed(n, k, dtype, num_parts)
        else:
            self.weight = empty_packed_4bit(n, k, dtype, form, num_parts)
            order = quantization.order(next(iter(parts)))
            self.order = None if order is None else order.to(device(), torch.int32)
        self.bias = torch.zeros(n, dtype=torch.float32, device=device()) if bias else None

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None, ordered: Tensor | None = None) -> Tensor:
        """x: [rows, k]; out: [rows, n] (or n / 2), which also may be the residual that is added. Returns out.

        ordered: [rows, k or more] memory for x's columns in the weight's order, where that has one.
        """
        if self.order is not None:
            x = gather_columns(x, self.order, None if ordered is None else ordered[:, : self.weight.k])
        if self.weight.num_parts == 2:
            assert residual is None
            if isinstance(self.weight, Packed4Bit):
                return gated_matmul_4bit(x, self.weight, self.bias, out)
            return gated_matmul(x, self.weight, self.bias, out)
        if isinstance(self.weight, Packed4Bit):
            return matmul_4bit(x, self.weight, self.bias, residual, out.dtype, out)
        return matmul(x, self.weight, self.bias, residual, out.dtype, out)

    def parameters(self) -> Parameters:
        """Weights (and biases) by checkpoint name."""
        found: Parameters = {}
        begin = 0
        for name, n in self.parts.items():
            found |= rows(self._quantization, name, n, self.weight, begin)
            if self.bias is not None:
                found |= vector(f"{name}.bias", self.bias[begin : begin + n])
            begin += n
        return found


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
    """Token embedding, which may also serve as the output head."""

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, dtype: torch.dtype, quantization: Quantization
    ) -> None:
        self.name, self._quantization = name, quantization
        self.weight = empty_packed(vocab_size, hidden_size, dtype)

    def __call__(self, token_ids: Tensor, out: Tensor) -> Tensor:
        """token_ids: [tokens] int32; out: [tokens, hidden]. Returns out."""
        return embedding(token_ids, self.weight, out)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden: [rows, hidden]; out: [rows, vocab] float32. Returns out."""
        return matmul(hidden, self.weight, out_dtype=torch.float32, out=out)

    def parameters(self) -> Parameters:
        """The weight by checkpoint name."""
        return rows(self._quantization, self.name, self.weight.n, self.weight)


class Attention:
    """Self-attention of one layer: QKV, optional norm of queries and keys, rotary, paged attention, output."""

    def __init__(self, name: str, config: ModelConfig, window: int, dtype: torch.dtype) -> None:
        self.config, self.window = config, window
        q, kv = config.q_size, config.kv_size
        parts = {f"{name}.q_proj": q, f"{name}.k_proj": kv, f"{name}.v_proj": kv}
        self.qkv = Linear(config.hidden_size, parts, dtype, config.quantization, bias=config.qkv_bias)
        output = {f"{name}.o_proj": config.hidden_size}
        self.output = Linear(q, output, dtype, config.quantization, bias=config.output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = Norm(f"{name}.q_norm", config.head_size, config.rms_norm_eps)
            self.k_norm = Norm(f"{name}.k_norm", config.head_size, config.rms_norm_eps)

    def __call__(self, a: Activations, batch: ForwardBatch, cos_sin: Tensor, kv_cache: Tensor) -> None:
        """Adds attention(a.normed) to a.hidden. kv_cache: this layer's."""
        config = self.config
        qkv = self.qkv(a.normed, a.qkv, ordered=a.ordered)
        if self.q_norm is not None and self.k_norm is not None:
            rms_norm_heads(qkv, 0, config.num_heads, self.q_norm.weight, self.q_norm.eps)
            rms_norm_heads(qkv, config.q_size, config.num_kv_heads, self.k_norm.weight, self.k_norm.eps)
        rotary_kv_write(qkv, cos_sin, batch.positions, batch.slots, kv_cache, config.num_heads)
        paged_attention(
            qkv,
            kv_cache,
            batch.block_tables,
            batch.token_begins,
            batch.context_lens,
            config.num_heads,
            config.head_size**-0.5,
            self.window,
            a.attended,
            max_query_len=batch.max_query_len,
            max_context_len=batch.max_context_len,
        )
        self.output(a.attended, a.hidden, residual=a.hidden, ordered=a.ordered)

    def parameters(self) -> Parameters:
        """All tensors by checkpoint name."""
        norms = {**self.q_norm.parameters(), **self.k_norm.parameters()} if self.q_norm and self.k_norm else {}
        return {**self.qkv.parameters(), **self.output.parameters(), **norms}


class Mlp:
    """SwiGLU MLP of one layer."""

    def __init__(self, name: str, config: ModelConfig, dtype: torch.dtype) -> None:
        size, quantization = config.intermediate_size, config.quantization
        parts = {f"{name}.gate_proj": size, f"{name}.up_proj": size}
        self.gate_up = Linear(config.hidden_size, parts, dtype, quantization, bias=config.mlp_bias, gated=True)
        self.down = Linear(size, {f"{name}.down_proj": config.hidden_size}, dtype, quantization, bias=config.mlp_bias)

    def __call__(self, a: Activations) -> None:
        """Adds mlp(a.normed) to a.hidden."""
        self.gate_up(a.normed, a.gated, ordered=a.ordered)
        self.down(a.gated, a.hidden, residual=a.hidden, ordered=a.ordered)

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
