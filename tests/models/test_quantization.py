"""Quantised checkpoints: each format against its own library's or a float64 account of its packing; what is refused."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from octavo.kernels.matmul import PackedWeight
from octavo.kernels.matmul_4bit import Packed4Bit
from octavo.models.checkpoint import CheckpointError, SafetensorsCheckpoint, open_checkpoint
from octavo.models.config import ConfigError, ModelConfig, read_config
from octavo.models.llama import Llama
from octavo.models.loader import load
from octavo.models.quantization import online
from octavo.models.quantization.base import Quantization, QuantizedRows, form_of
from octavo.models.quantization.choose import with_quantization

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
    rows = found.read(NAME, n, k, {name: checkpoint.read(name) for name in specs})
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
    rows = online.quantize(weight, online.form(kind, 256, "BF16"))
    assert torch.equal(rows.scales.flatten(), state.absmax)
    assert torch.equal(rows.dequantize(dtype), bnb.dequantize_4bit(packed, state))


# Formats of whole numbers: a float64 account of the published packing


def int4_weight(n: int, groups: int, k: int, scale_dtype: torch.dtype, least_zero: int = 0) -> tuple[Tensor, ...]:
    """Random codes [n, k], scales and zero points [n, groups]."""
    g = generator(n + groups)
    codes = torch.randint(0, 16, (n, k), generator=g)
    zeros = torch.randint(least_zero, 16, (n, groups), generator=g)
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
    assert torch.equal(
        rows.dequantize(torch.bfloat16), exact(codes, scales, zeros, in_order(128, 32), torch.bfloat16)
    )
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
    rows = online.quantize(torch.randn((32, 256), generator=generator()), online.form("int4", 256, "BF16"))
    part = rows.part(slice(8, 24), slice(64, 192))
    assert torch.equal(part.dequantize(torch.float32), rows.dequantize(torch.float32)[8:24, 64:192])
