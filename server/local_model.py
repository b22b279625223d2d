"""The tokenizer of a model on this machine: of a Hugging Face folder, or of a GGUF file, made from its metadata."""

import json
import tempfile
from pathlib import Path

from octavo.models.gguf import GgufError, GgufFile
from octavo.server.errors import StartupError
from octavo.server.text.gguf import tokenizer_files
from octavo.server.text.tokenizer import Tokenizer


def load_tokenizer(model: Path, chat_template: str | None = None) -> Tokenizer:
    """model: a folder or a file; chat_template: a file to use instead of the model's own. Raises StartupError."""
    if model.is_dir():
        return Tokenizer(model, chat_template)
    try:
        file = GgufFile(model)
        files = {**tokenizer_files(file.metadata), "config.json": json.dumps(file.config())}
    except GgufError as error:
        raise StartupError(str(error)) from None
    except StartupError as error:
        raise StartupError(f"{model}: {error}") from None
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        for name, content in files.items():
            Path(folder, name).write_text(content, encoding="utf-8")
        return Tokenizer(Path(folder), chat_template)
