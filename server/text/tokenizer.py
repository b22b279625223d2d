"""A model's tokenizer: text and chats to token ids and back, read from a Hugging Face folder.

Uses `tokenizers` alone: importing transformers' tokenizers would load torch. Ids are those that transformers gives;
as there, tokenizer.json says which special tokens frame a text, whatever `add_bos_token` in the configuration says.
Knows nothing about requests; `detokenizer` decodes a growing output, `chat_template` renders.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers

from octavo.server.errors import RequestError, StartupError
from octavo.server.text.chat_template import ChatTemplate
from octavo.server.text.special_tokens import SpecialTokenGuard

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of one model. Thread-safe: nothing changes after construction.

    Args:
        folder: a Hugging Face model folder; needs tokenizer.json, uses tokenizer_config.json, special_tokens_map.json,
            config.json, generation_config.json and chat_template.jinja where they exist.
        chat_template: path of a file with a Jinja template to use instead of the model's own.

    Attributes:
        vocab_size: number of tokens, added ones included.
        bos_token_id: None where the model has none.
        eos_token_ids: every id that ends a text.
        special_token_ids: ids that `skip_special_tokens` leaves out.
        byte_level: a text is the UTF-8 reading of its tokens' bytes; else the decoder has rules of its own.
        whole_texts: id -> text of ordinary tokens that are whole characters, filled as `token_bytes` is asked for them.

    Raises:
        StartupError: a file is missing or broken; names the file.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        self._named = {name: _content(config[name]) for name in _NAMED_TOKENS if config.get(name)}
        self._class_name = str(config.get("tokenizer_class", "TokenizersBackend"))
        self._tokenizer = _load(folder / "tokenizer.json")
        _add_tokens(self._tokenizer, config, self._named)

        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        model_config = _read_json(folder / "config.json")
        generation_config = _read_json(folder / "generation_config.json")
        self.bos_token_id = self._named_id("bos_token")
        if self.bos_token_id is None:
            self.bos_token_id = model_config.get("bos_token_id")
        eos = generation_config.get("eos_token_id", model_config.get("eos_token_id"))
        eos_ids = list(eos) if isinstance(eos, list) else [eos]
        eos_ids.append(self._named_id("eos_token"))
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in eos_ids if i is not None))

        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        steps = decoder.get("decoders", [decoder])
        kinds = [step.get("type") for step in steps]
        self.byte_level = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        # Metaspace, or Replace with this pattern: the character stands for a space.
        self._underline_is_space = any("\u2581" in json.dumps(step, ensure_ascii=False) for step in steps)
        self._token_bytes: dict[int, bytes] = {}  # id -> its bytes, filled as ids come up
        self.whole_texts: dict[int, str] = {}

        source = _chat_template_source(folder, config, chat_template)
        self._chat_template = None if source is None else ChatTemplate(source, self._named)
        self._guard = SpecialTokenGuard(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it are read as such."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat. A special token written in a message is ordinary text, only the template's own count.

        Raises:
            RequestError: the model has no chat template, or it cannot render these messages.
        """
        if self._chat_template is None:
            raise RequestError("this model has no chat template; use /v1/completions, or start with --chat-template")
        disguised, kwargs = self._guard.disguise([messages, template_kwargs or {}])
        text = self._chat_template.render(
            disguised,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=kwargs,
        )
        if disguised == messages and kwargs == (template_kwargs or {}):
            return self.encode(text, add_special_tokens=False)
        return self._guard.encode(text)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids without a token give nothing."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text, spaces kept, special tokens shown; U+FFFD stands for a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be a part of a character; nothing for an id without a token."""
        if (cached := self._token_bytes.get(token_id)) is not None:
            return cached
        token = self._tokenizer.id_to_token(token_id) or ""
        if self.byte_level:
            try:
                data = bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:  # an added token, written as plain text
                data = token.encode()
        elif self.is_byte_token(token_id):
            data = bytes.fromhex(token[3:5])
        else:
            data = (token.replace("\u2581", " ") if self._underline_is_space else token).encode()
        self._token_bytes[token_id] = data
        if token_id not in self.special_token_ids:
            with suppress(UnicodeDecodeError):
                self.whole_texts[token_id] = data.decode()
        return data

    def is_byte_token(self, token_id: int) -> bool:
        """Whether the token is one byte of a character that the vocabulary lacks (SentencePiece's <0x0A>)."""
        token = self._tokenizer.id_to_token(token_id)
        return self._byte_fallback and token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def info(self) -> dict[str, Any]:
        """What a client may want to know: class, vocabulary size, special tokens and their ids, chat template."""
        return {
            "tokenizer_class": self._class_name,
            "vocab_size": self.vocab_size,
            **self._named,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": list(self.eos_token_ids),
            "special_tokens": [self._tokenizer.id_to_token(i) for i in sorted(self.special_token_ids)],
            "chat_template": self._chat_template and self._chat_template.source,
        }

    def _named_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(self._named[name]) if name in self._named else None


def _byte_of_char() -> dict[str, int]:
    """Byte-level vocabularies write a byte as a printable character: itself, else the next one from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()  # character in the vocabulary -> byte that it stands for


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise StartupError(f"{path} is no valid tokenizer: {str(error).splitlines()[0]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} holds no JSON object")
    return value


def _content(token: Any) -> str:
    """A token's text: configurations give it as a string or as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> None:
    """Adds what the configuration declares beyond tokenizer.json, in the order of ids."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    declared = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    for _, token in declared:
        if token["content"] not in known:
            fields = {key: value for key, value in token.items() if key != "__type"}
            tokenizer.add_tokens([tokenizers.AddedToken(**fields)])
    extra = _values(config.get("extra_special_tokens")) + _values(config.get("additional_special_tokens"))
    special = dict.fromkeys([*named.values(), *map(_content, extra)])
    tokenizer.add_special_tokens([tokenizers.AddedToken(content, normalized=False) for content in special])


def _values(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


def _chat_template_source(folder: Path, config: dict[str, Any], override: str | None) -> str | None:
    """The template's text: the operator's file, the model's own file, or the one in tokenizer_config.json."""
    path = Path(override) if override else folder / "chat_template.jinja"
    if override or path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise StartupError(f"cannot read the chat template {path}: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template
