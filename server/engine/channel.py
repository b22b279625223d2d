"""What front end and engine say to each other, and how it is framed.

Messages are typed msgpack (msgspec decodes into these classes or refuses); a frame is a 4-byte little-endian length and
the message. The channel is a socket pair that the engine inherits: nothing listens, nothing is in the file system.
"""

import struct
from dataclasses import dataclass

import msgspec

from octavo.server.engine.devices import Rung
from octavo.server.engine.request import Delta, GenerationRequest
from octavo.server.errors import DeviceError, StartupError

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 256 << 20


class Add(msgspec.Struct, tag="add"):
    """Front end -> engine: run this request, or go on with it."""

    request: GenerationRequest
    committed: dict[int, list[int]] | None = None  # of choices that an earlier engine has begun: `Scheduler.add`


class Abort(msgspec.Struct, tag="abort"):
    """Front end -> engine: forget these choices (None: all of a request). Unknown ids are ignored."""

    request_id: str
    choice_index: int | None = None


@dataclass(slots=True)
class RankInfo:
    """What one rank holds, and what loading it took."""

    weight_bytes: int
    workspace_bytes: int
    reserve_bytes: int  # of the memory plan: for runtime and libraries
    kv_cache_bytes: int
    read_bytes: int  # of the checkpoint
    load_s: float


@dataclass(slots=True)
class EngineInfo:
    """Facts about the loaded model and its memory, known once the engine is ready."""

    model_name: str
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    num_parameters: int
    num_blocks: int
    block_size: int
    ranks: list[RankInfo]
    device: str  # "cpu" or the GPU's name
    kernels: str  # the kernels in use, for people
    num_threads: int  # of each rank
    load_s: float
    ladder: list[Rung]  # from as many ranks as there are downwards

    @property
    def weight_bytes(self) -> int:
        """Over all ranks."""
        return sum(rank.weight_bytes for rank in self.ranks)

    @property
    def kv_cache_bytes(self) -> int:
        """Over all ranks."""
        return sum(rank.kv_cache_bytes for rank in self.ranks)


@dataclass(slots=True)
class EngineStats:
    """State after a step, and what the step added. Counters are since the engine's start."""

    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0  # of the waiting: choices whose next blocks a running one computes
    num_blocks_used: int = 0  # owned by choices; cached but unowned blocks count as free
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0  # tokens
    num_preemptions: int = 0
    kv_blocks_dropped: int = 0  # cached ones, whose content had changed
    tokens_audited: int = 0  # output tokens, computed again after their choice had ended
    prompt_tokens_computed: int = 0  # by local computation, recomputation after preemption not counted
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    step: int = 0
    step_tokens: int = 0  # tokens computed in the last step
    step_s: float = 0.0  # duration of the last step
    # What rank 0's detectors of changed bits have looked at, and the seconds that took.
    weight_slices_checked: int = 0
    weight_check_s: float = 0.0
    kv_blocks_checked: int = 0
    kv_check_s: float = 0.0
    rank_steps_checked: int = 0

    def count_from(self, offset: dict[str, float]) -> None:
        """Adds to the counters what is given for each."""
        for name, value in offset.items():
            setattr(self, name, getattr(self, name) + value)

    def offset_of(self, other: "EngineStats") -> dict[str, float]:
        """What is to be added to the counters of `other`, so that they go on where these stand."""
        return {name: getattr(self, name) - getattr(other, name) for name in COUNTERS}


COUNTERS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "generation_tokens",
    "step",
    "kv_blocks_dropped",
    "tokens_audited",
    "weight_slices_checked",
    "weight_check_s",
    "kv_blocks_checked",
    "kv_check_s",
    "rank_steps_checked",
)


class Ready(msgspec.Struct, tag="ready"):
    """Engine -> front end: the model is loaded and warm."""

    info: EngineInfo


class Failed(msgspec.Struct, tag="failed"):
    """Engine -> front end: it cannot start (`startup`) or cannot go on. `message` is one line for a person."""

    message: str
    startup: bool
    rank: int = 0  # whose start failed
    is_gone: bool = False  # since its device is not there

    @classmethod
    def to_start(cls, error: StartupError, rank: int) -> "Failed":
        """Why a rank cannot start."""
        return cls(str(error), True, rank, isinstance(error, DeviceError))

    def error(self) -> StartupError:
        """Inverse of `to_start`."""
        error = (DeviceError if self.is_gone else StartupError)(self.message)
        error.rank = self.rank
        return error


class StepOutput(msgspec.Struct, tag="step"):
    """Engine -> front end: what a step produced, for all requests at once."""

    epoch: int
    deltas: list[Delta]
    stats: EngineStats


ToEngine = Add | Abort
ToFrontEnd = Ready | Failed | StepOutput

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front_end = msgspec.msgpack.Decoder(ToFrontEnd).decode


def encode_frame(message: ToEngine | ToFrontEnd) -> bytes:
    """The message as a frame: length, then msgpack."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into frames. Raises ValueError on a length over MAX_FRAME_BYTES."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Bodies of the frames that `data` completes, in order."""
        self._data += data
        bodies, at = [], 0
        while len(self._data) - at >= 4:
            (length,) = _LENGTH.unpack_from(self._data, at)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            if len(self._data) - at - 4 < length:
                break
            bodies.append(bytes(self._data[at + 4 : at + 4 + length]))
            at += 4 + length
        del self._data[:at]
        return bodies
