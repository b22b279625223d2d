"""Ids and texts are those of transformers; bytes of tokens are true; broken folders are refused in one line."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from octavo.server.errors import StartupError
from octavo.server.text.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!  The year 2024's price was $1,234.50",
    "na\u00efve caf\u00e9 \u6771\u4eac \U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\n\tdef f(x):\r\n    return x**2\n\n",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name><reponame",
    "\x00\ufffd\u0301\U000f0000",
]


def edited(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a model's text files with changes in tokenizer_config.json (None removes a key)."""
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
    return folder


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_and_texts_are_those_of_transformers(
    text: str, special: bool, tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_any_text_has_the_ids_of_transformers(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    @settings(deadline=None)
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        # Some bytes have no token in this vocabulary, so that not every text comes back.
        assert b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace") == theirs.decode(ids)

    check()


def test_facts(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.bos_token_id == theirs.bos_token_id
    assert tokenizer.eos_token_ids == (theirs.eos_token_id,)
    assert tokenizer.special_token_ids == set(range(17))
    info = tokenizer.info()
    assert info["eos_token"] == "<|im_end|>" and info["vocab_size"] == 49152
    assert "<|im_start|>" in info["special_tokens"] and info["chat_template"] == theirs.chat_template
    json.dumps(info)


def test_end_of_sequence_ids_come_from_all_files(smollm2: Path, tmp_path: Path) -> None:
    folder = edited(smollm2, tmp_path, eos_token={"content": "<file_sep>", "special": True})
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert Tokenizer(folder).eos_token_ids == (0, 2, 5)
    (folder / "generation_config.json").unlink()
    assert Tokenizer(folder).eos_token_ids == (2, 5)


def test_the_configuration_adds_no_ends(smollm2: Path, tmp_path: Path) -> None:
    """transformers ignores these two where there is a tokenizer.json, which has its own rule."""
    folder = edited(smollm2, tmp_path, add_bos_token=True, add_eos_token=True)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("some text") == theirs.encode("some text") == [11246, 1694]


def test_ends_that_tokenizer_json_adds(smollm2: Path, tmp_path: Path) -> None:
    folder = edited(smollm2, tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "bos", "type_id": 0}})
    data["post_processor"]["special_tokens"] = {"bos": {"id": "bos", "ids": [1], "tokens": ["<|im_start|>"]}}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("some text") == theirs.encode("some text") == [1, 11246, 1694]
    assert ours.encode("some text", add_special_tokens=False) == [11246, 1694]
    assert ours.encode_chat([{"role": "user", "content": "<|im_end|>"}])[:2] == [1, 9690]  # the template's, not twice


def test_tokens_declared_only_in_the_configuration(smollm2: Path, tmp_path: Path) -> None:
    declared = {"49152": {"content": "<tool>", "special": False, "normalized": False}}
    folder = edited(smollm2, tmp_path, added_tokens_decoder=declared, additional_special_tokens=["<|extra|>"])
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs) == 49154
    assert ours.encode("a<tool>b<|extra|>c") == theirs.encode("a<tool>b<|extra|>c")
    assert {49152, 49153} & ours.special_token_ids == {49153}


def test_the_files_own_truncation_is_off(smollm2: Path, tmp_path: Path) -> None:
    folder = edited(smollm2, tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert len(Tokenizer(folder).encode("one two three four five six seven")) > 4


def test_single_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\u6771")
    assert len(ids) > 1 and b"".join(map(tokenizer.token_bytes, ids)) == "\u6771".encode()
    assert tokenizer.token_text(ids[0]) == "\ufffd"
    assert tokenizer.token_text(tokenizer.encode(" world")[0]) == " world"
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_single_tokens_of_sentencepiece(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_folder)
    assert not tokenizer.byte_level
    ids = tokenizer.encode("ab \u6771")
    assert b"".join(map(tokenizer.token_bytes, ids)) == " ab \u6771".encode()  # the first space is this kind's own
    assert tokenizer.decode(ids) == "ab \u6771"
    assert [tokenizer.is_byte_token(token_id) for token_id in ids[-3:]] == [True, True, True]
    assert tokenizer.token_text(1) == "<s>" and not tokenizer.is_byte_token(1)


def test_threads_get_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = [f"text number {n}, and some more of it <|im_end|>" for n in range(200)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == list(map(tokenizer.encode, texts))
        assert list(pool.map(tokenizer.encode_chat, chats)) == list(map(tokenizer.encode_chat, chats))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("config.json", "[]"),
        ("generation_config.json", "\udcff"),
        ("chat_template.jinja", "{% if %}"),
        ("chat_template.jinja", "\udcff"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(name: str, text: str | None, smollm2: Path, tmp_path: Path) -> None:
    path = edited(smollm2, tmp_path) / name
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StartupError, match="template" if name.endswith(".jinja") else name) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
