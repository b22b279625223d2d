"""Chats are rendered as transformers renders them, within bounds; users cannot write special tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from octavo.server.errors import RequestError, StartupError
from octavo.server.text import chat_template
from octavo.server.text.chat_template import MAX_REFUSAL_CHARS, ChatTemplate
from octavo.server.text.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?\n"},
    {"role": "assistant", "content": " It is "},
]


def render(source: str, messages: Any = None, *, continue_final_message: bool = False, **kwargs: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(
        CHAT if messages is None else messages,
        add_generation_prompt=False,
        continue_final_message=continue_final_message,
        template_kwargs=kwargs,
    )


@pytest.mark.parametrize("num_messages", [1, 2, 3])
@pytest.mark.parametrize(("prompt", "go_on"), [(True, False), (False, False), (False, True)])
def test_ids_are_those_of_transformers(
    num_messages: int, prompt: bool, go_on: bool, tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    chat = CHAT[:num_messages]
    ours = tokenizer.encode_chat(chat, add_generation_prompt=prompt, continue_final_message=go_on)
    expected = theirs.apply_chat_template(
        chat, add_generation_prompt=prompt, continue_final_message=go_on, return_dict=False
    )
    assert ours == expected


# In the manner of the templates in use: each line is a habit that one of them has.
SOURCES = [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]\n"
    "  {%- else %}{{ m['content'] }}{% endif %}\n{% endfor %}",
    "{% for m in messages %}{% if loop.first %}A{% elif loop.last %}Z{% else %}{{ loop.index0 }}/{{ loop.length }}"
    "{% endif %}{{ m.content }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'system' %}{% set ns.n = ns.n + 1 %}{{ m.content }}"
    "{% endfor %}{{ ns.n }}{% if tools %}T{% endif %}{% if documents is none %}N{% endif %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m | tojson(indent=2) }}{% endfor %}",
    "{% macro line(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages[::-1] %}{{ line(m) }}"
    "{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% else %}none{% endfor %}{{ name | default('x') }}",
]


@pytest.mark.parametrize(("source", "go_on"), [*((s, False) for s in SOURCES), *((s, True) for s in SOURCES[:3])])
def test_templates_render_as_in_transformers(source: str, go_on: bool, theirs: PreTrainedTokenizerFast) -> None:
    chat = [*CHAT[:2], {"role": "assistant", "content": "caf\u00e9 <b> "}]
    expected = theirs.apply_chat_template(
        chat, chat_template=source, tokenize=False, continue_final_message=go_on, bos_token="<s>", name="n"
    )
    assert render(source, chat, continue_final_message=go_on, name="n") == expected


def test_every_special_token_in_a_message_is_ordinary_text(tokenizer: Tokenizer) -> None:
    special = tokenizer.info()["special_tokens"]
    assert len(special) == 17
    frame = [i for i in tokenizer.encode_chat([{"role": "user", "content": "x"}]) if i in tokenizer.special_token_ids]
    everything = "".join(special) + "<|im_" + special[0][:-1]
    for text in [*special, everything, *(f"a {token}{token} b" for token in special)]:
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        assert [i for i in ids if i in tokenizer.special_token_ids] == frame
        assert f"user\n{text}<|im_end|>\n" in tokenizer.decode(ids, skip_special_tokens=False)


def test_disguised_and_plain_messages_have_the_same_ids(tokenizer: Tokenizer) -> None:
    """An end like "<" makes the guard step in, and changes nothing."""
    plain = tokenizer.encode_chat([{"role": "user", "content": "a < b and 1 <"}])
    text = tokenizer.decode(plain, skip_special_tokens=False)
    assert plain == tokenizer.encode(text, add_special_tokens=False)


def test_special_tokens_cannot_be_put_together_from_parts(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "template"
    path.write_text(
        "{% for m in messages %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endfor %}<|im_end|>"
    )
    tokenizer = Tokenizer(smollm2, chat_template=str(path))
    for cut in range(1, 9):
        parts = [{"type": "text", "text": "<|im_end|>"[:cut] + " "}, {"type": "text", "text": "<|im_end|>"[cut:]}]
        ids = tokenizer.encode_chat([{"role": "user", "content": parts}])
        assert ids.count(2) == 1 and ids[-1] == 2


def test_special_tokens_in_roles_and_arguments(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "template"
    path.write_text("{{ messages[0].role }}{{ extra }}{{ eos_token }}")
    tokenizer = Tokenizer(smollm2, chat_template=str(path))
    ids = tokenizer.encode_chat([{"role": "<|im_end|>", "content": ""}], template_kwargs={"extra": "<|im_end|>"})
    assert ids.count(2) == 1
    ids = tokenizer.encode_chat([{"role": "", "content": ""}], template_kwargs={"extra": "", "eos_token": "mine"})
    assert ids == [2]


def test_sentencepiece_texts_are_encoded_in_one_piece(sentencepiece_folder: Path, tmp_path: Path) -> None:
    """Its first piece gets a space, so that encoding piece by piece would give other ids."""
    path = tmp_path / "template"
    path.write_text("<s>{{ messages[0].content }}</s>")
    tokenizer = Tokenizer(sentencepiece_folder, chat_template=str(path))
    ids = tokenizer.encode_chat([{"role": "user", "content": "ab<s>c</s>"}])
    assert ids[0] == 1 and ids[-1] == 2 and not {1, 2} & set(ids[1:-1])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>ab<s>c</s></s>"


def test_continue_final_message(tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b <|im_end|> c"}]
    ids = tokenizer.encode_chat(chat, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("assistant\nb <|im_end|> c")
    assert ids.count(2) == 2  # system and user
    assert render("{{ messages[0].content }}.", [{"content": "a "}], continue_final_message=True) == "a "
    assert render("{{ messages[0].content | trim }}.", [{"content": "a "}], continue_final_message=True) == "a"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = "{% for p in messages[0].content %}{{ p.text }}{% endfor %}."
    assert render(joined, [{"content": parts}], continue_final_message=True) == "ab"
    assert parts[1]["text"] == "b"  # the caller's messages stay as they are


@pytest.mark.parametrize("final", [[], [{"role": "assistant"}], [{"role": "assistant", "content": []}]])
def test_continuing_what_is_not_there_is_refused(final: list[dict[str, Any]]) -> None:
    with pytest.raises(RequestError, match="no text content"):
        render("{{ messages }}", final, continue_final_message=True)


def test_continuing_needs_a_template_that_shows_the_message(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="does not reproduce"):
        render("nothing", continue_final_message=True)
    with pytest.raises(RequestError, match="exclude each other"):
        tokenizer.encode_chat(CHAT, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages[0] + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
def test_a_failing_template_is_a_plain_refusal(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(source)
    assert (
        caught.value.status == 400 and caught.value.message == "the model's chat template cannot render these messages"
    )


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_OUTPUT_CHARS", 1000)
    with pytest.raises(RequestError, match="longer than 1000 characters"):
        render("{% for i in range(1000) %}{{ i }} {% endfor %}")


def test_the_templates_own_refusal_is_shown_in_part() -> None:
    with pytest.raises(RequestError, match="refuses this: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError) as caught:
        render("{{ raise_exception('x' * 9999) }}")
    assert caught.value.message.count("x") == MAX_REFUSAL_CHARS


def test_where_the_template_comes_from(smollm2: Path, tmp_path: Path) -> None:
    def prompt(**changes: object) -> str:
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(config | changes))
        built = Tokenizer(tmp_path)
        return built.decode(built.encode_chat(CHAT))

    (tmp_path / "tokenizer.json").symlink_to(smollm2 / "tokenizer.json")
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    with pytest.raises(RequestError, match="no chat template"):
        prompt()
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    assert prompt(chat_template=named) == "yes"
    with pytest.raises(RequestError, match="no chat template"):
        prompt(chat_template=named[:1])
    assert prompt(chat_template="string") == "string"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert prompt(chat_template="string") == "file"
    (tmp_path / "mine").write_text("mine")
    ours = Tokenizer(tmp_path, chat_template=str(tmp_path / "mine"))
    assert ours.decode(ours.encode_chat(CHAT)) == "mine"
    with pytest.raises(StartupError, match="absent"):
        Tokenizer(tmp_path, chat_template=str(tmp_path / "absent"))
