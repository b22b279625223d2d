"""Configuration: frozen dataclasses, built once from the command line and environment, then passed down narrowed.

Each field is a flag of `octavo serve`: its name with dashes, its type, its default, its `help`.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

MIB, GIB = 1 << 20, 1 << 30


def flag(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that is also a command-line flag; `extra` may hold `choices` and `metavar`."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process needs to know. Crosses to it as JSON."""

    model: str = field(default="", metadata={"positional": True})  # a local Hugging Face folder, or a GGUF file
    device: str = flag(
        "auto",
        "where the model runs; auto: on a GPU where there is one, else on the CPU",
        choices=("auto", "cpu", "cuda"),
    )
    dtype: str = flag(
        "auto",
        "compute type; auto: on a GPU the checkpoint's own, bfloat16 for float32 ones; on a CPU bfloat16 where it is "
        "multiplied natively, else float32; float16 on a GPU alone",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quantization: str | None = flag(
        None,
        "quantise 16-bit weights while they are loaded; a checkpoint that is quantised already is served as it is",
        choices=("nf4", "fp4", "int4"),
    )
    quantize_lm_head: bool = flag(False, "with --quantization, quantise the output head as well")
    max_model_len: int | None = flag(None, "most tokens of prompt and output together (default: the model's own limit)")
    max_num_seqs: int = flag(64, "most choices in one step")
    max_num_batched_tokens: int = flag(512, "most tokens computed in one step; longer prompts are prefilled in chunks")
    block_size: int = flag(16, "tokens per KV block", choices=(16, 32, 64))
    kv_cache_memory_bytes: int | None = flag(
        None,
        "memory for the KV cache, of each GPU or of all ranks on a CPU, suffixes k, m, g allowed; raised to what one "
        "full-length request needs (default: 512M on a CPU, what --gpu-memory-utilization leaves on a GPU)",
    )
    gpu_memory_utilization: float = flag(
        0.9, "share of a GPU's memory for weights, workspace and KV cache; without effect on a CPU"
    )
    enforce_eager: bool = flag(False, "on a GPU run decode steps kernel by kernel, without CUDA graphs")
    enable_prefix_caching: bool = flag(True, "share KV blocks between requests that begin alike")
    tensor_parallel_size: int = flag(
        1, "ranks that divide the model among them, up to 8: a GPU each, or on a CPU a process each"
    )
    exactness: str = flag(
        "batch",
        "batch: a request's bits do not depend on what runs beside it; ranks: nor on whether there are 1, 2, 4 or 8 "
        "ranks; fast, on a GPU alone: no such promise",
        choices=("batch", "ranks", "fast"),
    )
    weight_scrub: float = flag(
        0.005, "share of the time that each rank spends on finding bits of its weights that have changed; 0: none"
    )
    kv_checksums: bool = flag(
        True, "take checksums of full KV blocks and compare them when a request begins with the block; on a CPU alone"
    )
    rank_check_interval: int = flag(
        16, "steps after which ranks compare the residual streams that each of them computes; 0: never"
    )
    audit: float = flag(
        0.0, "share of the choices whose tokens are computed again after their end, when there is room, and compared"
    )

    faults: str = field(default="", metadata={"hidden": True})  # folder of `engine.faults`, for tests alone

    def to_json(self) -> str:
        """The configuration as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EngineConfig":
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class SupervisorConfig(EngineConfig):
    """What it takes to keep an engine alive."""

    step_deadline: float = flag(
        2.0,
        "seconds without progress after which an engine is replaced; 8 times what it expects of a step, where that is "
        "more; 0: never",
    )
    max_recovery_time: float = flag(
        300.0, "most seconds from an engine's fault until another is ready; past it the server exits with status 70"
    )
    max_faults: int = flag(10, "most faults of engines within 10 minutes; past it the server exits with status 70")
    max_device_faults: int = flag(
        3,
        "most faults of one rank's device within 10 minutes; past it, or when the device is gone, the engine goes on "
        "with fewer ranks",
    )
    canary_interval: float = flag(
        300.0, "seconds after which an engine is asked again what the first one has answered; 0: never"
    )

    nnodes: int = flag(1, "machines that the ranks are on, in order and as evenly as can be; or WORLD_SIZE")
    node_rank: int = flag(0, "number of this machine: 0 serves, others only compute; or RANK")
    master_addr: str = flag("127.0.0.1", "address by which other machines reach number 0; or MASTER_ADDR")
    master_port: int = flag(29500, "port for it; or MASTER_PORT")

    def engine(self) -> EngineConfig:
        """The part that the engine process gets."""
        return EngineConfig(**{f.name: getattr(self, f.name) for f in fields(EngineConfig)})


@dataclass(frozen=True, slots=True)
class ServerConfig(SupervisorConfig):
    """Everything `octavo serve` is told."""

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = flag(8000, "port to listen on")
    served_model_name: str | None = flag(None, "name in the API (default: the folder's or file's name)")
    api_key: tuple[str, ...] = flag((), "key that clients must send; repeatable; or OCTAVO_API_KEY", metavar="KEY")
    api_key_file: str | None = flag(None, "file with one key a line, kept out of the process list")
    seed: int | None = flag(None, "makes the seeds of requests without one reproducible, in order of arrival")
    max_num_queued_reqs: int = flag(512, "most choices waiting beside those that run; more get 429")
    max_num_queued_tokens: int = flag(1_000_000, "most prompt tokens accepted and not finished; more get 429")
    max_logprobs: int = flag(20, "most top logprobs per token a request may ask for")
    shutdown_timeout: float = flag(30.0, "seconds that running requests may go on after SIGTERM or Ctrl-C")
    chat_template: str | None = flag(None, "file with a Jinja chat template instead of the model's own")
    enable_prompt_tokens_details: bool = flag(False, "report cached prompt tokens in usage")
    metrics_prefix: str = flag("octavo:", "prefix of metric names; vllm: keeps dashboards made for vLLM working")
    log_level: str = flag("info", "how much to log", choices=("debug", "info", "warning", "error"))

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or Path(self.model).name.removesuffix(".gguf")

    @property
    def max_num_choices(self) -> int:
        """Most choices in flight: running and queued."""
        return self.max_num_seqs + self.max_num_queued_reqs


def cache_dir() -> Path:
    """Where pulled models live: $OCTAVO_CACHE, else $XDG_CACHE_HOME/octavo, else ~/.cache/octavo."""
    if path := os.environ.get("OCTAVO_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"
