"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3 differ in a bias, a norm, a window, a rope."""

import torch
from torch import Tensor

from octavo.models.batch import Activations, ForwardBatch
from octavo.models.config import ModelConfig
from octavo.models.layers import Attention, Embedding, Mlp, Norm, Parameters, rotary_table


class Layer:
    """x + attention(norm(x)), then + mlp(norm(.))."""

    def __init__(self, index: int, config: ModelConfig, dtype: torch.dtype) -> None:
        name = f"model.layers.{index}"
        self.attention_norm = Norm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(f"{name}.self_attn", config, config.windows[index], dtype)
        self.mlp_norm = Norm(f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(f"{name}.mlp", config, dtype)

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
    """A decoder with weights allocated and unfilled; `parameters` says which checkpoint tensors fill it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, max_len: int) -> None:
        """max_len: positions that the rotary table covers."""
        self.config, self.dtype = config, dtype
        self.embedding = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, dtype)
        self.layers = [Layer(i, config, dtype) for i in range(config.num_layers)]
        self.norm = Norm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.head = self.embedding
        if not config.tie_word_embeddings:
            self.head = Embedding("lm_head", config.vocab_size, config.hidden_size, dtype)
        self.cos_sin = rotary_table(config.rope, config.head_size, max_len)

    def forward(self, a: Activations, batch: ForwardBatch, kv_caches: list[Tensor]) -> None:
        """Leaves the last hidden state of every token, normed, in a.normed. KV is written to the caches."""
        self.embedding(batch.token_ids, a.hidden)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            layer(a, batch, self.cos_sin, kv_cache)
        self.norm(a.hidden, a.normed)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden: [rows, hidden]; out: [rows, vocab] float32. Returns out."""
        return self.head.logits(hidden, out)

    def parameters(self) -> Parameters:
        """All tensors by checkpoint name."""
        heads = {self.embedding, self.head}  # one, where tied
        parts: list[Embedding | Layer | Norm] = [*heads, *self.layers, self.norm]
        return {name: parameter for part in parts for name, parameter in part.parameters().items()}
