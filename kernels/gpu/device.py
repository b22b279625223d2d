"""What launchers must know of the chip, which may be one that is executed on the CPU."""

import functools

import torch
import triton


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 where the CPU executes what they would."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def has_float8(device: torch.device) -> bool:
    """Whether the chip converts float8_e4m3fn; Triton's interpreter does."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return bool(triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().arch >= 89)


def register_limit(count: int) -> dict[str, int]:
    """The option that keeps a thread to so many registers, of which AMD's compiler knows nothing."""
    return {"maxnreg": count} if torch.version.hip is None else {}
