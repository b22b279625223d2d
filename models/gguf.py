"""GGUF files: metadata and the places of tensors, read as data within the file's bounds, and the model they describe.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of keys and tensors are llama.cpp's.
Loads no torch, so that the front end may read a file's metadata.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_KEYS, MAX_ARRAY_LEN = 1 << 16, 1 << 24  # a few hundred, and a few hundred thousand, are usual
_STRING, _ARRAY = 8, 9
# type of a value -> how struct names it
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# number in the file -> (name, elements of a block, bytes of a block)
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# Names of types that are known and not read, for the message that refuses them.
_OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K"}
_OTHER_TYPES |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"}
_OTHER_TYPES |= {23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"}
_OTHER_TYPES |= {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


class GgufError(ValueError):
    """A GGUF file that is corrupt, or holds what is not supported. The text is one line that names the file."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its shape as torch has it, the name of its type, and where in the file its bytes lie."""

    shape: tuple[int, ...]
    type: str
    begin: int
    num_bytes: int


class GgufFile:
    """A GGUF file, mapped into memory.

    Attributes:
        metadata: key -> int, float, bool, str, or a list of one of these.
        tensors: name -> where and what it is; all of them lie within the file.

    Raises:
        GgufError: the file cannot be read, is cut off or inconsistent, or holds a type of tensor that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
            raise GgufError(f"{path}: cannot be read: {error}") from None
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, _Malformed) as error:
            reason = "the file ends before its header does" if isinstance(error, struct.error) else str(error)
            raise GgufError(f"{path}: not a whole GGUF file: {reason}") from None

    def _read_header(self) -> None:
        if self.data[:4] != b"GGUF":
            raise _Malformed("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in VERSIONS:
            raise _Malformed(f"version is {version}, expected one of {VERSIONS} in little-endian order")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        if num_keys > MAX_KEYS:
            raise _Malformed(f"it has {num_keys} keys, expected at most {MAX_KEYS}")
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                raise _Malformed(f"key {key} is there twice")
            self.metadata[key] = self._value(self._scalar("I"))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise _Malformed(f"general.alignment is {alignment!r}, expected a power of two")
        entries = [self._tensor() for _ in range(num_tensors)]
        begin = -(-self._at // alignment) * alignment
        for name, shape, number, offset in entries:
            self._add(name, shape, number, begin, offset, alignment)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self._string(), self._scalar("I")
        if not 0 < num_dimensions <= MAX_DIMENSIONS:
            raise _Malformed(f"tensor {name} has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
        # The file has the innermost dimension first.
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_dimensions)]))
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _add(
        self, name: str, shape: tuple[int, ...], number: int, data_begin: int, offset: int, alignment: int
    ) -> None:
        if number not in TENSOR_TYPES:
            kind = _OTHER_TYPES.get(number, f"number {number}")
            known = ", ".join(known for known, _, _ in TENSOR_TYPES.values())
            raise GgufError(f"{self.path}: tensor {name} has type {kind}, which is not supported; supported: {known}")
        if name in self.tensors:
            raise _Malformed(f"tensor {name} is there twice")
        kind, block_size, block_bytes = TENSOR_TYPES[number]
        if shape[-1] % block_size or 0 in shape:
            raise _Malformed(f"tensor {name} has shape {shape}, expected whole blocks of {block_size} for {kind}")
        begin, num_bytes = data_begin + offset, prod(shape) // block_size * block_bytes
        if offset % alignment or begin + num_bytes > len(self.data):
            raise _Malformed(
                f"tensor {name} lies at bytes {begin} to {begin + num_bytes}, expected a multiple of {alignment} and "
                f"an end within the file's {len(self.data)} bytes"
            )
        self.tensors[name] = GgufTensor(shape, kind, begin, num_bytes)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        return self._take(length).decode()

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self.data) - self._at:
            raise _Malformed(f"{num_bytes} bytes are announced at byte {self._at}, but the file ends before")
        self._at += num_bytes
        return self.data[self._at - num_bytes : self._at]

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise _Malformed(f"a value of type {kind} at byte {self._at}")
        kind, count = self._scalar("I"), self._scalar("Q")
        if count > MAX_ARRAY_LEN:
            raise _Malformed(f"an array of {count} values at byte {self._at}, expected at most {MAX_ARRAY_LEN}")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise _Malformed(f"an array of type {kind} at byte {self._at}")
        code = f"<{_SCALARS[kind]}"
        return [value for (value,) in struct.iter_unpack(code, self._take(count * struct.calcsize(code)))]

    def config(self) -> dict[str, Any]:
        """What config.json would say of this model. Raises GgufError for what is not supported."""
        architecture = self.metadata.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise GgufError(
                f"{self.path}: general.architecture {architecture!r} is not supported; supported: "
                f"{', '.join(_ARCHITECTURES)}"
            )
        if self._get("expert_count", int, 0):
            raise GgufError(f"{self.path}: {architecture}.expert_count: mixtures of experts are not supported")
        heads, hidden = self._get("attention.head_count", int), self._get("embedding_length", int)
        head_size = self._get("attention.key_length", int, hidden // max(heads, 1))
        for name in ("attention.value_length", "rope.dimension_count"):
            if (size := self._get(name, int, head_size)) != head_size:
                raise GgufError(f"{self.path}: {architecture}.{name} is {size}, expected the head size {head_size}")
        if "token_embd.weight" not in self.tensors:
            raise GgufError(f"{self.path}: tensor token_embd.weight is missing")
        return {
            "architectures": [_ARCHITECTURES[architecture]],
            "dtype": "bfloat16",
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._get("feed_forward_length", int),
            "num_hidden_layers": self._get("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", int, heads),
            "head_dim": head_size,
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon", float),
            "max_position_embeddings": self._get("context_length", int),
            # A head that is the embedding itself is not written twice.
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in self.tensors,
            "sliding_window": self._get("attention.sliding_window", int, 0) or None,
            "rope_parameters": self._rope(),
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }

    def _rope(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": self._get("rope.freq_base", float, 10000.0), "rope_type": "default"}
        kind = self._get("rope.scaling.type", str, "none")
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": self._get("rope.scaling.factor", float)}
        elif kind != "none":
            raise GgufError(f"{self.path}: rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self._get("rope.scaling.original_context_length", int)
        return rope

    def rope_factors(self) -> tuple[float, ...] | None:
        """What each of the rope's angles is divided by: the llama3 kind, worked out. Raises GgufError."""
        tensor = self.tensors.get("rope_freqs.weight")
        if tensor is None:
            return None
        kind = self._get("rope.scaling.type", str, "none")
        if tensor.type != "F32" or kind != "none":
            raise GgufError(
                f"{self.path}: tensor rope_freqs.weight has type {tensor.type}, rope.scaling.type is {kind}"
            )
        stored = self.data[tensor.begin : tensor.begin + tensor.num_bytes]
        return tuple(factor for (factor,) in struct.iter_unpack("<f", stored))

    def _get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of an architecture's key, which must be of this kind."""
        key = f"{self.metadata['general.architecture']}.{name}"
        value = self.metadata.get(key, default)
        if type(value) is not kind:
            raise GgufError(f"{self.path}: {key} is {str(value)[:40]}, expected one {kind.__name__}")
        return value


class _Malformed(Exception):
    """What is wrong with the file, to be prefixed with its name."""


_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR_NAME = re.compile(r"(?:blk\.([0-9]{1,4})\.)?(\w+)\.(weight|bias)")
IGNORED_TENSORS = ("rope_freqs.weight",)  # part of the configuration


def checkpoint_name(name: str) -> str | None:
    """What a Hugging Face checkpoint calls the tensor; None for one that is no part of the models served here."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None:
        return None
    layer, module, kind = match.groups()
    known: Mapping[str, str] = _TOP if layer is None else _OF_LAYER
    if module not in known:
        return None
    return f"{known[module]}.{kind}" if layer is None else f"model.layers.{int(layer)}.{known[module]}.{kind}"
