"""Fixtures that many tests share: the default model, and tiny random checkpoints."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_fakes import make_tokenizer
from tiny_models import TINY, TINY_MODELS

from octavo.server.pull import DEFAULT_MODEL, pull


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the default model, pulled once if it is not there."""
    return pull(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name in TINY_MODELS -> folder with a random float32 checkpoint, made once."""
    import torch
    import transformers

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            prefix, differs = TINY_MODELS[name]
            config = getattr(transformers, f"{prefix}Config")(**{**TINY, **differs})
            torch.manual_seed(len(name))
            model = getattr(transformers, f"{prefix}ForCausalLM")(config)
            for parameter in model.parameters():  # norms and biases start constant: make every tensor matter
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
                else:
                    torch.nn.init.normal_(parameter, std=0.15)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def served_checkpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """name in TINY_MODELS -> a folder of one's own with such a checkpoint and a byte-level tokenizer."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("served") / "tiny"
        make_tokenizer(folder)
        shutil.copytree(tiny_checkpoint(name), folder, dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """A loop that lives as long as a module's tests."""
    with asyncio.Runner() as runner:
        yield runner
