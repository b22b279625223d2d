"""`octavo serve` as a process of its own, for tests that reach it over HTTP."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from api_fakes import eventually

ROOT = Path(__file__).parent.parent
READY_S = 120.0  # for kernels that are compiled and then executed on the CPU


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (state, parent, group, session, ...); none where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def processes(session: int) -> list[int]:
    """Processes of a session that still run; a zombie has ended."""
    found = []
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        if (fields := stat(pid)) and fields[0] != "Z" and int(fields[3]) == session:
            found.append(pid)
    return sorted(found)


def _parent(pid: int) -> int:
    return int(stat(pid)[1])


@dataclass
class Server:
    """An `octavo serve` in a session of its own, so that all its processes can be found."""

    process: "subprocess.Popen[bytes]"
    log_path: Path
    started_s: float = field(default_factory=time.monotonic)
    ready_s: float = 0.0
    port: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def launcher_pid(self) -> int:
        (pid,) = (pid for pid in processes(self.pid) if _parent(pid) == self.pid)
        return pid

    @property
    def rank_pids(self) -> list[int]:
        """In the order of ranks: the launcher's children."""
        return [pid for pid in processes(self.pid) if _parent(pid) == self.launcher_pid]

    @property
    def engine_pid(self) -> int:
        return self.rank_pids[0]

    def wait_until_ready(self) -> None:
        """Reads the port from the log and waits for /readyz."""
        deadline = self.started_s + READY_S
        while not (match := re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log)):
            assert self.process.poll() is None, f"ended with status {self.process.returncode}"
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.02)
        self.port = int(match[1])
        assert httpx.get(f"{self.url}/readyz").status_code == 200
        self.ready_s = time.monotonic() - self.started_s

    def metric(self, name: str) -> float:
        """The value of a gauge."""
        text = httpx.get(f"{self.url}/metrics").text
        (value,) = re.findall(rf"^octavo:{name}\{{.*\}} (.*)$", text, re.MULTILINE)
        return float(value)

    async def until_idle(self, timeout_s: float = 5.0) -> None:
        """Waits until nothing runs or waits and no choice owns a block."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        await eventually(lambda: [self.metric(name) for name in names] == [0, 0, 0], timeout_s)

    @contextmanager
    def halted_engine(self) -> Iterator[None]:
        """The engine stands still."""
        pid = self.engine_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    async def exit_status(self, timeout_s: float) -> int:
        """The status, once the server has ended by itself and has left no process behind."""
        await eventually(lambda: self.process.poll() is not None, timeout_s)
        await eventually(lambda: not processes(self.pid), 2.0)
        status: int = self.process.returncode
        return status


@contextmanager
def launched(log_path: Path, *command: str, **environment: str) -> Iterator[Server]:
    """A command in a session of its own; every process of it is killed in the end. The log goes to our output."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, "OCTAVO_API_KEY": "", **environment},
        )
    server = Server(process, log_path)
    try:
        yield server
    finally:
        for pid in processes(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait(10)
        print(server.log)


def command(folder: Path, *flags: str) -> list[str]:
    """Serve on a free port, and on the CPU unless the flags say otherwise."""
    return [sys.executable, "-m", "octavo.server", "serve", str(folder), "--port", "0", "--device", "cpu", *flags]


@contextmanager
def serving(folder: Path, log_path: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server that is ready."""
    with launched(log_path, *command(folder, *flags), **environment) as server:
        server.wait_until_ready()
        yield server
