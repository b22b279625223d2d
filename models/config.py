"""The one reader of a checkpoint's config.json: read as data, checked, turned into a `ModelConfig`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octavo.models.gguf import GgufError, GgufFile
from octavo.models.quantization.base import HEAD, PLAIN, Quantization


class ConfigError(ValueError):
    """config.json is missing, malformed, or describes what is not supported. The text is one line for a person."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `kind` is default, linear, llama3, yarn or factors; the rest as the checkpoint names it."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cosines and sines
    factors: tuple[float, ...] = ()  # of the factors kind: what each angle is divided by


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-family model. Sizes in elements; `windows` has one entry per layer, 0 for full attention."""

    architecture: str
    dtype: str  # of the checkpoint, as config.json names it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    max_position: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    rope: RopeConfig
    quantization_config: Mapping[str, Any] | None = None  # as config.json has it
    quantization: Quantization = PLAIN  # what comes of that, once the checkpoint has been looked at

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads, or of all value heads."""
        return self.num_kv_heads * self.head_size

    @property
    def has_head(self) -> bool:
        """Whether the output head has a weight of its own: one that is not the embedding, or not in its format."""
        form = self.quantization.format(HEAD, self.vocab_size, self.hidden_size)
        return not self.tie_word_embeddings or form is not None


# architecture -> whether it (has a QKV bias whatever the file says, normalises queries and keys)
ARCHITECTURES = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}
# A bound on every size, so that a hostile file cannot ask for absurd memory: (least, most)
_BOUNDS = {
    "vocab_size": (2, 1 << 22),
    "hidden_size": (16, 1 << 17),
    "intermediate_size": (16, 1 << 19),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (16, 256),
    "max_position_embeddings": (2, 1 << 27),
    "sliding_window": (1, 1 << 27),
    "max_window_layers": (0, 1024),
    "original_max_position_embeddings": (1, 1 << 27),
}
_ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor"),  # of llama3
    *("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),  # of yarn
)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`, which may also be a GGUF file. Raises ConfigError."""
    if folder.is_file():
        return _read_gguf(folder)
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is {folder} a Hugging Face model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected an object")
    try:
        return parse_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_gguf(path: Path) -> ModelConfig:
    try:
        file = GgufFile(path)
        config, factors = parse_config(file.config()), file.rope_factors()
    except GgufError as error:
        raise ConfigError(str(error)) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if factors is None:
        return config
    if len(factors) != config.head_size // 2 or not all(0 < factor < 1e12 for factor in factors):
        raise ConfigError(f"{path}: tensor rope_freqs.weight: expected {config.head_size // 2} positive numbers")
    return replace(config, rope=replace(config.rope, kind="factors", factors=factors))


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration from config.json's content. Raises ConfigError that names the key."""
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if not isinstance(raw.get("quantization_config"), dict | None):
        raise ConfigError("quantization_config: expected an object")
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act {activation!r} is not supported; supported: silu")
    always_qkv_bias, qk_norm = ARCHITECTURES[architecture]
    heads = _size(raw, "num_attention_heads")
    hidden = _size(raw, "hidden_size")
    # Older Llamas leave it out and mean all; the others' defaults are sizes of one model, so they must say.
    kv_heads = _size(raw, "num_key_value_heads", heads if architecture == "LlamaForCausalLM" else None)
    head_size = _size(raw, "head_dim", hidden // heads)
    layers = _size(raw, "num_hidden_layers")
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    inner = _size(raw, "intermediate_size")
    for name, value in (("head_dim", head_size), ("hidden_size", hidden), ("intermediate_size", inner)):
        if value % 16:
            raise ConfigError(f"{name} is {value}, expected a multiple of 16")
    attention_bias = _flag(raw, "attention_bias")
    rope = _rope(raw)
    return ModelConfig(
        architecture=architecture,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        max_position=_max_position(raw, rope),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        qkv_bias=always_qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=_flag(raw, "mlp_bias"),
        qk_norm=qk_norm,
        windows=_windows(raw, architecture, layers),
        rope=rope,
        quantization_config=raw.get("quantization_config"),
    )


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    low, high = _BOUNDS[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{key} is {value!r}, expected an integer from {low} to {high}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
        raise ConfigError(f"{key} is {value!r}, expected a positive number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}, expected true or false")
    return bool(value)


def _windows(raw: Mapping[str, Any], architecture: str, layers: int) -> tuple[int, ...]:
    """The window of each layer. Keys whose defaults are those of one certain model must be there."""
    is_qwen = architecture.startswith("Qwen")
    if architecture == "LlamaForCausalLM" or (is_qwen and not _flag(raw, "use_sliding_window")):
        return (0,) * layers
    if "sliding_window" not in raw:
        raise ConfigError("sliding_window is missing, expected an integer or null")
    if raw["sliding_window"] is None:
        return (0,) * layers
    window = _size(raw, "sliding_window")
    types = raw.get("layer_types")
    if types is None:
        full = _size(raw, "max_window_layers") if is_qwen else 0
        types = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    kinds = {"full_attention": 0, "sliding_attention": window}
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(not isinstance(t, str) or t not in kinds for t in types)
    ):
        raise ConfigError(f"layer_types: expected {layers} entries out of {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in types)


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    scaling: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):  # the new name, the old one
        if not isinstance(given := raw.get(name) or {}, dict):
            raise ConfigError(f"{name}: expected an object")
        scaling |= {key: value for key, value in given.items() if value is not None}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ConfigError(f"rope type {kind!r} is not supported; supported: default, linear, llama3, yarn")
    for key in scaling:
        if key not in _ROPE_KEYS:
            raise ConfigError(f"{key} is not supported in rope_parameters; supported: {', '.join(_ROPE_KEYS)}")
    if kind in ("linear", "llama3") and "factor" not in scaling:
        raise ConfigError(f"factor is missing, with rope type {kind}")
    for holder in (raw, scaling):
        if (part := holder.get("partial_rotary_factor")) not in (None, 1):
            raise ConfigError(f"partial_rotary_factor is {part!r}, expected 1: these models rotate whole heads")
    theta = _number(scaling if "rope_theta" in scaling else raw, "rope_theta", 10000.0)
    if kind == "yarn" and theta <= 1:
        raise ConfigError(f"rope_theta is {theta}, expected more than 1 with rope type yarn")
    max_position = _size(raw, "max_position_embeddings", 2048)
    original = _size(scaling, "original_max_position_embeddings", max_position)
    factor = _number(scaling, "factor", max_position / original if kind == "yarn" else 1.0)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=_number(scaling, "low_freq_factor", 1.0),
        high_freq_factor=_number(scaling, "high_freq_factor", 4.0),
        original_max_position=original,
        beta_fast=_number(scaling, "beta_fast", 32.0),
        beta_slow=_number(scaling, "beta_slow", 1.0),
        truncate="truncate" not in scaling or _flag(scaling, "truncate"),
        attention_factor=_yarn_attention_factor(scaling, factor) if kind == "yarn" else 1.0,
    )


def _max_position(raw: Mapping[str, Any], rope: RopeConfig) -> int:
    """max_position_embeddings, or, where that is of the time before the rope was stretched, what it is stretched to."""
    given = _size(raw, "max_position_embeddings", 2048)
    stretched = {"linear": given, "yarn": rope.original_max_position}.get(rope.kind, 0) * rope.factor
    return max(given, int(min(stretched, _BOUNDS["max_position_embeddings"][1])))


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """What the file says, else 0.1 ln(factor) + 1, or the quotient of two of these where it weighs the logarithm."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0

    default = mscale(1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        default = mscale(_number(scaling, "mscale", 1.0)) / mscale(_number(scaling, "mscale_all_dim", 1.0))
    return _number(scaling, "attention_factor", default)
