"""Checkpoints: which tensors there are, of which shape and type, and their values one at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.models.gguf import IGNORED_TENSORS, GgufError, GgufFile, checkpoint_name

if TYPE_CHECKING:
    from octavo.models.config import ModelConfig

FLOATS = ("F32", "BF16", "F16")
# Tensors that some checkpoints carry and no model needs: computed from the configuration.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class CheckpointError(ValueError):
    """A checkpoint that must not be served. The text is one line that names file and tensor."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of a tensor: shape, type as the file names it, the file, and the tensor's name in it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    name: str

    def __str__(self) -> str:
        """How errors begin."""
        return f"{self.file}: tensor {self.name}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor must be: its shape (None: any size) and one of these types."""

    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...] = FLOATS

    def check(self, found: TensorInfo) -> None:
        """Raises CheckpointError."""
        if len(found.shape) != len(self.shape) or any(
            want not in (None, got) for want, got in zip(self.shape, found.shape, strict=True)
        ):
            wanted = "({}{})".format(
                ", ".join("any" if size is None else str(size) for size in self.shape), "," * (len(self.shape) == 1)
            )
            raise CheckpointError(f"{found} has shape {found.shape}, expected {wanted}")
        if found.dtype not in self.dtypes:
            raise CheckpointError(f"{found} has dtype {found.dtype}, expected {', '.join(self.dtypes)}")


class Checkpoint(Protocol):
    """Tensors by the names that Hugging Face checkpoints give them."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Everything in it."""

    def read(self, name: str) -> Tensor:
        """The values of one tensor: of its shape and type, or, where its type holds blocks, [rows, bytes of a row]
        uint8. Raises CheckpointError where they cannot be read."""


def open_checkpoint(path: Path, config: "ModelConfig") -> Checkpoint:
    """The checkpoint in a folder of safetensors, or in a GGUF file. Raises CheckpointError."""
    return SafetensorsCheckpoint(path) if path.is_dir() else GgufCheckpoint(path, config)


class SafetensorsCheckpoint:
    """A folder of safetensors files. Raises CheckpointError where one is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        for file in _find_files(path):
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():
                        if name.endswith(IGNORED_SUFFIXES):
                            continue
                        if name in self.tensors:
                            raise CheckpointError(f"{file}: tensor {name} is also in {self.tensors[name].file.name}")
                        view = handle.get_slice(name)
                        self.tensors[name] = TensorInfo(tuple(view.get_shape()), view.get_dtype(), file, name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from None

    def read(self, name: str) -> Tensor:
        """The values of one tensor."""
        info = self.tensors[name]
        try:
            # Opened anew for each tensor, so that its pages are unmapped as soon as it is placed.
            with safe_open(info.file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{info} cannot be read: {error}") from None


def _find_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed_files(folder, index)
    if single.exists():
        return [single]
    unsafe = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    hint = f"; {unsafe[0]} is not loaded, since pickles can run code: convert it to safetensors" if unsafe else ""
    raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: expected an object with a weight_map of file names") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: missing, but named in {index.name}")
    return [folder / name for name in names]


class GgufCheckpoint:
    """A GGUF file, its tensors named and their rows ordered as Hugging Face has them. Raises CheckpointError."""

    def __init__(self, path: Path, config: "ModelConfig") -> None:
        self.path = path
        try:
            self._file = GgufFile(path)
        except GgufError as error:
            raise CheckpointError(str(error)) from None
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in self._file.tensors.items():
            if name not in IGNORED_TENSORS:
                self.tensors[checkpoint_name(name) or name] = TensorInfo(tensor.shape, tensor.type, path, name)
        # llama.cpp rotates neighbours where Hugging Face rotates halves, so for this architecture its files have the
        # rows of queries and keys in another order.
        self._rotated_heads = {}
        if self._file.metadata["general.architecture"] == "llama":
            self._rotated_heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def read(self, name: str) -> Tensor:
        """The values of one tensor."""
        info = self.tensors[name]
        tensor = self._file.tensors[info.name]
        stored = bytearray(self._file.data[tensor.begin : tensor.begin + tensor.num_bytes])
        values = torch.frombuffer(stored, dtype=_GGUF_DTYPES.get(tensor.type, torch.uint8))
        values = values.view(tensor.shape if tensor.type in _GGUF_DTYPES else (*tensor.shape[:-1], -1))
        num_heads = self._rotated_heads.get(info.name.split(".")[-2])
        if num_heads is not None:
            values = values.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return values


_GGUF_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
