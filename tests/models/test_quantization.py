"""Quantised checkpoints: each format against its own library's or a float64 account of its packing; what is refused."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rank_threads import engine_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from octavo.kernels import backend
from octavo.kernels.matmul import PackedWeight, packed_bytes
from octavo.kernels.matmul_4bit import Packed4Bit
from octavo.models.batch import Activations, ForwardBatch
from octavo.models.checkpoint import CheckpointError, SafetensorsCheckpoint, TensorInfo, open_checkpoint
from octavo.models.config import ConfigError, ModelConfig, RopeConfig, parse_config, read_config
from octavo.models.gguf import GgufFile, checkpoint_name
from octavo.models.layers import rotary_table
from octavo.models.llama import Llama
from octavo.models.loader import load
from octavo.models.memory import kv_block_shape, linears, num_vector_parameters, weight_bytes
from octavo.models.quantization import online
from octavo.models.quantization.base import HEAD, Quantization, QuantizedRows
from octavo.models.quantization.bitsandbytes import NF4
from octavo.models.quantization.calibrated import quantize_for
from octavo.models.quantization.choose import with_quantization
from octavo.server import quantize
from octavo.server.config import EngineConfig
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.errors import StartupError
from octavo.server.local_model import load_tokenizer
from octavo.server.quantize import quantize_checkpoint

DATA = Path(__file__).parent.parent / "data" / "quantized"
NAME = "model.layers.0.mlp.down_proj"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PACK = torch.tensor([1 << 4 * place for place in range(8)])  # eight codes to an int32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def compressed(**weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_int32(codes: Tensor) -> Tensor:
    """[rows, 8 words] codes below 16 -> [rows, words] int32, the first in the lowest bits."""
    words = (codes.long().unflatten(1, (-1, 8)) * PACK).sum(2)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()


def quantization(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> Quantization:
    """That of a checkpoint of these tensors, which need not be a whole model's."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = replace(CONFIG, quantization_config=raw)
    return with_quantization(config, SafetensorsCheckpoint(folder)).quantization


def read(found: Quantization, folder: Path, n: int, k: int) -> QuantizedRows:
    """The rows of the module NAME, whose tensors must be as they are announced."""
    checkpoint = SafetensorsCheckpoint(folder)
    specs = found.tensors(NAME, n, k)
    for name, spec in specs.items():
        spec.check(checkpoint.tensors[name])
    rows = found.read(NAME, n, k, {name: checkpoint.read(name) for name in specs}, slice(0, n), slice(0, k))
    assert isinstance(rows, QuantizedRows) and rows.format == found.format(NAME, n, k)
    return rows


CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    dtype="float32",
    vocab_size=320,
    hidden_size=96,
    intermediate_size=160,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_size=32,
    rms_norm_eps=1e-5,
    max_position=512,
    tie_word_embeddings=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(0,),
    rope=None,  # type: ignore[arg-type]
)


# bitsandbytes


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "k", "block_size"), [(48, 192, 64), (80, 96, 64), (16, 144, 128), (320, 64, 64)])
def test_bitsandbytes_weights_are_its_own(
    n: int, k: int, block_size: int, kind: str, nested: bool, storage: torch.dtype, tmp_path: Path
) -> None:
    """Blocks of 64 span rows of 96 and of 144, which its CPU kernel mistakes (0.50), so there its parts are used."""
    import bitsandbytes.functional as bnb

    for dtype in DTYPES:
        weight = torch.randn((n, k), generator=generator(n)).to(dtype)
        packed, state = bnb.quantize_4bit(weight, None, None, block_size, nested, kind, storage)
        stored = {f"{NAME}.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        config = {**BNB, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
        found = quantization(tmp_path, config, {f"{NAME}.weight": packed, **stored})
        if k % block_size == 0:
            want = bnb.dequantize_4bit(packed, state)
        else:
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
            codes = torch.stack((packed.view(torch.uint8) >> 4, packed.view(torch.uint8) & 15), dim=2).flatten()
            want = (state.code[codes.long()].view(-1, block_size) * absmax[:, None]).view(n, k).to(dtype)
        assert torch.equal(read(found, tmp_path, n, k).dequantize(dtype), want)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_to_nf4_and_fp4_is_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    import bitsandbytes.functional as bnb

    weight = torch.randn((64, 256), generator=generator()).to(dtype)
    weight[3, 64:128] = 0.0
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    rows = online.quantize(weight, online.form(kind, 64, "BF16"))
    assert torch.equal(rows.scales.flatten(), state.absmax)
    assert torch.equal(rows.dequantize(dtype), bnb.dequantize_4bit(packed, state))


# Formats of whole numbers: a float64 account of the published packing


def int4_weight(n: int, groups: int, k: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes [n, k], scales and zero points [n, groups]."""
    g = generator(n + groups)
    codes = torch.randint(0, 16, (n, k), generator=g)
    zeros = torch.randint(0, 16, (n, groups), generator=g)
    return codes, (torch.rand((n, groups), generator=g) * 0.1 + 0.01).to(scale_dtype), zeros


def exact(codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, dtype: torch.dtype) -> Tensor:
    """(code - zero point) * scale in float64, rounded once; group: [k] of each input."""
    return ((codes - zeros[:, group]).double() * scales.double()[:, group]).to(dtype)


def in_order(k: int, size: int) -> Tensor:
    return torch.arange(k) // size


def unsorted(found: Quantization, rows: QuantizedRows, dtype: torch.dtype) -> Tensor:
    """The rows with their columns back in the checkpoint's order."""
    values, order = rows.dequantize(dtype), found.order(NAME)
    return values if order is None else torch.empty_like(values).index_copy_(1, order, values)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 128, -1])
def test_awq(size: int, scale_dtype: torch.dtype, tmp_path: Path) -> None:
    n, k = 64, 256
    group_size = k if size == -1 else size
    codes, scales, zeros = int4_weight(n, k // group_size, k, scale_dtype)
    # Four bits from the lowest up hold the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight.
    places = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    tensors = {
        f"{NAME}.qweight": to_int32(codes.T.unflatten(1, (-1, 8))[:, :, places].flatten(1)),
        f"{NAME}.qzeros": to_int32(zeros.T.unflatten(1, (-1, 8))[:, :, places].flatten(1)),
        f"{NAME}.scales": scales.T,
    }
    found = quantization(tmp_path, {**AWQ, "group_size": size}, tensors)
    rows = read(found, tmp_path, n, k)
    assert rows.format.scale_dtype == scale_dtype
    for dtype in DTYPES:
        assert torch.equal(rows.dequantize(dtype), exact(codes, scales, zeros, in_order(k, group_size), dtype))


def gptq_tensors(codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, version: int) -> dict[str, Tensor]:
    packed_zeros = to_int32(zeros.T)
    return {
        f"{NAME}.qweight": to_int32(codes).T,
        f"{NAME}.qzeros": packed_zeros - 0x11111111 if version == 1 else packed_zeros,
        f"{NAME}.scales": scales.T,
        f"{NAME}.g_idx": group.int(),
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["sorted", "by activation"])
@pytest.mark.parametrize(("k", "size"), [(256, 32), (256, 128), (96, 64), (64, -1)])
def test_gptq(k: int, size: int, order: str, version: int, tmp_path: Path) -> None:
    """Zero points of 0 are stored as 15 by version 1, with a borrow from the next; groups of 64 do not divide 96."""
    n, group_size = 64, k if size == -1 else size
    codes, scales, zeros = int4_weight(n, -(-k // group_size), k, torch.float16)
    group = in_order(k, group_size)
    if order != "sorted":
        group = group[torch.randperm(k, generator=generator())]
    config = {**GPTQ, "group_size": size, "desc_act": order != "sorted"}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    found = quantization(tmp_path, config, gptq_tensors(codes, scales, zeros, group, version))
    rows = read(found, tmp_path, n, k)
    assert (found.order(NAME) is not None) == (order != "sorted" and size != -1) == found.has_orders
    for dtype in DTYPES:
        assert torch.equal(unsorted(found, rows, dtype), exact(codes, scales, zeros, group, dtype))


def test_symmetric_gptq_has_no_zero_points(tmp_path: Path) -> None:
    codes, scales, zeros = int4_weight(32, 4, 128, torch.float16)
    zeros.fill_(8)
    tensors = gptq_tensors(codes, scales, zeros, in_order(128, 32), 1)
    found = quantization(tmp_path, {**GPTQ, "sym": True}, tensors)
    rows = read(found, tmp_path, 32, 128)
    assert rows.shifts is None
    assert torch.equal(rows.dequantize(torch.bfloat16), exact(codes, scales, zeros, in_order(128, 32), torch.bfloat16))
    zeros[5, 1] = 7
    quantization(tmp_path, {**GPTQ, "sym": True}, gptq_tensors(codes, scales, zeros, in_order(128, 32), 1))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {NAME}.qzeros has other zero points than 8"):
        read(found, tmp_path, 32, 128)


@pytest.mark.parametrize("zeros_dtype", [torch.int32, torch.int8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("ordered", [False, True])
def test_compressed_tensors(
    strategy: str, symmetric: bool, zeros_dtype: torch.dtype, ordered: bool, tmp_path: Path
) -> None:
    n, k = 64, 128
    group_size = 32 if strategy == "group" else k
    codes, scales, zeros = int4_weight(n, k // group_size, k, torch.bfloat16)
    group = in_order(k, group_size)
    if symmetric:
        zeros.fill_(8)
    tensors = {
        f"{NAME}.weight_packed": to_int32(codes),
        f"{NAME}.weight_scale": scales,
        f"{NAME}.weight_shape": torch.tensor([n, k]),
    }
    if ordered:
        group = group[torch.randperm(k, generator=generator())]
        tensors[f"{NAME}.weight_g_idx"] = group.int()
    if not symmetric:
        packed = to_int32(zeros.T).T if zeros_dtype == torch.int32 else (zeros - 8).to(torch.int8)
        tensors[f"{NAME}.weight_zero_point"] = packed
    weights = {"strategy": strategy, "symmetric": symmetric, "group_size": 32 if strategy == "group" else None}
    found = quantization(tmp_path, compressed(**weights), tensors)
    rows = read(found, tmp_path, n, k)
    for dtype in DTYPES:
        assert torch.equal(unsorted(found, rows, dtype), exact(codes, scales, zeros, group, dtype))


def test_a_part_of_rows_is_that_part_of_the_weight() -> None:
    rows = online.quantize(torch.randn((32, 256), generator=generator()), online.form("int4", 32, "BF16"))
    part = rows.part(slice(8, 24), slice(64, 192))
    assert torch.equal(part.dequantize(torch.float32), rows.dequantize(torch.float32)[8:24, 64:192])


@pytest.mark.parametrize("method", ["nf4", "fp4", "int4"])
def test_what_is_quantised_while_loading_is_no_more_than_a_rank_has(method: str, tmp_path: Path) -> None:
    weight = torch.randn((96, 256), generator=generator()).bfloat16()
    save_file({f"{NAME}.weight": weight}, tmp_path / "model.safetensors")
    found = online.Online(method, 32, SafetensorsCheckpoint(tmp_path), False, False)
    whole, part = (
        found.read(NAME, 96, 256, {f"{NAME}.weight": weight}, slice(*rows), slice(*columns))
        for rows, columns in (((0, 96), (0, 256)), ((40, 72), (64, 192)))
    )
    assert isinstance(whole, QuantizedRows) and isinstance(part, QuantizedRows)
    want = whole.part(slice(40, 72), slice(64, 192))
    assert torch.equal(part.codes, want.codes) and torch.equal(part.scales, want.scales)


@pytest.mark.parametrize("scale_dtype", ["BF16", "F16"])
@pytest.mark.parametrize("method", ["nf4", "fp4", "int4"])
def test_calibrated_codes_are_for_the_inputs(method: str, scale_dtype: str) -> None:
    """Of inputs that go together, and some of which are large; rows of zeros, and an input that never comes."""
    x = torch.randn((512, 24), generator=generator()) @ torch.randn((24, 192), generator=generator(1))
    x = (x + 0.3 * torch.randn(x.shape, generator=generator(2))) * torch.linspace(0.2, 3.0, 192)
    x[:, 7] = 0.0
    weight = torch.randn((80, 192), generator=generator(3))
    weight[5] = weight[9, 64:128] = 0.0
    form = online.form(method, 64 if method == "nf4" else 32, scale_dtype)
    plain, fitted = online.quantize(weight, form), quantize_for(weight, form, x.T @ x, torch.zeros((192, 192)))
    errors = [float(((rows.dequantize(torch.float32) - weight) @ x.T).square().sum()) for rows in (plain, fitted)]
    assert errors[1] < 0.35 * errors[0]
    assert fitted.codes.dtype == torch.uint8 and fitted.scales.dtype == form.scale_dtype
    assert not fitted.dequantize(torch.float32)[5].any() and fitted.dequantize(torch.float32).isfinite().all()


@pytest.mark.parametrize("method", ["nf4", "fp4", "int4"])
def test_calibrated_codes_make_up_for_what_inputs_are_off(method: str) -> None:
    """Outputs for inputs that are off are nearer to the exact ones than those of codes that only fit the inputs."""
    x = torch.randn((512, 192), generator=generator())
    off = 0.02 * torch.randn((192, 192), generator=generator(1))
    y = x + x @ off + 0.1 * torch.randn((512, 192), generator=generator(2))
    weight = torch.randn((80, 192), generator=generator(3))
    form = online.form(method, 64 if method == "nf4" else 32, "BF16")
    fitted, moved = (quantize_for(weight, form, y.T @ y, drift) for drift in (torch.zeros((192, 192)), (x - y).T @ y))
    errors = [float((y @ q.dequantize(torch.float32).T - x @ weight.T).square().sum()) for q in (fitted, moved)]
    assert errors[1] < 0.3 * errors[0]


FILES = {
    "awq": AWQ,
    "gptq_v1_sorted": {**GPTQ, "checkpoint_format": "gptq"},
    "gptq_v1_ordered": {**GPTQ, "checkpoint_format": "gptq", "desc_act": True},
    "gptq_v2_sorted": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "gptq_v2_ordered": {**GPTQ, "checkpoint_format": "gptq_v2", "desc_act": True},
    "compressed_tensors_symmetric": compressed(),
    "compressed_tensors_asymmetric": compressed(symmetric=False),
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_the_formats_own_libraries(file: str, tmp_path: Path) -> None:
    """Packed, and dequantised as `expected`, by AutoAWQ 0.2.9, GPTQModel 7.7.0 and compressed-tensors 0.20.0."""
    tensors = load_file(DATA / f"{file}.safetensors")
    want = tensors.pop("expected")
    found = quantization(tmp_path, FILES[file], {f"{NAME}.{name}": tensor for name, tensor in tensors.items()})
    rows = read(found, tmp_path, *want.shape)
    assert torch.equal(unsorted(found, rows, want.dtype), want)


# GGUF


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **metadata: Any) -> None:
    """By the format's own package. tensors: name -> (values, type they are quantised to)."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**GGUF_KEYS, **metadata}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (values, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        data = values if values.dtype == np.uint8 else gguf.quants.quantize(values, number)
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_KEYS: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
GGUF_SHAPES = {"attn_q": 256, "attn_k": 128, "attn_v": 128, "attn_output": 256}
GGUF_SHAPES |= {"ffn_gate": 256, "ffn_up": 256, "ffn_down": 256}


def random_gguf(path: Path, kind: str, **metadata: Any) -> None:
    """A model of one layer, its matrices of this type."""
    import gguf

    draw = np.random.default_rng(0)

    def matrix(n: int) -> np.ndarray:
        if kind != "Q6_K":  # which the package reads, and does not write
            return draw.standard_normal((n, 256), np.float32) * 0.1
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K][1]
        data = draw.integers(0, 256, (n, size), np.uint8)
        data[:, -2:] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        return data

    tensors = {f"blk.0.{name}.weight": (matrix(n), kind) for name, n in GGUF_SHAPES.items()}
    tensors |= {"token_embd.weight": (matrix(320), kind)}
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors[f"{name}.weight"] = (1 + 0.1 * draw.standard_normal(256, np.float32), "F32")
    write_gguf(path, tensors, **metadata)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K", "F16", "BF16", "F32"])
def test_gguf_tensors_are_those_of_its_own_package(kind: str, tmp_path: Path) -> None:
    import gguf

    random_gguf(tmp_path / "model.gguf", kind)
    config = read_config(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf", config)
    found = with_quantization(config, checkpoint).quantization
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, n in GGUF_SHAPES.items():
        module = checkpoint_name(f"blk.0.{name}.weight")
        assert module is not None
        tensor = expected[f"blk.0.{name}.weight"]
        want = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(n, 256)
        if name in ("attn_q", "attn_k"):  # neighbours are rotated there, halves here
            want = want.view(-1, 32, 2, 256).transpose(1, 2).reshape(n, 256)
        tensors = {module: checkpoint.read(module)}
        values = found.read(module.removesuffix(".weight"), n, 256, tensors, slice(0, n), slice(0, 256))
        if isinstance(values, QuantizedRows):
            values = values.dequantize(torch.float32)
        assert torch.equal(values.float(), want)


def test_a_gguf_file_says_what_the_model_is(tmp_path: Path) -> None:
    random_gguf(tmp_path / "model.gguf", "Q4_0", **{"llama.rope.freq_base": 5e5, "llama.rope.scaling.type": "linear"})
    with pytest.raises(ConfigError, match="model.gguf: llama.rope.scaling.factor is None"):
        read_config(tmp_path / "model.gguf")
    random_gguf(tmp_path / "model.gguf", "Q4_0", **{"llama.rope.freq_base": 5e5})
    config = read_config(tmp_path / "model.gguf")
    assert (config.num_heads, config.num_kv_heads, config.head_size, config.vocab_size) == (4, 2, 64, 320)
    assert config.tie_word_embeddings and config.rope.theta == 5e5 and config.max_position == 512
    random_gguf(tmp_path / "model.gguf", "Q4_0", **{"llama.expert_count": 8})
    with pytest.raises(ConfigError, match="model.gguf: llama.expert_count: mixtures of experts"):
        read_config(tmp_path / "model.gguf")


def test_rope_factors_of_a_gguf_file(tmp_path: Path) -> None:
    """Files of Llama 3 have the wavelengths' factors worked out, as a tensor."""
    rope = RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 64)
    table = rotary_table(rope, 64, 300)
    plain = 1.0 / 1e4 ** (torch.arange(0, 64, 2).float() / 64)
    stretched = torch.atan2(table[1, 32:], table[1, :32])
    write_gguf(
        tmp_path / "model.gguf",
        {
            "token_embd.weight": (np.zeros((320, 256), np.float32), "F32"),
            "rope_freqs.weight": ((plain / stretched).numpy(), "F32"),
        },
    )
    found = read_config(tmp_path / "model.gguf").rope
    assert found.kind == "factors"
    assert torch.allclose(rotary_table(found, 64, 300), table, atol=1e-4)


def test_a_type_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", {"token_embd.weight": (np.zeros((320, 176), np.uint8), "Q5_K")})
    with pytest.raises(ConfigError, match="model.gguf: tensor token_embd.weight has type Q5_K, which is not supported"):
        read_config(tmp_path / "model.gguf")


def test_a_gguf_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    random_gguf(path, "Q4_1", **{"tokenizer.ggml.tokens": ["a", "b"]})
    whole = path.read_bytes()
    for keep in [*range(0, 2000, 37), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ConfigError, match=r"model.gguf: .*(not a whole GGUF file|cannot be read)"):
            read_config(path)


def test_a_gguf_header_that_lies_is_refused(tmp_path: Path) -> None:
    """Every 4 bytes of a small file's header replaced by large numbers: an error that names the file, or no harm."""
    path = tmp_path / "model.gguf"
    write_gguf(path, {"token_embd.weight": (np.zeros((320, 256), np.float32), "Q4_0")}, **{"x": ["a", "b"]})
    whole = path.read_bytes()
    num_refused = 0
    for at in range(0, 700):
        for value in (0xFFFFFFFF, 0x7FFFFFFF, 9):
            path.write_bytes(whole[:at] + struct.pack("<I", value) + whole[at + 4 :])
            try:
                config = read_config(path)
                open_checkpoint(path, config).read("model.embed_tokens.weight")
            except (ConfigError, CheckpointError) as error:
                assert "model.gguf" in str(error) and "\n" not in str(error)
                num_refused += 1
            except KeyError as error:  # the name itself was changed: the loader would call the tensor missing
                assert "embed_tokens" in str(error)
    assert num_refused > 500


# What is not supported is refused by name, before anything is loaded


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"quant_method": "hqq"}, "quantization 'hqq' is not supported; supported: bitsandbytes, awq"),
        ({}, "quantization None is not supported"),
        ({**BNB, "load_in_8bit": True, "load_in_4bit": False}, "load_in_8bit is True"),
        ({**BNB, "load_in_4bit": False}, "load_in_4bit is False"),
        ({**BNB, "bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type is 'af4', which is not supported; .* nf4, fp4"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv', which is not supported; supported: gemm"),
        ({**AWQ, "bits": 8}, "bits is 8"),
        ({**AWQ, "zero_point": False}, "zero_point is False"),
        ({**GPTQ, "bits": 3}, "bits is 3, which is not supported; supported: 4"),
        ({**GPTQ, "bits": True}, "bits is True"),
        ({**GPTQ, "group_size": 8}, "group_size is 8, expected -1 or a multiple of 16"),
        ({**GPTQ, "group_size": "x"}, "group_size is 'x'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        ({**compressed(), "format": "float-quantized"}, "format is 'float-quantized'"),
        ({**compressed(), "quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({**compressed(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (compressed(num_bits=8), r"config_groups.group_0.weights.num_bits is 8"),
        (compressed(type="float"), r"config_groups.group_0.weights.type is 'float'"),
        (compressed(strategy="block"), r"weights.strategy is 'block'"),
        ({**compressed(), "config_groups": []}, "config_groups: expected an object"),
    ],
)
def test_settings_that_are_not_supported(raw: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        quantization(tmp_path, raw, {"x": torch.zeros(1)})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_quantised_activations_and_mixed_schemes_are_refused(tmp_path: Path) -> None:
    raw = compressed()
    raw["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(ConfigError, match="config_groups.group_0.input_activations"):
        quantization(tmp_path, raw, {"x": torch.zeros(1)})
    raw = compressed()
    raw["config_groups"]["group_1"] = compressed(group_size=64)["config_groups"]["group_0"]
    with pytest.raises(ConfigError, match="config_groups: groups that differ"):
        quantization(tmp_path, raw, {"x": torch.zeros(1)})


# Files that contradict themselves


def broken(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    tensors = gptq_tensors(*int4_weight(64, 8, 256, torch.float16), in_order(256, 32), 2)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("qweight", torch.zeros((16, 64), dtype=torch.int32), r"has shape \(16, 64\), expected \(32, 64\)"),
        ("qweight", torch.zeros((32, 64)), "has dtype F32, expected I32"),
        ("scales", torch.zeros((7, 64)), r"has shape \(7, 64\), expected \(8, 64\)"),
        ("g_idx", torch.zeros(256, dtype=torch.int32), "expected 8 groups of 32"),
        ("g_idx", torch.arange(256).int() // 32 - 1, "expected 8 groups of 32"),
        ("g_idx", torch.zeros((2, 2)), "has shape"),
    ],
)
def test_inconsistent_gptq_tensors(name: str, value: Tensor, words: str, tmp_path: Path) -> None:
    tensors = broken(lambda tensors: tensors.update({f"{NAME}.{name}": value}))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {NAME}.{name}:? .*{words}"):
        read(quantization(tmp_path, {**GPTQ, "checkpoint_format": "gptq_v2"}, tensors), tmp_path, 64, 256)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (b"\xff", "expected JSON with quant_type, blocksize and shape"),
        (b"[]", "expected JSON with quant_type"),
        (b'{"quant_type": "nf4", "blocksize": 48, "shape": [48, 192]}', "in blocks of 48 is not supported"),
        (b'{"quant_type": "fp4", "blocksize": 64, "shape": [48, 192]}', "quant_type 'fp4'"),
        (
            b'{"quant_type": "nf4", "blocksize": 64, "shape": [192, 48]}',
            r"says shape \[192, 48\], expected \[48, 192\]",
        ),
    ],
)
def test_inconsistent_bitsandbytes_state(state: bytes, words: str, tmp_path: Path) -> None:
    tensors = {
        f"{NAME}.weight": torch.zeros((48 * 96, 1), dtype=torch.uint8),
        f"{NAME}.weight.absmax": torch.zeros(144),
        f"{NAME}.weight.quant_map": torch.tensor(NF4),
        f"{NAME}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    found = quantization(tmp_path, BNB, tensors)
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor {NAME}.weight.quant_state.*{words}"):
        read(found, tmp_path, 48, 192)


def test_another_table_is_refused(tmp_path: Path) -> None:
    state = b'{"quant_type": "nf4", "blocksize": 64, "shape": [48, 192]}'
    tensors = {
        f"{NAME}.weight": torch.zeros((48 * 96, 1), dtype=torch.uint8),
        f"{NAME}.weight.absmax": torch.zeros(144),
        f"{NAME}.weight.quant_map": torch.tensor(NF4).flip(0),
        f"{NAME}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    with pytest.raises(CheckpointError, match=f"{NAME}.weight.quant_map is another table"):
        read(quantization(tmp_path, BNB, tensors), tmp_path, 48, 192)


def test_compressed_tensors_of_another_shape(tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight_packed": torch.zeros((64, 16), dtype=torch.int32)}
    tensors |= {f"{NAME}.weight_scale": torch.zeros((64, 4)), f"{NAME}.weight_shape": torch.tensor([128, 64])}
    with pytest.raises(CheckpointError, match=rf"{NAME}.weight_shape says \[128, 64\], expected \[64, 128\]"):
        read(quantization(tmp_path, compressed(), tensors), tmp_path, 64, 128)


# Whole models


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def loaded(path: Path, wanted: str | None = None, quantize_head: bool = False) -> Llama:
    config = read_config(path)
    checkpoint = open_checkpoint(path, config)
    model = Llama(with_quantization(config, checkpoint, wanted, quantize_head), torch.bfloat16, 64)
    load(checkpoint, model, tqdm(disable=True))
    return model


TEXT = torch.randint(0, 320, (40,), generator=generator())


def logits(model: Llama, tokens: Tensor = TEXT) -> Tensor:
    """Of each of 40 tokens."""
    positions = torch.arange(40, dtype=torch.int32)
    batch = ForwardBatch(
        token_ids=tokens.int(),
        positions=positions,
        slots=positions.long(),
        token_begins=torch.tensor([0, 40], dtype=torch.int32),
        context_lens=torch.tensor([40], dtype=torch.int32),
        block_tables=torch.arange(3, dtype=torch.int32)[None],
        max_query_len=40,
        max_context_len=40,
    )
    config = model.config
    caches = [torch.zeros(kv_block_shape(config, 3, 16), dtype=model.dtype) for _ in range(config.num_layers)]
    activations = Activations.empty(config, 40, model.dtype)
    model.forward(activations, batch, caches)
    return model.logits(activations.normed, torch.empty((40, config.vocab_size)))


def weights(model: Llama) -> list[PackedWeight | Packed4Bit]:
    found = [model.embedding.weight, *([model.head.weight] if model.head else [])]
    for layer in model.layers:
        found += [layer.attention.qkv.weight, *layer.attention.output.weights]
        found += [layer.mlp.gate_up.weight, *layer.mlp.down.weights]
    return found


def num_bytes(weight: PackedWeight | Packed4Bit) -> int:
    if isinstance(weight, PackedWeight):
        return weight.data.nbytes
    return sum(part.nbytes for part in (weight.table, weight.codes, weight.scales, weight.offsets) if part is not None)


def as_gptq(weight: Tensor, sym: bool, order: Tensor | None) -> dict[str, Tensor]:
    n, k = weight.shape
    group = in_order(k, 32) if order is None else in_order(k, 32)[order]
    scales, zeros = torch.zeros((n, k // 32)), torch.full((n, k // 32), 8)
    codes = torch.zeros((n, k), dtype=torch.long)
    for at in range(k // 32):
        part = weight[:, group == at].float()
        scales[:, at] = ((part.amax(1) - part.amin(1)) / 15 if not sym else part.abs().amax(1) / 7).half()
        if not sym:
            zeros[:, at] = (-part.amin(1) / scales[:, at]).round().clamp(0, 15)
        codes[:, group == at] = ((part / scales[:, at : at + 1]).round() + zeros[:, at : at + 1]).clamp(0, 15).long()
    made = gptq_tensors(codes, scales.half(), zeros, group, 1)
    return {name.removeprefix(f"{NAME}."): tensor for name, tensor in made.items()}


def quantised_folder(
    source: Path, folder: Path, raw: dict[str, Any], pack: Callable[[str, Tensor], dict[str, Tensor]]
) -> Path:
    """A copy of the checkpoint, each linear layer replaced by what `pack` makes of it; then its numbers beside it."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        packed = pack(module, tensors.pop(name))
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in packed.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": raw}))
    return folder


def dequantised_folder(path: Path, folder: Path, model: Llama) -> Path:
    """The same model with each weight as numbers of the compute type."""
    config = model.config
    checkpoint = open_checkpoint(path, config)
    tensors = {}
    for parts, inputs in linears(config):
        for name, outputs in parts.items():
            found, shape = config.quantization, (outputs.whole, inputs[0].whole)
            stored = {part: checkpoint.read(part) for part in found.tensors(name, *shape)}
            values = found.read(name, *shape, stored, slice(0, shape[0]), slice(0, shape[1]))
            if isinstance(values, QuantizedRows):
                values, order = values.dequantize(torch.bfloat16), found.order(name)
                values = values if order is None else torch.empty_like(values).index_copy_(1, order, values)
            tensors[f"{name}.weight"] = values.to(torch.bfloat16).contiguous()
    for name in checkpoint.tensors:
        if name.endswith(("norm.weight", ".bias")):
            tensors[name] = checkpoint.read(name)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    raw = GgufFile(path).config() if path.is_file() else json.loads((path / "config.json").read_text())
    raw.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def gptq_model(source: Path, folder: Path, sym: bool) -> Path:
    return quantised_folder(source, folder, {**GPTQ, "sym": sym}, lambda _, weight: as_gptq(weight, sym, None))


def check_model(path: Path, tmp_path: Path, num_packed: int, wanted: str | None = None) -> Llama:
    """Logits equal those of the dequantised model in every bit, and memory is what was predicted."""
    model = loaded(path, wanted)
    assert sum(isinstance(weight, Packed4Bit) for weight in weights(model)) == num_packed
    assert torch.equal(logits(model), logits(loaded(dequantised_folder(path, tmp_path / "plain", model))))
    predicted = weight_bytes(model.config, torch.bfloat16) - 4 * num_vector_parameters(model.config)
    allocated = sum(map(num_bytes, weights(model)))
    assert abs(predicted - allocated) <= 0.01 * allocated
    return model


@pytest.mark.parametrize("sym", [False, True])
def test_a_gptq_model(sym: bool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    check_model(gptq_model(tiny_checkpoint("llama2"), tmp_path / "model", sym), tmp_path, 12)


def test_a_gptq_model_with_activation_order(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Parts that share their inputs share an order; the products are those of columns in that order."""

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        return as_gptq(weight, False, torch.randperm(weight.shape[1], generator=generator(weight.shape[1])))

    path = quantised_folder(tiny_checkpoint("llama2"), tmp_path / "model", {**GPTQ, "desc_act": True}, pack)
    model = loaded(path)
    assert model.config.quantization.has_orders and all(weight is not None for weight in weights(model))
    want = logits(loaded(dequantised_folder(path, tmp_path / "plain", model)))
    got = logits(model)
    assert torch.allclose(got, want, atol=0.05, rtol=0.05) and not torch.equal(got, want.roll(1, 0))


def test_parts_with_orders_of_their_own_are_kept_as_numbers(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        return as_gptq(weight, False, torch.randperm(weight.shape[1], generator=generator(len(module))))

    path = quantised_folder(tiny_checkpoint("llama2"), tmp_path / "model", {**GPTQ, "desc_act": True}, pack)
    model = loaded(path)
    packed = [isinstance(layer.mlp.gate_up.weight, Packed4Bit) for layer in model.layers]
    assert packed == [False] * 3 and isinstance(model.layers[0].mlp.down.weights[0], Packed4Bit)


@pytest.mark.parametrize("wanted", ["nf4", "fp4", "int4"])
def test_a_model_that_is_quantised_while_it_is_loaded(
    wanted: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    check_model(tiny_checkpoint("llama2"), tmp_path, 12, wanted)


@pytest.mark.parametrize("name", ["llama2", "smollm2"])
def test_the_head_is_quantised_where_that_is_asked_for(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Also where it is the embedding, which stays."""
    model = loaded(tiny_checkpoint(name), "int4", quantize_head=True)
    assert model.head is not None and isinstance(model.head.weight, Packed4Bit)
    assert isinstance(model.embedding.weight, PackedWeight)
    predicted = weight_bytes(model.config, torch.bfloat16) - 4 * num_vector_parameters(model.config)
    assert abs(predicted - sum(map(num_bytes, weights(model)))) <= 0.01 * predicted
    assert not torch.isnan(logits(model)).any()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_a_gguf_model(kind: str, tmp_path: Path) -> None:
    random_gguf(tmp_path / "model.gguf", kind)
    model = check_model(tmp_path / "model.gguf", tmp_path, 4)
    bits = {weight.format.bits for weight in weights(model) if isinstance(weight, Packed4Bit)}
    assert bits == {4 if kind.startswith("Q4") else 8}


def test_a_bitsandbytes_model_as_transformers_saves_it(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantised = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    saved = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint("llama2"), quantization_config=quantised, dtype=torch.bfloat16
    )
    saved.save_pretrained(tmp_path / "model")
    check_model(tmp_path / "model", tmp_path, 12)


@pytest.mark.parametrize("method", ["nf4", "int4"])
def test_octavo_quantize_writes_what_quantization_makes(
    method: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    before, after = quantize_checkpoint(tiny_checkpoint("llama2"), tmp_path / "small", method)
    assert after < before / 2 and (tmp_path / "small").stat().st_mode & 0o777 == 0o755
    assert torch.equal(logits(loaded(tmp_path / "small")), logits(loaded(tiny_checkpoint("llama2"), method)))
    if method == "nf4":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
        weight = theirs.model.layers[1].mlp.up_proj.weight
        model = loaded(tmp_path / "small")
        rows = model.config.quantization.read(
            "model.layers.1.mlp.up_proj",
            160,
            96,
            {
                name: SafetensorsCheckpoint(tmp_path / "small").read(name)
                for name in model.config.quantization.tensors("model.layers.1.mlp.up_proj", 160, 96)
            },
            slice(0, 160),
            slice(0, 96),
        )
        assert isinstance(rows, QuantizedRows)
        assert torch.equal(rows.codes[:, ::2] << 4 | rows.codes[:, 1::2], weight.data.view(160, 48))
    with pytest.raises(StartupError, match="exists already"):
        quantize_checkpoint(tiny_checkpoint("llama2"), tmp_path / "small", method)
    with pytest.raises(StartupError, match="is quantised already"):
        quantize_checkpoint(tmp_path / "small", tmp_path / "smaller", method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("method", ["nf4", "int4"])
def test_a_calibrated_checkpoint(method: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Its logits are nearer to the original's than those without calibration, the output head included.

    By far on the text that it was calibrated on: where no module makes up for those before it 0.6 is reached there.
    """
    source = tiny_checkpoint("llama2")
    text, other = (torch.randint(0, 320, (50, 40), generator=generator(seed)) for seed in (1, 2))
    quantize_checkpoint(source, tmp_path / "plain", method, True)
    quantize_checkpoint(source, tmp_path / "fitted", method, True, text)
    assert (tmp_path / "fitted" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()
    models = [loaded(path) for path in (source, tmp_path / "plain", tmp_path / "fitted")]
    for tokens, share in ((other, 0.9), (text, 0.5)):
        want, plain, fitted = (torch.cat([logits(model, some) for some in tokens]) for model in models)
        assert (fitted - want).square().mean() < share * (plain - want).square().mean()
    assert isinstance(loaded(tmp_path / "fitted").layers[0].mlp.down.weights[0], Packed4Bit)


def test_texts_to_calibrate_on(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DATA.parent / "alice.txt"
    tokens = quantize.tokens_of_file(smollm2, text)
    assert tokens.shape[1] == 512 and tokens[0].tolist() == load_tokenizer(smollm2).encode(text.read_text())[:512]
    (tmp_path / "short.txt").write_text("once " * 100)
    with pytest.raises(StartupError, match=r"--calibrate: .*short.txt has 1\d\d tokens, expected 512 or more"):
        quantize.tokens_of_file(smollm2, tmp_path / "short.txt")
    with pytest.raises(StartupError, match=r"--calibrate: .*none.txt cannot be read"):
        quantize.tokens_of_file(smollm2, tmp_path / "none.txt")
    monkeypatch.setattr(quantize, "SEQUENCES", 3)
    monkeypatch.setattr(quantize, "SEQUENCE_LEN", 12)
    tokens = quantize.tokens_of_model(smollm2)
    assert tokens.shape == (3, 12) and tokens[:, 0].tolist() == [1] * 3 and len(set(map(tuple, tokens.tolist()))) == 3
    (tmp_path / "there").mkdir()
    with pytest.raises(StartupError, match="there exists already"):
        quantize.run(smollm2, tmp_path / "there", "nf4", False, "")


def test_what_is_quantised_is_not_quantised_again(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = gptq_model(tiny_checkpoint("llama2"), tmp_path / "model", True)
    with pytest.raises(ConfigError, match="--quantization is nf4, but .*model is quantised already: gptq"):
        loaded(path, "nf4")
    with pytest.raises(ConfigError, match="--quantize-lm-head needs --quantization"):
        loaded(tiny_checkpoint("llama2"), None, quantize_head=True)


@pytest.mark.parametrize("lost", ["qzeros", "scales", "qweight"])
def test_a_tensor_that_is_missing_is_named(lost: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = gptq_model(tiny_checkpoint("llama2"), tmp_path / "model", True)
    tensors = load_file(path / "model.safetensors")
    del tensors[f"{NAME}.{lost}"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {NAME}.{'weight' if lost == 'qweight' else lost} is missing"):
        loaded(path)


def test_memory_of_a_billion_parameters() -> None:
    """A Llama of 1.17 billion parameters in bfloat16: its linears in NF4, then its head as well."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 22,
        "vocab_size": 49152,
        "max_position_embeddings": 4096,
    }
    config = parse_config(raw)
    whole = weight_bytes(config, torch.bfloat16)
    head = packed_bytes(49152, 2048, torch.bfloat16)
    for method in ("nf4", "int4"):
        for quantize_head, share in ((False, 0.41), (True, 0.35)):
            online_config = replace(
                config,
                quantization=online.Online(method, online.GROUP_SIZES[method], NoTensors(), quantize_head, False),
            )
            small = weight_bytes(online_config, torch.bfloat16)
            assert small <= share * whole
            if not quantize_head:
                assert small - 2 * head <= 0.285 * (whole - 2 * head)


class NoTensors:
    path, tensors = Path("none"), {f"{HEAD}.weight": TensorInfo((49152, 2048), "BF16", Path("none"), "")}

    def read(self, name: str) -> Tensor:
        raise AssertionError(name)


@pytest.mark.skipif(backend.kernels() != "native", reason="threads share no memory without native kernels")
@pytest.mark.parametrize("kind", ["nf4", "int4", "gptq", "Q4_1", "Q6_K"])
def test_ranks_say_of_a_quantised_model_what_one_says(
    kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also where groups of codes are cut between ranks: those of smollm2's heads are, by any number of ranks."""
    path = tiny_checkpoint("smollm2")
    if kind == "gptq":
        path = gptq_model(tiny_checkpoint("llama2"), tmp_path / "model", False)
    elif kind.startswith("Q"):
        path = tmp_path / "model.gguf"
        random_gguf(path, kind)

    def outputs(num_ranks: int, **options: Any) -> list[tuple[int, float]]:
        config = EngineConfig(
            str(path),
            device="cpu",
            quantization=kind if kind in ("nf4", "int4") else None,
            tensor_parallel_size=num_ranks,
            max_model_len=128,
            kv_cache_memory_bytes=4 << 20,
            **options,
        )
        found: list[list[tuple[int, float]]] = [[], [], []]
        with engine_of(config) as engine:
            for index in range(3):
                prompt = [(7 * i + index) % 320 for i in range(1, 2 + 20 * index)]
                params = SamplingParams(max_tokens=24, temperature=0.0, logprobs=0)
                engine.add(GenerationRequest(str(index), prompt, params))
            while engine.has_work:
                for delta in engine.step():
                    found[int(delta.request_id)] += [(entry.token_id, entry.logprob) for entry in delta.logprobs or []]
        return sum(found, [])

    want = outputs(1, dtype="float32")
    assert len(want) == 3 * 24
    for num_ranks in (2, 3):
        got = outputs(num_ranks, dtype="float32")
        assert [token_id for token_id, _ in got] == [token_id for token_id, _ in want], num_ranks
        assert [logprob for _, logprob in got] == pytest.approx([logprob for _, logprob in want], abs=1e-4)
    if kind in ("nf4", "int4"):  # the others' heads are fewer than the parts of a sum
        exact = outputs(1, dtype="bfloat16", exactness="ranks")
        assert all(outputs(num_ranks, dtype="bfloat16", exactness="ranks") == exact for num_ranks in (2, 4))
