"""The engine in one process: scheduler and runner over a loaded model, driven step by step. Knows no sockets.

Used by the engine process, and directly by benchmarks and tests.
"""

import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from octavo.kernels import backend
from octavo.kernels.cpu.library import multiplies_bf16, set_num_threads
from octavo.models.config import ConfigError, ModelConfig, read_config
from octavo.models.llama import Llama
from octavo.models.loader import CheckpointError, load
from octavo.models.memory import kv_block_bytes, num_parameters, state_bytes, weight_bytes, workspace_bytes
from octavo.server.config import MIB, EngineConfig
from octavo.server.engine.channel import EngineInfo, EngineStats
from octavo.server.engine.pacing import Pacer
from octavo.server.engine.plan import StepPlan
from octavo.server.engine.request import Delta, GenerationRequest
from octavo.server.engine.runner import Runner
from octavo.server.engine.scheduler import Scheduler
from octavo.server.errors import StartupError

RUNTIME_BYTES = 400 * MIB  # interpreter, torch and its libraries, both processes
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def choose_dtype(wanted: str) -> torch.dtype:
    """The compute type; auto is bfloat16 where the CPU multiplies it natively, else float32."""
    if wanted == "auto":
        wanted = "bfloat16" if multiplies_bf16() else "float32"
    return DTYPES[wanted]


def plan_blocks(model: ModelConfig, config: EngineConfig, max_model_len: int, dtype: torch.dtype) -> int:
    """KV blocks for the memory asked for, and never fewer than one request of full length needs."""
    block_bytes = kv_block_bytes(model, config.block_size, dtype)
    return max(config.kv_cache_memory_bytes // block_bytes, -(-max_model_len // config.block_size))


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


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


class Engine:
    """A model ready to generate. Raises StartupError where model, memory or configuration do not allow it."""

    def __init__(self, config: EngineConfig) -> None:
        begin = time.monotonic()
        try:
            kernels = backend.description()
        except ValueError as error:
            raise StartupError(str(error)) from None
        self.num_threads = len(os.sched_getaffinity(0))
        set_num_threads(self.num_threads)
        torch.set_grad_enabled(False)
        folder = Path(config.model)
        try:
            model_config = read_config(folder)
        except ConfigError as error:
            raise StartupError(str(error)) from None
        max_model_len = config.max_model_len or model_config.max_position
        if max_model_len > model_config.max_position:
            raise StartupError(
                f"--max-model-len is {max_model_len}, but the model's positions end at {model_config.max_position}"
            )
        dtype = choose_dtype(config.dtype)
        num_blocks = plan_blocks(model_config, config, max_model_len, dtype)
        kv_bytes = num_blocks * kv_block_bytes(model_config, config.block_size, dtype)
        needed = weight_bytes(model_config, dtype) + kv_bytes + RUNTIME_BYTES
        needed += workspace_bytes(model_config, config.max_num_batched_tokens, dtype)
        needed += state_bytes(model_config, config.max_num_seqs, max_model_len, config.block_size)
        if needed > available_bytes():
            raise StartupError(
                f"too little memory: {needed / 1e9:.2f} GB needed, of which weights "
                f"{weight_bytes(model_config, dtype) / 1e9:.2f} and KV cache {kv_bytes / 1e9:.2f}, but only "
                f"{available_bytes() / 1e9:.2f} GB available; lower --kv-cache-memory-bytes, --max-model-len or "
                "--max-num-batched-tokens"
            )
        model = Llama(model_config, dtype, max_model_len)
        try:
            # disable=None: no bar where standard error is not a terminal.
            with tqdm(desc="loading", unit="B", unit_scale=True, disable=None, leave=False) as bar:
                load(folder, model.parameters(), model_config.tie_word_embeddings, bar)
        except CheckpointError as error:
            raise StartupError(str(error)) from None
        self.runner = Runner(
            model,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        self.runner.warm_up(config.max_num_batched_tokens)
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._pacer = Pacer(config.max_num_batched_tokens)
        self._step_s = 0.0
        self.info = EngineInfo(
            model_name=folder.name,
            architecture=model_config.architecture,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            vocab_size=model_config.vocab_size,
            num_parameters=num_parameters(model_config),
            weight_bytes=weight_bytes(model_config, dtype),
            num_blocks=num_blocks,
            block_size=config.block_size,
            kv_cache_bytes=kv_bytes,
            kernels=kernels,
            num_threads=self.num_threads,
            load_s=time.monotonic() - begin,
        )

    @property
    def has_work(self) -> bool:
        """Whether any choice runs or waits."""
        return self.scheduler.has_work

    def add(self, request: GenerationRequest) -> None:
        """Queue a valid request."""
        self.scheduler.add(request)

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
