"""What a rank loads and allocates, and the engine: scheduler over rank 0's runner, driven step by step.

Used by the ranks' processes, and directly by benchmarks and tests.
"""

import errno
import hashlib
import os
import socket
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from octavo import __version__
from octavo.kernels import backend
from octavo.kernels.cpu.library import library, multiplies_bf16, set_num_threads
from octavo.kernels.ranks import DistributedRanks, Ranks, SharedMemoryRanks
from octavo.models.checkpoint import CheckpointError, open_checkpoint
from octavo.models.config import ConfigError, ModelConfig, read_config
from octavo.models.llama import Llama
from octavo.models.loader import load
from octavo.models.memory import (
    MemoryPlan,
    kv_block_bytes,
    num_parameters,
    plan_memory,
    shared_bytes,
    state_bytes,
    weight_bytes,
    workspace_bytes,
)
from octavo.models.quantization.choose import with_quantization
from octavo.models.resident import compress_weights
from octavo.models.shard import Shard, shard_model
from octavo.server.config import GIB, MIB, EngineConfig
from octavo.server.engine.channel import EngineInfo, EngineStats, RankInfo
from octavo.server.engine.devices import Rung
from octavo.server.engine.faults import Faults, is_dead
from octavo.server.engine.integrity import Corruption
from octavo.server.engine.pacing import ROW_TILE, Pacer
from octavo.server.engine.peers import Leader, Place
from octavo.server.engine.plan import StepPlan
from octavo.server.engine.request import Delta, GenerationRequest
from octavo.server.engine.runner import Runner
from octavo.server.engine.scheduler import Scheduler
from octavo.server.errors import DeviceError, StartupError

RUNTIME_BYTES = 400 * MIB  # interpreter, torch and its libraries, front end, launcher and a rank
RANK_RUNTIME_BYTES = 60 * MIB  # what each further rank does not share with these
GPU_RUNTIME_BYTES = GIB  # on a GPU: context, kernels, CUDA graphs, what torch allocates beside the plan
DEFAULT_KV_BYTES = 512 * MIB  # on a CPU
GPU_ROW_TILE = 256  # tokens that a GPU computes in about the time that reading the weights takes: an estimate
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(config: EngineConfig, device: int = 0) -> None:
    """Choose device and kernels for a rank's process, before it allocates anything.

    device: of several GPUs, which; on a CPU it is only a name. Raises StartupError, DeviceError where it is not there.
    """
    wanted, exactness = config.device, config.exactness
    has_gpu = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        cause = "sees no GPU" if torch.version.cuda or torch.version.hip else "is a build for CPUs alone"
        raise DeviceError(f"--device is cuda, but this torch ({torch.__version__}) {cause}")
    if is_dead(config.faults, device):
        raise DeviceError(f"device {device} is declared dead")
    if has_gpu:
        if device >= (num_gpus := torch.cuda.device_count()):
            raise DeviceError(f"GPU {device} is not there: torch sees {num_gpus}")
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            raise DeviceError(f"GPU {device} cannot be used: {str(error).splitlines()[0]}") from None
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


def plan_engine_memory(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    shard: Shard | None = None,
    place: Place | None = None,
) -> MemoryPlan:
    """What a rank is to allocate, never fewer KV blocks than one request of full length needs.

    shard: by default all of the model; place: by default all ranks are on this machine. On a CPU ranks have equal parts
    of what there is. Raises StartupError where that does not fit what is there.
    """
    shard = shard or Shard()
    place = place or Place(shard.rank, shard.num_ranks)
    local = shard.local(model)
    kv_bytes, utilization = config.kv_cache_memory_bytes, config.gpu_memory_utilization
    reserve = GPU_RUNTIME_BYTES
    if backend.device().type == "cuda":
        free, total = torch.cuda.mem_get_info()
        limit = free if kv_bytes else int(utilization * total)
        if limit > free:
            raise StartupError(
                f"too little memory: --gpu-memory-utilization {utilization:g} asks for {limit / 1e9:.2f} GB of the "
                f"GPU's {total / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
            )
    else:
        kv_bytes = (kv_bytes or DEFAULT_KV_BYTES) // shard.num_ranks
        limit = available_bytes() // place.num_local_ranks
        reserve = RUNTIME_BYTES // place.num_local_ranks + (RANK_RUNTIME_BYTES if place.local_rank else 0)
    state = state_bytes(model, config.max_num_seqs, max_model_len, config.block_size)
    plan = plan_memory(
        weight_bytes=weight_bytes(model, dtype, shard),
        workspace_bytes=workspace_bytes(model, config.max_num_batched_tokens, max_model_len, dtype, shard) + state,
        reserve_bytes=reserve,
        block_bytes=kv_block_bytes(local, config.block_size, dtype),
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


def ladder(
    model: ModelConfig, config: EngineConfig, max_model_len: int, dtype: torch.dtype, num_ranks: int
) -> list[Rung]:
    """Numbers of ranks that fit the memory that is there now, from `num_ranks` downwards.

    Where the context does not fit, it is halved, up to three times.
    """
    rungs: list[Rung] = []
    for count, halvings in product(range(num_ranks, 0, -1), range(4)):
        rung = Rung(count, max_model_len >> halvings)
        if any(other.num_ranks == count for other in rungs):
            continue
        try:
            for rank in range(count):
                shard = shard_model(model, rank, count, config.exactness == "ranks")
                plan_engine_memory(model, config, rung.max_model_len, dtype, shard)
        except (ConfigError, StartupError):
            continue
        rungs.append(rung)
    return rungs


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


class Rank:
    """One rank: its device, its part of the model, its memory, planned and then loaded.

    Raises StartupError where configuration, model or memory do not allow it.
    """

    info: RankInfo  # once it is loaded

    def __init__(self, config: EngineConfig, place: Place) -> None:
        """Allocates nothing yet."""
        self._config, self._place = config, place
        choose_device(config, place.device)
        if config.audit and config.exactness == "fast":
            raise StartupError("--audit compares bits, which --exactness fast does not promise")
        self.num_threads = max(1, len(os.sched_getaffinity(0)) // place.num_local_ranks)
        set_num_threads(self.num_threads)
        torch.set_grad_enabled(False)
        self.folder = Path(config.model)
        try:
            model_config = read_config(self.folder)
            self._checkpoint = open_checkpoint(self.folder, model_config)
            self.model_config = with_quantization(
                model_config, self._checkpoint, config.quantization, config.quantize_lm_head
            )
        except (ConfigError, CheckpointError) as error:
            raise StartupError(str(error)) from None
        self.max_model_len = config.max_model_len or self.model_config.max_position
        if self.max_model_len > self.model_config.max_position:
            raise StartupError(
                f"--max-model-len is {self.max_model_len}, but the model's positions end at "
                f"{self.model_config.max_position}"
            )
        try:
            self.shard = shard_model(self.model_config, place.rank, place.num_ranks, config.exactness == "ranks")
        except ConfigError as error:
            raise StartupError(f"--tensor-parallel-size is {place.num_ranks}: {error}") from None
        self.dtype = choose_dtype(config.dtype, self.model_config.dtype)
        self.plan = plan_engine_memory(self.model_config, config, self.max_model_len, self.dtype, self.shard, place)

    @property
    def fingerprint(self) -> str:
        """Of version, model and checkpoint, which ranks of several machines must have in common."""
        tensors = sorted((name, info.shape, info.dtype) for name, info in self._checkpoint.tensors.items())
        digest = hashlib.sha256(repr((__version__, self.model_config.architecture, tensors)).encode())
        digest.update(self._checkpoint.read("model.norm.weight").float().numpy().tobytes())  # those of kin differ here
        return digest.hexdigest()

    def load(
        self, num_blocks: int, meeting_point: tuple[str, int] | None = None, listener: socket.socket | None = None
    ) -> Runner:
        """Allocate what was planned, but for so many KV blocks, and read the weights.

        meeting_point, listener: as `DistributedRanks.meet` has them.
        """
        begin = time.monotonic()
        config, place, model_config = self._config, self._place, self.model_config
        try:
            ranks = self._meet(meeting_point, listener)
            model = Llama(model_config, self.dtype, self.max_model_len, self.shard)
            # disable=None: no bar where standard error is not a terminal.
            hidden = True if place.rank else None
            with tqdm(desc="loading", unit=" values", unit_scale=True, disable=hidden, leave=False) as bar:
                read_bytes = load(self._checkpoint, model, bar)
            saved_bytes = compress_weights(model)
            runner = Runner(
                model,
                num_blocks=num_blocks,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                use_graphs=backend.kernels() == "triton" and not config.enforce_eager,
                ranks=ranks,
                weight_scrub=config.weight_scrub,
                kv_checksums=config.kv_checksums and backend.kernels() != "triton",
                rank_check_interval=config.rank_check_interval,
            )
        except CheckpointError as error:
            raise StartupError(str(error)) from None
        except (MemoryError, OSError, RuntimeError) as error:
            if not _is_for_want_of_memory(error):
                raise
            raise StartupError(f"memory that was planned is not to be had: {str(error).splitlines()[0]}") from None
        self.info = RankInfo(
            weight_bytes=self.plan.weight_bytes - saved_bytes,
            workspace_bytes=self.plan.workspace_bytes,
            reserve_bytes=self.plan.reserve_bytes,
            kv_cache_bytes=num_blocks * self.plan.block_bytes,
            read_bytes=read_bytes,
            load_s=time.monotonic() - begin,
        )
        return runner

    def _meet(self, meeting_point: tuple[str, int] | None, listener: socket.socket | None) -> Ranks:
        """How this rank and the others reach each other."""
        place = self._place
        if place.num_ranks == 1:
            return Ranks()
        if backend.kernels() == "native" and meeting_point is None:
            size = shared_bytes(self.model_config, self._config.max_num_batched_tokens, self.dtype, self.shard)
            return SharedMemoryRanks(place.rank, place.num_ranks, place.memory, size)
        descriptor = None if listener is None else listener.detach()
        return DistributedRanks.meet(place.rank, place.num_ranks, place.memory, meeting_point, descriptor)


def faults_of(config: EngineConfig, rank: int, runner: Runner) -> Faults:
    """What a test asks of a rank: nothing, unless the server was started for tests."""
    faults = Faults(config.faults, rank)
    if config.faults:
        from octavo.server.engine.bit_flips import BitFlips  # here, since no server that is not under test has it

        faults.flip = BitFlips(runner).flip
    return faults


def _is_for_want_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.ENOSPC)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _ignore(expected_s: float, request_ids: list[str]) -> None:
    """Of an engine that nobody watches."""


class Engine:
    """A model ready to generate: rank 0, which decides what every rank executes.

    Raises StartupError where model, memory or configuration do not allow it.
    """

    def __init__(self, config: EngineConfig, place: Place | None = None) -> None:
        """place: by default this process is the only rank."""
        begin = time.monotonic()
        place = place or Place()
        rank = Rank(config, place)
        self._leader = Leader(place)
        rungs: list[Rung] = []
        if place.address:  # the memory of other machines is not known here
            rungs = [Rung(place.num_ranks, rank.max_model_len)]
        elif not place.epoch:
            rungs = ladder(rank.model_config, config, rank.max_model_len, rank.dtype, place.num_ranks)
        listener = socket.create_server((place.address, 0)) if place.address else None
        meeting_point = None if listener is None else (place.address, listener.getsockname()[1])
        num_blocks = self._leader.agree(rank.plan.num_blocks, rank.fingerprint, meeting_point)
        self.runner = rank.load(num_blocks, meeting_point, listener)
        infos = [rank.info, *self._leader.wait_until_loaded()]
        faults = faults_of(config, place.rank, self.runner)
        faults.at("warm-up")
        warm_up_s = self.runner.warm_up(config.max_num_batched_tokens)
        self.runner.faults = faults
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=rank.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            epoch=place.epoch,
            audit=config.audit,
        )
        row_tile = GPU_ROW_TILE if backend.device().type == "cuda" else ROW_TILE
        self._pacer = Pacer(config.max_num_batched_tokens, row_tile)
        self._pacer.observe(0, min(config.max_num_batched_tokens, rank.max_model_len - 1), warm_up_s)
        self._step_s = 0.0
        # Told before each step how long it is likely to take, and which requests are in it.
        self.before_step: Callable[[float, list[str]], None] = _ignore
        self.info = EngineInfo(
            model_name=rank.folder.name,
            architecture=rank.model_config.architecture,
            dtype=str(rank.dtype).removeprefix("torch."),
            max_model_len=rank.max_model_len,
            vocab_size=rank.model_config.vocab_size,
            num_parameters=num_parameters(rank.model_config),
            num_blocks=num_blocks,
            block_size=config.block_size,
            ranks=infos,
            device=_device_name(),
            kernels=backend.description(),
            num_threads=rank.num_threads,
            load_s=time.monotonic() - begin,
            ladder=rungs,
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
        """Plan, execute and apply one step, its prefill paced by the steps before; no deltas where nothing can run.

        Raises Corruption where bits have changed: what the step has computed is lost.
        """
        self.scrub()
        begin = time.monotonic()
        max_prefill_tokens = self._pacer.max_prefill_tokens(*self.scheduler.num_decodes_and_prefills())
        plan: StepPlan | None = self.scheduler.plan_step(begin, max_prefill_tokens)
        if plan is None:
            return []
        num_decodes = plan.nums.count(1)
        num_prefill_tokens = sum(plan.nums) - num_decodes
        self.before_step(self._pacer.expected_s(num_decodes, num_prefill_tokens), self.scheduler.request_ids(plan))
        self._leader.broadcast(plan)
        deltas = self.scheduler.apply(self.runner.execute(plan), plan)
        if self.scheduler.audit_failure:
            raise Corruption("audit", self.scheduler.audit_failure, 0 if len(self.info.ranks) == 1 else None)
        self._step_s = time.monotonic() - begin
        self._pacer.observe(num_decodes, num_prefill_tokens, self._step_s)
        return deltas

    def scrub(self) -> None:
        """Look at as much of rank 0's weights as is due. Raises Corruption."""
        self.runner.weights.run()

    def stats(self) -> EngineStats:
        """Counters since the start, and the last step's figures."""
        weights, kv, replicas = self.runner.weights, self.runner.kv_checksums, self.runner.replicas
        return EngineStats(
            **self.scheduler.stats(),
            step_s=self._step_s,
            weight_slices_checked=weights.num_checked,
            weight_check_s=weights.seconds,
            kv_blocks_checked=0 if kv is None else kv.num_checked,
            kv_check_s=0.0 if kv is None else kv.seconds,
            rank_steps_checked=replicas.num_checked,
        )
