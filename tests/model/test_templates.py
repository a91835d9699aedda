"""Chat templates in the words of many families write what transformers writes; our own what public
tests of the formats expect, character for character: ``chats/NAME.json`` has the conversation and
its source, ``chats/NAME.txt`` the text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import files_in
from slotmoe.model.chat import render_chat
from slotmoe.model.config import read_config
from slotmoe.model.families import FAMILIES
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.model_source import open_tokenizer
from tests.support import templates
from tests.support.served import deepseek_files
from tests.support.tiny import SAMPLE

PUBLIC = Path(__file__).with_name("chats")
TEMPLATES = json.loads((PUBLIC.parents[1] / "data" / "templates.json").read_text(encoding="utf-8"))
V32, V4 = "deepseek_v32", "deepseek_v4"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"  # noqa: RUF001
ASKED = f"{USER}Hello{ASSISTANT}"
HELLO, YES = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes, "}
BRIEF, DEVELOPER = ({"role": role, "content": "Be brief."} for role in ("system", "developer"))
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
FORMAT += json.dumps(SCHEMA)
OPEN, SHUT = "<think>", "</think>"

CASES = [  # the template, what is asked, and the text
    *((V4, {"effort": effort}, ASKED + OPEN) for effort in (None, "high")),
    (V4, {"effort": "none"}, ASKED + SHUT),
    (V32, {}, ASKED + SHUT),
    (V32, {"effort": "max"}, ASKED + OPEN),
    # A schema stands in the first system message, or in one of its own.
    *((kind, {"schema": SCHEMA}, FORMAT + ASKED + end) for kind, end in ((V4, OPEN), (V32, SHUT))),
    (V4, {"schema": SCHEMA, "messages": [BRIEF, HELLO]}, f"Be brief.{FORMAT}{ASKED}{OPEN}"),
    (V4, {"messages": [HELLO, YES], "begun": True}, f"{ASKED}{OPEN}{SHUT}Yes, "),
    (V32, {"messages": [HELLO, YES], "begun": True}, f"{ASKED}{SHUT}Yes, "),
    # Developers of earlier turns are dropped with the reasoning.
    (V4, {"messages": [DEVELOPER, HELLO]}, ASKED + OPEN),
]

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def tokenizer(processes, oracle, tmp_path_factory):
    return templates.tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", templates.CHATS)
def test_transformers_writes_the_same(chat, template, tokenizer):
    theirs, ours = templates.both(TEMPLATES[template], tokenizer, **templates.CHATS[chat])
    assert theirs == ours
    assert theirs is not None or template in ("hidden", "absent", "raises") or chat == "begun"


@pytest.fixture(scope="module")
def tokenizers(processes, tmp_path_factory):
    folder = deepseek_files(tmp_path_factory.mktemp("tokenizer"))
    own = {kind: FAMILIES[kind].own_template for kind in (V32, V4)}
    return {kind: Tokenizer(folder, 0, own_template=template) for kind, template in own.items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in PUBLIC.glob("*.json")))
def test_public_chats(name, tokenizers):
    given = json.loads((PUBLIC / f"{name}.json").read_text(encoding="utf-8"))
    expected = (PUBLIC / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")
    tokenizer = tokenizers[V32 if name.startswith("v3.2") else V4]
    written = render_chat(tokenizer, given["messages"], given.get("tools"), effort=given["effort"])
    assert written == expected


def test_what_they_write(tokenizers):
    for kind, given, expected in CASES:
        written = render_chat(tokenizers[kind], **{"messages": [HELLO], **given})
        assert written == BOS + expected, given
        assert written.count(FORMAT) == ("schema" in given)


def test_a_schema_nested_too_deeply_is_refused(tokenizers):
    deep = dict(SCHEMA)
    for _ in range(200_000):  # more than json holds in any version of Python
        deep = {"items": deep}
    for given in ({"schema": deep}, {"tools": [{"function": deep}]}):
        with pytest.raises(ConfigError, match="nested too deeply"):
            render_chat(tokenizers[V4], [HELLO], **given)


def test_templates_of_the_model_itself(tmp_path):
    """They go before ours; a text goes on where they end the last message, as with transformers'
    continue_final_message; and they get the variables of a request."""
    folder = deepseek_files(tmp_path)

    def written(template, *given, **named):
        (folder / "chat_template.jinja").write_text(template)
        own = FAMILIES[V4].own_template
        return render_chat(Tokenizer(folder, 0, own_template=own), *given, **named)

    assert written("its own", [HELLO]) == "its own"
    each = "{% for m in messages %}<|im_start|>{{ CONTENT }}<|im_end|>\n{% endfor %}END"
    start, begun = "<|im_start|>Hello<|im_end|>\n<|im_start|>Yes,", {"begun": True}
    assert written(each.replace("CONTENT", "m.content"), [HELLO, YES], **begun) == f"{start} "
    assert written(each.replace("CONTENT", "m.content.strip()"), [HELLO, YES], **begun) == start
    with pytest.raises(ConfigError, match="leaves the last message out"):
        written("{{ messages[0].content }}", [HELLO, YES], **begun)
    named = "{{ enable_thinking }}{{ lang }}{{ eos_token }}"
    assert written(named, [HELLO], effort="high") == f"True{EOS}"
    extra = {"enable_thinking": False, "lang": "de", "eos_token": "."}
    assert written(named, [HELLO], effort="high", extra=extra) == "Falsede."
    with pytest.raises(ConfigError, match="messages is not the template's to choose"):
        written(named, [HELLO], extra={"messages": []})


def test_a_model_without_a_template_gets_ours(tokenizers, tmp_path):
    folder, config = deepseek_files(tmp_path), read_config(SAMPLE / "config.json")
    assert FAMILIES["deepseek_v3"].own_template is None
    for kind in (V4, V32, "deepseek_v3"):
        named = replace(config, family=FAMILIES[kind], bos_token_id=tokenizers[V4].token_id(BOS))
        opened = open_tokenizer(named, files_in(folder), folder)
        if kind not in tokenizers:
            with pytest.raises(ConfigError, match="no chat_template"):
                render_chat(opened, [HELLO])
        else:
            assert render_chat(opened, [HELLO]) == render_chat(tokenizers[kind], [HELLO])
            ids = opened.encode(render_chat(opened, [HELLO]))
            assert [ids[at] for at in (1, -2)] == [opened.token_id(m) for m in (USER, ASSISTANT)]
