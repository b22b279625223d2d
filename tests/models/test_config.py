"""config.json is data: what is not supported or not sane is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from octavo.models.config import ConfigError, parse_config, read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


QWEN_WINDOW: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 7,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architecture None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": ["awq"]}, "quantization_config: expected an object"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": "320"}, "vocab_size is '320'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"hidden_size": 90}, "expected"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn"}}, "rope_theta is 1.0"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "extrapolation_factor": 1.0}}, "extrapolation_factor is not"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention is not supported in rope_param"),
        ({"rope_parameters": {"full_attention": {}}, "rope_scaling": {"type": "yarn"}}, "full_attention is not supp"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25, expected 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": True}, "sliding_window is True"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 1 << 70},
            "sliding_window is 1180591620717411303424",
        ),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window is missing"),
        ({"architectures": ["MistralForCausalLM"], "num_key_value_heads": None}, "num_key_value_heads is None"),
        ({"architectures": [[]]}, r"architecture \[\]"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({**QWEN_WINDOW, "max_window_layers": "x"}, "max_window_layers is 'x'"),
        (QWEN_WINDOW, "max_window_layers is None"),
        ({**QWEN_WINDOW, "layer_types": 5}, "layer_types: expected 3 entries"),
        ({**QWEN_WINDOW, "layer_types": [[], [], []]}, "layer_types: expected 3 entries"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 1e-5}}, "is 1e-05"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ],
)
def test_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({**LLAMA, **change})


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 200_000, b"\xff\xfe"])
def test_malformed_files_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="config.json") as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 1000


def test_old_and_new_names_of_rope() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = parse_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}})
    new = parse_config({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}})
    assert old == new
    assert old.rope.theta == 5e5 and old.rope.original_max_position == 64
    assert parse_config({**LLAMA, "rope_scaling": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}) == old


def test_keys_of_rope_that_say_nothing_are_accepted() -> None:
    nothing = {"rope_type": "default", "partial_rotary_factor": 1.0, "mrope_section": None}
    with_them = {**LLAMA, "partial_rotary_factor": None, "rope_scaling": None, "rope_parameters": nothing}
    assert parse_config(with_them) == parse_config(LLAMA)


@pytest.mark.parametrize(
    ("rope", "max_position"),
    [
        ({"rope_type": "default"}, 4000),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "linear", "factor": 2.5}, 10000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3000}, 12000),  # as Qwen3's
        ({"rope_type": "yarn", "factor": 4.0}, 16000),
        ({"rope_type": "yarn", "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "yarn", "factor": 1e11, "original_max_position_embeddings": 1000}, 1 << 27),
    ],
)
def test_positions_end_where_the_rope_is_stretched_to(rope: dict[str, Any], max_position: int) -> None:
    config = {**LLAMA, "max_position_embeddings": 4000, "rope_scaling": rope}
    assert parse_config(config).max_position == max_position


def test_windows_per_layer() -> None:
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 7, "max_window_layers": 1}
    assert parse_config(qwen).windows == (0, 0, 0)
    assert parse_config({**qwen, "use_sliding_window": True}).windows == (0, 7, 7)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert parse_config({**qwen, "use_sliding_window": True, "layer_types": types}).windows == (7, 0, 0)
    assert parse_config({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 9}).windows == (9, 9, 9)
