"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3 differ in a bias, a norm, a window, a rope."""

import torch
from torch import Tensor

from octavo.models.batch import Activations, ForwardBatch
from octavo.models.config import ModelConfig
from octavo.models.layers import Attention, Embedding, Linear, Mlp, Norm, Parameters, rotary_table
from octavo.models.quantization.base import EMBEDDING, HEAD
from octavo.models.shard import Shard


class Layer:
    """x + attention(norm(x)), then + mlp(norm(.))."""

    def __init__(self, index: int, config: ModelConfig, dtype: torch.dtype, shard: Shard) -> None:
        name = f"model.layers.{index}"
        self.attention_norm = Norm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(f"{name}.self_attn", config, config.windows[index], dtype, shard)
        self.mlp_norm = Norm(f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(f"{name}.mlp", config, dtype, shard)

    def __call__(self, a: Activations, batch: ForwardBatch, cos_sin: Tensor, kv_cache: Tensor) -> None:
        """Updates a.hidden. kv_cache: this layer's."""
        self.attention_norm(a.hidden, a.normed)
        self.attention(a, batch, cos_sin, kv_cache)
        self.mlp_norm(a.hidden, a.normed)
        self.mlp(a)

    def parameters(self) -> Parameters:
        """All tensors by checkpoint name."""
        parts = (self.attention_norm, self.attention, self.mlp_norm, self.mlp)
        return {name: parameter for part in parts for name, parameter in part.parameters().items()}


class Llama:
    """A rank's part of a decoder, its weights not yet filled; `parameters` says what of the checkpoint fills them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, max_len: int, shard: Shard | None = None) -> None:
        """max_len: positions that the rotary table covers; shard: by default all of the model."""
        shard = shard or Shard()
        self.config, self.dtype, self.shard = config, dtype, shard
        vocab, hidden_size, quantization = shard.vocab(config), config.hidden_size, config.quantization
        self.embedding = Embedding(EMBEDDING, vocab, hidden_size, dtype, quantization)
        self.layers = [Layer(i, config, dtype, shard) for i in range(config.num_layers)]
        self.norm = Norm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.head: Linear | None = None  # None: the embedding serves as one
        if config.has_head:
            self.head = Linear(hidden_size, {HEAD: vocab}, dtype, quantization)
        self.cos_sin = rotary_table(config.rope, config.head_size, max_len)

    def forward(self, a: Activations, batch: ForwardBatch, kv_caches: list[Tensor]) -> None:
        """Leaves the last hidden state of every token, normed, in a.normed. KV is written to the caches."""
        self.embedding(batch.token_ids, a)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            layer(a, batch, self.cos_sin, kv_cache)
        self.norm(a.hidden, a.normed)
        a.check()

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden: [rows, hidden]; out: [rows, this rank's vocabulary] float32. Returns out."""
        return self.embedding.logits(hidden, out) if self.head is None else self.head(hidden, out)

    def parameters(self) -> Parameters:
        """All tensors by checkpoint name."""
        heads = [] if self.head is None else [self.head]
        parts: list[Embedding | Linear | Layer | Norm] = [self.embedding, *heads, *self.layers, self.norm]
        return {name: parameter for part in parts for name, parameter in part.parameters().items()}
