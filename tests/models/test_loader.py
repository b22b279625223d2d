"""A checkpoint that is not whole and right stops the start, and the error names file and tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from octavo.kernels.matmul import PackedWeight
from octavo.models.checkpoint import CheckpointError, SafetensorsCheckpoint
from octavo.models.config import read_config
from octavo.models.llama import Llama
from octavo.models.loader import load

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "model"))


def load_model(folder: Path) -> Llama:
    config = read_config(folder)
    model = Llama(config, torch.float32, 16)
    load(SafetensorsCheckpoint(folder), model, tqdm(disable=True))
    return model


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.__delitem__(NORM))
    refused(folder, NORM, "missing")


def test_extra_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.extra": torch.zeros(3)}))
    refused(folder, "model.layers.9.extra", "model.safetensors", "not part")


def test_wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.zeros(143)}))
    refused(folder, NORM, "model.safetensors", "(143,)", "(144,)")


def test_wrong_dtype(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.zeros(144, dtype=torch.int64)}))
    refused(folder, NORM, "model.safetensors", "I64")


@pytest.mark.parametrize("keep", [0.0, 0.00001, 0.5, 0.999])
def test_truncated_file(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    refused(folder, "model.safetensors")


def test_corrupt_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:40] = b"\xff" * 20
    file.write_bytes(data)
    refused(folder, "model.safetensors")


def test_no_weights_and_a_pickle_beside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "convert it to safetensors")


def split(folder: Path) -> dict[str, str]:
    """Cut the checkpoint into two files with an index; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_several_files_give_the_same_model(folder: Path) -> None:
    want = load_model(folder)
    split(folder)
    got = load_model(folder)
    pairs = ((got.embedding, want.embedding), (got.layers[2].mlp.gate_up, want.layers[2].mlp.gate_up))
    for loaded, wanted in pairs:
        assert isinstance(loaded.weight, PackedWeight) and isinstance(wanted.weight, PackedWeight)
        assert torch.equal(loaded.weight.data, wanted.weight.data)


def test_missing_file_of_several(folder: Path) -> None:
    split(folder)
    (folder / "b.safetensors").unlink()
    refused(folder, "b.safetensors", "missing")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", 7])
def test_index_cannot_name_files_elsewhere(folder: Path, name: object) -> None:
    weight_map: dict[str, object] = {**split(folder), "model.norm.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "model.safetensors.index.json")


def test_malformed_index(folder: Path) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "model.safetensors.index.json", "weight_map")


def test_code_in_a_model_folder_is_never_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder)
    assert not marker.exists()
