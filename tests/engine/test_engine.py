"""What the engine decides before it loads anything: device, compute type, memory. GPUs are made up."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.kernels import backend
from octavo.models.config import ModelConfig, read_config
from octavo.models.memory import kv_block_bytes, state_bytes, weight_bytes, workspace_bytes
from octavo.models.shard import shard_model
from octavo.server.config import EngineConfig
from octavo.server.engine import engine
from octavo.server.engine.devices import Rung
from octavo.server.engine.engine import choose_device, choose_dtype, ladder, plan_engine_memory
from octavo.server.errors import DeviceError, StartupError

BF16 = torch.bfloat16


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path]) -> ModelConfig:
    return read_config(tiny_checkpoint("llama2"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU in words: free and total bytes, to be set."""
    memory = [80 * 10**9, 80 * 10**9]
    monkeypatch.setattr(backend, "_device", torch.device("cuda"))
    monkeypatch.setattr(backend, "_kernels", "triton")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: tuple(memory))
    monkeypatch.setattr("octavo.kernels.gpu.paged_attention.num_processors", lambda _: 132)
    return memory


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[tuple[str, str, bool]] = []
    monkeypatch.setattr(backend, "select", lambda name, device, exact: selected.append((name, device, exact)))
    monkeypatch.setattr(backend, "_kernels", "torch")
    monkeypatch.delenv("OCTAVO_KERNELS", raising=False)
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        choose_device(EngineConfig(device="auto", exactness="batch"))
        choose_device(EngineConfig(device="cpu", exactness="batch"))
    assert selected == [("triton", "cuda", True)]
    choose_device(EngineConfig(device="cuda", exactness="fast"))
    assert selected[1:] == [("triton", "cuda", False)]
    with pytest.raises(StartupError, match="--exactness is fast, which is for GPUs alone"):
        choose_device(EngineConfig(device="cpu", exactness="fast"))


@pytest.mark.parametrize(
    ("cuda", "hip", "cause"),
    [("13.0", None, "sees no GPU"), (None, "7.1", "sees no GPU"), (None, None, "is a build for CPUs alone")],
)
def test_a_gpu_that_is_not_there(
    cuda: str | None, hip: str | None, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(StartupError, match=rf"--device is cuda, but this torch \(.*\) {cause}"):
        choose_device(EngineConfig(device="cuda", exactness="batch"))


@pytest.mark.parametrize("lacks", ["gpu_without_gpu", "numpy"])
def test_what_executes_gpu_kernels_cannot_be_imported(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not on the path the error says so; where something else is wrong, it says what."""

    def import_module(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {lacks!r}", name=lacks)

    monkeypatch.setattr(backend, "_kernels", None)
    monkeypatch.setattr("importlib.import_module", import_module)
    monkeypatch.setenv("OCTAVO_KERNELS", "triton")
    if lacks == "gpu_without_gpu":
        with pytest.raises(StartupError, match="put the folder tests/ of the repository on PYTHONPATH"):
            choose_device(EngineConfig(device="cpu", exactness="batch"))
    else:
        with pytest.raises(ModuleNotFoundError, match="numpy"):
            choose_device(EngineConfig(device="cpu", exactness="batch"))


def test_ranks_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(backend, "select", lambda *_, **__: None)
    choose_device(EngineConfig(device="auto"), 1)
    assert chosen == [1]
    with pytest.raises(DeviceError, match="GPU 2 is not there: torch sees 2"):
        choose_device(EngineConfig(device="auto"), 2)

    def refuse(device: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nfor debugging")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(DeviceError, match="GPU 1 cannot be used: CUDA error: unspecified launch failure$"):
        choose_device(EngineConfig(device="auto"), 1)


def test_kernels_for_a_cpu_are_not_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("OCTAVO_KERNELS", "torch")
    with pytest.raises(StartupError, match="OCTAVO_KERNELS is 'torch', but on cuda the kernels are Triton's"):
        choose_device(EngineConfig(device="auto", exactness="batch"))


@pytest.mark.parametrize(
    ("kernels", "wanted", "of_checkpoint", "dtype"),
    [
        ("triton", "auto", "bfloat16", torch.bfloat16),
        ("triton", "auto", "float16", torch.float16),
        ("triton", "auto", "float32", torch.bfloat16),
        ("triton", "float32", "bfloat16", torch.float32),
        ("triton", "float16", "bfloat16", torch.float16),
        ("torch", "float32", "bfloat16", torch.float32),
        ("torch", "bfloat16", "float16", torch.bfloat16),
    ],
)
def test_dtypes(
    kernels: str, wanted: str, of_checkpoint: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_kernels", kernels)
    assert choose_dtype(wanted, of_checkpoint) == dtype


@pytest.mark.parametrize("multiplies", [True, False])
def test_auto_on_a_cpu_asks_the_cpu(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_kernels", "torch")
    monkeypatch.setattr(engine, "multiplies_bf16", lambda: multiplies)
    assert choose_dtype("auto", "float16") == (torch.bfloat16 if multiplies else torch.float32)


def test_float16_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_kernels", "torch")
    with pytest.raises(StartupError, match="--dtype is float16, which is for GPUs alone"):
        choose_dtype("float16", "float16")


def test_kv_cache_fills_the_share_of_a_gpu(model: ModelConfig, gpu: list[int]) -> None:
    config = EngineConfig(gpu_memory_utilization=0.5)
    plan = plan_engine_memory(model, config, 512, BF16)
    assert plan.weight_bytes == weight_bytes(model, BF16)
    assert plan.workspace_bytes == workspace_bytes(model, 512, 512, BF16) + state_bytes(model, 64, 512, 16)
    assert 0 <= 40 * 10**9 - plan.total_bytes < plan.block_bytes == kv_block_bytes(model, 16, BF16)
    asked = plan_engine_memory(model, EngineConfig(gpu_memory_utilization=0.5, kv_cache_memory_bytes=10**9), 512, BF16)
    assert 0 <= 10**9 - asked.kv_bytes < asked.block_bytes


def test_a_gpu_that_others_use(model: ModelConfig, gpu: list[int]) -> None:
    gpu[0] = 30 * 10**9
    with pytest.raises(StartupError) as error:
        plan_engine_memory(model, EngineConfig(), 512, BF16)
    assert str(error.value) == (
        "too little memory: --gpu-memory-utilization 0.9 asks for 72.00 GB of the GPU's 80.00 GB, but only 30.00 GB "
        "are free"
    )
    plan_engine_memory(model, EngineConfig(kv_cache_memory_bytes=20 * 10**9), 512, BF16)
    with pytest.raises(StartupError, match="KV cache 29.00, but only 30.00 GB available; lower --kv-cache-memory"):
        plan_engine_memory(model, EngineConfig(kv_cache_memory_bytes=29 * 10**9), 512, BF16)


def test_a_gpu_too_small_for_one_request(model: ModelConfig, gpu: list[int]) -> None:
    gpu[:] = [2 * 10**9, 2 * 10**9]
    with pytest.raises(
        StartupError,
        match=r"too little memory: .* but only 1.80 GB available; raise --gpu-memory-utilization, or lower ",
    ):
        plan_engine_memory(model, EngineConfig(), 10**6, BF16)
    gpu[:] = [3 * 10**9, 4 * 10**9]
    plan_engine_memory(model, EngineConfig(gpu_memory_utilization=0.75), 4096, BF16)


def test_a_cpu_gets_half_a_gibibyte_of_kv_cache(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "available_bytes", lambda: 10**9)
    plan = plan_engine_memory(model, EngineConfig(), 512, BF16)
    assert 0 <= (512 << 20) - plan.kv_bytes < plan.block_bytes
    monkeypatch.setattr(engine, "available_bytes", lambda: plan.total_bytes - 1)
    with pytest.raises(StartupError, match="lower --kv-cache-memory-bytes, or lower --max-model-len or --max-n"):
        plan_engine_memory(model, EngineConfig(), 512, BF16)


def test_the_ladder_is_what_the_memory_allows(tiny_checkpoint: Callable[[str], Path], gpu: list[int]) -> None:
    model = read_config(tiny_checkpoint("smollm2"))
    most = 1 << 18

    def needed(num_ranks: int, length: int) -> int:
        gpu[:] = [80 * 10**9, 80 * 10**9]
        shards = [shard_model(model, rank, num_ranks, False) for rank in range(num_ranks)]
        config = EngineConfig(kv_cache_memory_bytes=1)  # as little as there can be
        return max(plan_engine_memory(model, config, length, BF16, shard).total_bytes for shard in shards)

    def rungs(total: int, exactness: str = "batch") -> list[Rung]:
        gpu[:] = [total, total]
        return ladder(model, EngineConfig(gpu_memory_utilization=1.0, exactness=exactness), most, BF16, 4)

    assert rungs(80 * 10**9) == [Rung(4, most), Rung(3, most), Rung(2, most), Rung(1, most)]
    assert rungs(80 * 10**9, "ranks") == [Rung(4, most), Rung(2, most), Rung(1, most)]
    assert rungs(needed(2, most)) == [Rung(4, most), Rung(3, most), Rung(2, most), Rung(1, most // 2)]
    assert rungs(needed(2, most) - 1)[-2:] == [Rung(2, most // 2), Rung(1, most // 2)]
    assert rungs(needed(1, most // 8) - 1)[-1].num_ranks == 2
