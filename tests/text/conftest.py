"""Tokenizers for the tests of text: the default model's, transformers' reading of it, and a small SentencePiece one."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from octavo.server.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="session")
def theirs(smollm2: Path) -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(smollm2)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in the manner of Llama 2: U+2581 for spaces, tokens for single bytes, a decoder that trims.

    Ids: 0 <unk>, 1 <s>, 2 </s>, 3 to 258 bytes, then letters and a few pairs.
    """
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", *"abcdefgh", "\u2581a", "ab", "\u2581\u2581"]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "\u2581")]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    built.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("sentencepiece")
    built.save(str(folder / "tokenizer.json"))
    return folder
