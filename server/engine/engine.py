"""The engine in one process: scheduler and runner over a loaded model, driven step by step. Knows no sockets.

Used by the engine process, and directly by benchmarks and tests.
"""

import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from octavo.kernels import backend
from octavo.kernels.cpu.library import library, multiplies_bf16, set_num_threads
from octavo.models.checkpoint import CheckpointError, open_checkpoint
from octavo.models.config import ConfigError, ModelConfig, read_config
from octavo.models.llama import Llama
from octavo.models.loader import load
from octavo.models.memory import (
    MemoryPlan,
    kv_block_bytes,
    num_parameters,
    plan_memory,
    state_bytes,
    weight_bytes,
    workspace_bytes,
)
from octavo.models.quantization.choose import with_quantization
from octavo.server.config import GIB, MIB, EngineConfig
from octavo.server.engine.channel import EngineInfo, EngineStats
from octavo.server.engine.pacing import ROW_TILE, Pacer
from octavo.server.engine.plan import StepPlan
from octavo.server.engine.request import Delta, GenerationRequest
from octavo.server.engine.runner import Runner
from octavo.server.engine.scheduler import Scheduler
from octavo.server.errors import StartupError

RUNTIME_BYTES = 400 * MIB  # interpreter, torch and its libraries, both processes
GPU_RUNTIME_BYTES = GIB  # on a GPU: context, kernels, CUDA graphs, what torch allocates beside the plan
DEFAULT_KV_BYTES = 512 * MIB  # on a CPU
GPU_ROW_TILE = 256  # tokens that a GPU computes in about the time that reading the weights takes: an estimate
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(wanted: str, exactness: str) -> None:
    """Choose device and kernels for the process, before it allocates anything. Raises StartupError."""
    has_gpu = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        cause = "sees no GPU" if torch.version.cuda or torch.version.hip else "is a build for CPUs alone"
        raise StartupError(f"--device is cuda, but this torch ({torch.__version__}) {cause}")
    if exactness == "fast" and not has_gpu:
        raise StartupError("--exactness is fast, which is for GPUs alone")
    try:
        library()  # a variant that is asked for and cannot run is refused, whichever kernels are used
        if has_gpu:
            backend.select(os.environ.get("OCTAVO_KERNELS") or "triton", "cuda", exact=exactness != "fast")
        else:
            backend.kernels()
    except ValueError as error:
        raise StartupError(str(error)) from None


def choose_dtype(wanted: str, of_checkpoint: str) -> torch.dtype:
    """The compute type for the kernels in use. Raises StartupError where they do not take the one that is wanted.

    auto: for Triton's kernels the checkpoint's own, bfloat16 in place of float32; on a CPU bfloat16 where it is
    multiplied natively, else float32.
    """
    is_triton = backend.kernels() == "triton"
    if wanted == "auto" and is_triton:
        wanted = of_checkpoint if of_checkpoint in ("bfloat16", "float16") else "bfloat16"
    elif wanted == "auto":
        wanted = "bfloat16" if multiplies_bf16() else "float32"
    if wanted == "float16" and not is_triton:
        raise StartupError("--dtype is float16, which is for GPUs alone; on a CPU: bfloat16 or float32")
    return DTYPES[wanted]


def plan_engine_memory(model: ModelConfig, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> MemoryPlan:
    """What is to be allocated, never fewer KV blocks than one request of full length needs.

    Raises StartupError where that does not fit what is there.
    """
    kv_bytes, utilization = config.kv_cache_memory_bytes, config.gpu_memory_utilization
    on_gpu = backend.device().type == "cuda"
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        limit = free if kv_bytes else int(utilization * total)
        if limit > free:
            raise StartupError(
                f"too little memory: --gpu-memory-utilization {utilization:g} asks for {limit / 1e9:.2f} GB of the "
                f"GPU's {total / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
            )
    else:
        kv_bytes, limit = kv_bytes or DEFAULT_KV_BYTES, available_bytes()
    state = state_bytes(model, config.max_num_seqs, max_model_len, config.block_size)
    plan = plan_memory(
        weight_bytes=weight_bytes(model, dtype),
        workspace_bytes=workspace_bytes(model, config.max_num_batched_tokens, max_model_len, dtype) + state,
        reserve_bytes=GPU_RUNTIME_BYTES if on_gpu else RUNTIME_BYTES,
        block_bytes=kv_block_bytes(model, config.block_size, dtype),
        min_blocks=-(-max_model_len // config.block_size),
        kv_bytes=kv_bytes,
        limit_bytes=limit,
    )
    if plan.total_bytes > limit:
        raise StartupError(
            f"too little memory: {plan.total_bytes / 1e9:.2f} GB needed, of which weights "
            f"{plan.weight_bytes / 1e9:.2f} and KV cache {plan.kv_bytes / 1e9:.2f}, but only {limit / 1e9:.2f} GB "
            f"available; {'raise --gpu-memory-utilization' if kv_bytes is None else 'lower --kv-cache-memory-bytes'}, "
            "or lower --max-model-len or --max-num-batched-tokens"
        )
    return plan


def available_bytes() -> int:
    """Memory that this machine, or this container, can still give."""
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        # Pages of files count as used, but are given up when memory is wanted.
        files = [
            int(line.split()[1]) for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith("inactive_file")
        ]
        found.append(int(limit[0]) - int(used[0]) + sum(files))
    return min(found, default=1 << 62)


def _device_name() -> str:
    return torch.cuda.get_device_name() if backend.device().type == "cuda" else "cpu"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


class Engine:
    """A model ready to generate. Raises StartupError where model, memory or configuration do not allow it."""

    def __init__(self, config: EngineConfig) -> None:
        begin = time.monotonic()
        choose_device(config.device, config.exactness)
        self.num_threads = len(os.sched_getaffinity(0))
        set_num_threads(self.num_threads)
        torch.set_grad_enabled(False)
        folder = Path(config.model)
        try:
            model_config = read_config(folder)
            checkpoint = open_checkpoint(folder, model_config)
            model_config = with_quantization(model_config, checkpoint, config.quantization, config.quantize_lm_head)
        except (ConfigError, CheckpointError) as error:
            raise StartupError(str(error)) from None
        max_model_len = config.max_model_len or model_config.max_position
        if max_model_len > model_config.max_position:
            raise StartupError(
                f"--max-model-len is {max_model_len}, but the model's positions end at {model_config.max_position}"
            )
        dtype = choose_dtype(config.dtype, model_config.dtype)
        plan = plan_engine_memory(model_config, config, max_model_len, dtype)
        model = Llama(model_config, dtype, max_model_len)
        try:
            # disable=None: no bar where standard error is not a terminal.
            with tqdm(desc="loading", unit=" values", unit_scale=True, disable=None, leave=False) as bar:
                load(checkpoint, model, bar)
        except CheckpointError as error:
            raise StartupError(str(error)) from None
        self.runner = Runner(
            model,
            num_blocks=plan.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            use_graphs=backend.kernels() == "triton" and not config.enforce_eager,
        )
        self.runner.warm_up(config.max_num_batched_tokens)
        self.scheduler = Scheduler(
            num_blocks=plan.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        row_tile = GPU_ROW_TILE if backend.device().type == "cuda" else ROW_TILE
        self._pacer = Pacer(config.max_num_batched_tokens, row_tile)
        self._step_s = 0.0
        self.info = EngineInfo(
            model_name=folder.name,
            architecture=model_config.architecture,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            vocab_size=model_config.vocab_size,
            num_parameters=num_parameters(model_config),
            weight_bytes=plan.weight_bytes,
            workspace_bytes=plan.workspace_bytes,
            reserve_bytes=plan.reserve_bytes,
            num_blocks=plan.num_blocks,
            block_size=config.block_size,
            kv_cache_bytes=plan.kv_bytes,
            device=_device_name(),
            kernels=backend.description(),
            num_threads=self.num_threads,
            load_s=time.monotonic() - begin,
        )

    @property
    def has_work(self) -> bool:
        """Whether any choice runs or waits."""
        return self.scheduler.has_work

    def add(self, request: GenerationRequest, committed: dict[int, list[int]] | None = None) -> None:
        """Queue a valid request, or go on with one from its committed tokens, as `Scheduler.add` has it."""
        self.scheduler.add(request, committed)

    def abort(self, request_id: str, choice_index: int | None = None) -> list[Delta]:
        """End one choice, or all of a request; unknown ids are ignored."""
        return self.scheduler.abort(request_id, choice_index)

    def step(self) -> list[Delta]:
        """Plan, execute and apply one step, its prefill paced by the steps before; no deltas where nothing can run."""
        begin = time.monotonic()
        max_prefill_tokens = self._pacer.max_prefill_tokens(*self.scheduler.num_decodes_and_prefills())
        plan: StepPlan | None = self.scheduler.plan_step(begin, max_prefill_tokens)
        if plan is None:
            return []
        deltas = self.scheduler.apply(self.runner.execute(plan), plan)
        self._step_s = time.monotonic() - begin
        num_decodes = plan.nums.count(1)
        self._pacer.observe(num_decodes, sum(plan.nums) - num_decodes, self._step_s)
        return deltas

    def stats(self) -> EngineStats:
        """Counters since the start, and the last step's figures."""
        return EngineStats(**self.scheduler.stats(), step_s=self._step_s)
