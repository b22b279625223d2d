"""`octavo quantize`: a checkpoint of 16 or 32 bit into one of 4 bit that transformers loads, tensor by tensor.

nf4 is written as bitsandbytes does, int4 as compressed-tensors' pack-quantized. Without calibration both are what
`octavo serve` makes of the same weights with --quantization; with it codes and scales are chosen for the inputs that
the layers get on some text: a file, or what the model itself writes. The new folder appears whole or not at all.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.calibrate import calibrated_rows
from octavo.models.checkpoint import Checkpoint, CheckpointError, SafetensorsCheckpoint, TensorSpec
from octavo.models.config import ConfigError, ModelConfig, read_config
from octavo.models.memory import linears
from octavo.models.quantization import bitsandbytes, compressed_tensors
from octavo.models.quantization.base import EMBEDDING, HEAD, SCALE_DTYPES, QuantizedRows
from octavo.models.quantization.online import common_group_size, form, quantize
from octavo.server.config import GIB, EngineConfig
from octavo.server.engine.engine import Engine, choose_dtype
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.errors import StartupError
from octavo.server.local_model import load_tokenizer

MIN_NF4_BLOCK = 32
SEQUENCES, SEQUENCE_LEN = 64, 512  # tokens that a model is calibrated on; a file may have less
FILE_BYTES = 2 * GIB  # of tensors in a file, and the most held in memory
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")  # beside the weights


def quantize_checkpoint(
    source: Path, target: Path, method: str, quantize_head: bool = False, calibration: Tensor | None = None
) -> tuple[int, int]:
    """Write `source`, quantised, to `target`, which must not exist. Returns the weights' bytes before and after.

    method: nf4 or int4; calibration: [sequences, tokens of each] that the layers' inputs are taken from. Raises
    StartupError.
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
        for name, shape in modules.items():
            if f"{name}.weight" not in checkpoint.tensors:
                raise CheckpointError(f"{source}: tensor {name}.weight is missing")
            TensorSpec(shape).check(checkpoint.tensors[f"{name}.weight"])
        rows = _quantised_rows(checkpoint, config, modules, method, size, quantize_head, calibration)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            built = Path(temporary, "model")
            built.mkdir()
            before, after = _write_tensors(checkpoint, built, modules, rows, method)
            _write_rest(source, built, method, size, quantize_head)
            built.rename(target)
    except (ConfigError, CheckpointError) as error:
        raise StartupError(str(error)) from None
    except OSError as error:
        raise StartupError(f"cannot write {target}: {error}") from error
    return before, after


def _quantised_rows(
    checkpoint: Checkpoint,
    config: ModelConfig,
    modules: Iterable[str],
    method: str,
    size: int,
    quantize_head: bool,
    calibration: Tensor | None,
) -> Iterator[tuple[str, QuantizedRows]]:
    """Of all modules, in any order."""

    def form_of(name: str) -> CodeFormat:
        return form(method, size, checkpoint.tensors[f"{name}.weight"].dtype)

    if calibration is None:
        return ((name, quantize(checkpoint.read(f"{name}.weight"), form_of(name))) for name in modules)
    return calibrated_rows(checkpoint, config, choose_dtype("auto", config.dtype), calibration, form_of, quantize_head)


def _write_tensors(
    checkpoint: Checkpoint,
    built: Path,
    modules: Collection[str],
    rows: Iterator[tuple[str, QuantizedRows]],
    method: str,
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

    def quantised() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for module, found in rows:
            info = checkpoint.tensors[f"{module}.weight"]
            stored = _STORED[method](found, SCALE_DTYPES[info.dtype])
            yield (
                prod(info.shape) * SCALE_DTYPES[info.dtype].itemsize,
                {f"{module}.{part}": value for part, value in stored.items()},
            )

    def kept() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for name in checkpoint.tensors:
            if name.removesuffix(".weight") not in modules or not name.endswith(".weight"):
                tensor = checkpoint.read(name).contiguous()
                yield tensor.nbytes, {name: tensor}

    num_tensors = len(checkpoint.tensors)
    made = chain(kept(), quantised())
    for num_before, some in tqdm(made, "quantising", num_tensors, unit=" tensors", disable=None, leave=False):
        num_bytes = sum(value.nbytes for value in some.values())
        if pending and pending_bytes + num_bytes > FILE_BYTES:
            flush()
        pending |= some
        before, after, pending_bytes = before + num_before, after + num_bytes, pending_bytes + num_bytes
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


def _as_nf4(rows: QuantizedRows, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that bitsandbytes and transformers keep of one weight of this type."""
    state = {
        "quant_type": "nf4",
        "blocksize": rows.format.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(rows.codes.shape),
    }
    return {
        "weight": (rows.codes[:, ::2] << 4 | rows.codes[:, 1::2]).view(-1, 1),
        "weight.absmax": rows.scales.flatten(),
        "weight.quant_map": torch.tensor(bitsandbytes.NF4),
        f"{bitsandbytes.STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _as_int4(rows: QuantizedRows, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that compressed-tensors keeps of one weight."""
    return {
        "weight_packed": _pack(rows.codes),
        "weight_scale": rows.scales.contiguous(),
        "weight_shape": torch.tensor(rows.codes.shape),
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


def tokens_of_file(model: Path, file: Path) -> Tensor:
    """[sequences, SEQUENCE_LEN] of a text, from its beginning. Raises StartupError for a file that has not as many."""
    try:
        token_ids = load_tokenizer(model).encode(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--calibrate: {file} cannot be read: {error}") from None
    count = min(len(token_ids) // SEQUENCE_LEN, SEQUENCES)
    if not count:
        raise StartupError(f"--calibrate: {file} has {len(token_ids)} tokens, expected {SEQUENCE_LEN} or more")
    return torch.tensor(token_ids[: count * SEQUENCE_LEN]).view(count, SEQUENCE_LEN)


def tokens_of_model(model: Path) -> Tensor:
    """[sequences, SEQUENCE_LEN] that the model writes from its first token on, the same every time.

    What a model writes is like what it was trained on (Williams et al., arXiv 2410.17170). Raises StartupError.
    """
    tokenizer = load_tokenizer(model)
    first = next((i for i in (tokenizer.bos_token_id, *tokenizer.eos_token_ids) if i is not None), None)
    if first is None:
        raise StartupError(f"{model} names no token that texts begin with: give --calibrate a file")
    engine = Engine(EngineConfig(model=str(model), device="cpu", max_model_len=SEQUENCE_LEN))
    written = [[first] for _ in range(SEQUENCES)]
    for seed in range(SEQUENCES):
        params = SamplingParams(max_tokens=SEQUENCE_LEN - 1, seed=seed)
        engine.add(GenerationRequest(str(seed), [first], params))
    with tqdm(desc="writing", total=SEQUENCES * (SEQUENCE_LEN - 1), unit=" tokens", disable=None, leave=False) as bar:
        while engine.has_work:
            for delta in engine.step():
                written[int(delta.request_id)] += delta.token_ids
                bar.update(len(delta.token_ids))
    return torch.tensor(written)


def run(source: Path, target: Path, method: str, quantize_head: bool, calibrate: str | None) -> int:
    """The command. calibrate: a file, empty for what the model writes, or None. Raises StartupError."""
    tokens = None
    if calibrate is not None:
        if target.exists():  # before all that work
            raise StartupError(f"{target} exists already")
        tokens = tokens_of_file(source, Path(calibrate)) if calibrate else tokens_of_model(source)
    before, after = quantize_checkpoint(source, target, method, quantize_head, tokens)
    print(f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.3f})", file=sys.stderr)
    print(target)
    return 0
