"""`octavo quantize`: a checkpoint of 16 or 32 bit into one of 4 bit that transformers loads, tensor by tensor.

nf4 is written as bitsandbytes does, int4 as compressed-tensors' pack-quantized; both are what `octavo serve` makes of
the same weights with --quantization. The new folder appears whole or not at all.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.checkpoint import Checkpoint, CheckpointError, SafetensorsCheckpoint
from octavo.models.config import ConfigError, read_config
from octavo.models.memory import linears
from octavo.models.quantization import bitsandbytes, compressed_tensors
from octavo.models.quantization.base import EMBEDDING, HEAD
from octavo.models.quantization.online import common_group_size, form, quantize
from octavo.server.config import GIB
from octavo.server.errors import StartupError

MIN_NF4_BLOCK = 32
FILE_BYTES = 2 * GIB  # of tensors in a file, and the most held in memory
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")  # beside the weights


def quantize_checkpoint(source: Path, target: Path, method: str, quantize_head: bool = False) -> tuple[int, int]:
    """Write `source`, quantised, to `target`, which must not exist. Returns the weights' bytes before and after.

    method: nf4 or int4. Raises StartupError.
    """
    if target.exists():
        raise StartupError(f"{target} exists already")
    if not source.is_dir():
        raise StartupError(f"{source} is no folder of a checkpoint")
    try:
        config = read_config(source)
        if config.quantization_config is not None:
            raise StartupError(f"{source} is quantised already: {config.quantization_config.get('quant_method')}")
        if quantize_head and config.tie_word_embeddings:
            raise StartupError(f"{source}: the output head is the embedding, which stays as it is")
        checkpoint = SafetensorsCheckpoint(source)
        kept = {EMBEDDING} if quantize_head else {EMBEDDING, HEAD}
        modules = {
            name: (n.whole, inputs[0].whole)
            for parts, inputs in linears(config)
            for name, n in parts.items()
            if name not in kept
        }
        size = common_group_size(method, *(k for _, k in modules.values()))
        if method == "nf4" and size < MIN_NF4_BLOCK:
            raise StartupError(
                f"{source}: its inputs divide into groups of {size}, bitsandbytes has {MIN_NF4_BLOCK} or more"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            built = Path(temporary, "model")
            built.mkdir()
            before, after = _write_tensors(checkpoint, built, modules, method, size)
            _write_rest(source, built, method, size, quantize_head)
            built.rename(target)
    except (ConfigError, CheckpointError) as error:
        raise StartupError(str(error)) from None
    except OSError as error:
        raise StartupError(f"cannot write {target}: {error}") from error
    return before, after


def _write_tensors(
    checkpoint: Checkpoint, built: Path, modules: Mapping[str, tuple[int, int]], method: str, size: int
) -> tuple[int, int]:
    pending: dict[str, Tensor] = {}
    files: list[dict[str, Tensor | None]] = []  # tensors' names, by file
    before = after = pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        file = built / f"model-{len(files) + 1:05d}.safetensors"
        save_file(pending, file, metadata={"format": "pt"})
        file.chmod(0o644)
        files.append(dict.fromkeys(pending))
        pending, pending_bytes = {}, 0

    for name in tqdm(checkpoint.tensors, desc="quantising", unit=" tensors", disable=None, leave=False):
        tensor = checkpoint.read(name)
        module = name.removesuffix(".weight")
        if module in modules and name.endswith(".weight"):
            if tuple(tensor.shape) != modules[module]:
                raise CheckpointError(
                    f"{checkpoint.tensors[name]} has shape {tuple(tensor.shape)}, expected {modules[module]}"
                )
            stored = _STORED[method](tensor, form(method, size, checkpoint.tensors[name].dtype))
            made = {f"{module}.{part}": value for part, value in stored.items()}
        else:
            made = {name: tensor.contiguous()}
        num_bytes = sum(value.nbytes for value in made.values())
        if pending and pending_bytes + num_bytes > FILE_BYTES:
            flush()
        pending |= made
        before, after, pending_bytes = before + tensor.nbytes, after + num_bytes, pending_bytes + num_bytes
    flush()
    if len(files) == 1:
        (built / "model-00001.safetensors").rename(built / "model.safetensors")
    else:
        weight_map = {name: f"model-{at + 1:05d}.safetensors" for at, names in enumerate(files) for name in names}
        index = {"metadata": {"total_size": after}, "weight_map": weight_map}
        (built / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return before, after


def _write_rest(source: Path, built: Path, method: str, size: int, quantize_head: bool) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copyfile(file, built / file.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _CONFIGS[method](size, [] if quantize_head else [HEAD])
    (built / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _as_nf4(weight: Tensor, form: CodeFormat) -> dict[str, Tensor]:
    """The tensors that bitsandbytes and transformers keep of one weight [n, k]."""
    rows = quantize(weight, form)
    state = {
        "quant_type": "nf4",
        "blocksize": form.group_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    return {
        "weight": (rows.codes[:, ::2] << 4 | rows.codes[:, 1::2]).view(-1, 1),
        "weight.absmax": rows.scales.flatten(),
        "weight.quant_map": torch.tensor(bitsandbytes.NF4),
        f"{bitsandbytes.STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _as_int4(weight: Tensor, form: CodeFormat) -> dict[str, Tensor]:
    """The tensors that compressed-tensors keeps of one weight [n, k]."""
    rows = quantize(weight, form)
    return {
        "weight_packed": _pack(rows.codes),
        "weight_scale": rows.scales.contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _pack(codes: Tensor) -> Tensor:
    """[rows, 8 words] codes -> [rows, words] int32, the first in the lowest bits."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)


def _nf4_config(size: int, skipped: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def _int4_config(size: int, skipped: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": compressed_tensors.FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": skipped,
    }


_STORED = {"nf4": _as_nf4, "int4": _as_int4}
_CONFIGS = {"nf4": _nf4_config, "int4": _int4_config}


def run(source: Path, target: Path, method: str, quantize_head: bool) -> int:
    """The command. Raises StartupError."""
    before, after = quantize_checkpoint(source, target, method, quantize_head)
    print(f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.3f})", file=sys.stderr)
    print(target)
    return 0
