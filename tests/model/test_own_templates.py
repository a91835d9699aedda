"""Our own chat templates write what public tests of the formats expect, character for character:
``chats/NAME.json`` has the conversation and its source, ``chats/NAME.txt`` the text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import files_in
from slotmoe.model.config import read_config
from slotmoe.model.families import FAMILIES
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.model_source import open_tokenizer
from tests.support.served import deepseek_files
from tests.support.tiny import SAMPLE

CHATS = Path(__file__).with_name("chats")
V32, V4 = "deepseek_v32", "deepseek_v4"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"  # noqa: RUF001
HELLO = {"role": "user", "content": "Hello"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
FORMAT += json.dumps(SCHEMA)
# As DeepSeek's encoders of V4-Flash and V4-Pro of April 2026 have it for "max".
ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def tokenizers(processes, tmp_path_factory):
    folder = deepseek_files(tmp_path_factory.mktemp("tokenizer"))
    own = {kind: FAMILIES[kind].own_template for kind in (V32, V4)}
    return {kind: Tokenizer(folder, 0, own_template=template) for kind, template in own.items()}


@pytest.fixture
def v4(tokenizers):
    return tokenizers[V4]


@pytest.fixture
def v32(tokenizers):
    return tokenizers[V32]


@pytest.mark.parametrize("name", sorted(path.stem for path in CHATS.glob("*.json")))
def test_public_chats(name, tokenizers):
    given = json.loads((CHATS / f"{name}.json").read_text(encoding="utf-8"))
    expected = (CHATS / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")
    tokenizer = tokenizers[V32 if name.startswith("v3.2") else V4]
    written = tokenizer.chat(given["messages"], given.get("tools"), effort=given["effort"])
    assert written == expected


def test_efforts(v4, v32):
    asked = f"{USER}Hello{ASSISTANT}"
    prefixes = {None: "", "none": "", "low": "", "high": "", "xhigh": ABSOLUTE, "max": ABSOLUTE}
    for effort, prefix in prefixes.items():
        mark = "</think>" if effort == "none" else "<think>"
        assert v4.chat([HELLO], effort=effort) == f"{BOS}{prefix}{asked}{mark}"
    for effort, mark in {None: "</think>", "none": "</think>", "max": "<think>"}.items():
        assert v32.chat([HELLO], effort=effort) == f"{BOS}{asked}{mark}"


def test_an_answer_has_reasoning_where_the_prompt_has_begun_it(v4, v32):
    begun, over = (one.splitter(one.encode(one.chat([HELLO]))) for one in (v4, v32))
    assert begun.feed("Hm</think>Yes") == ("Hm", "Yes")
    assert over.feed("<think>Yes") == ("", "<think>Yes")


def test_a_schema_is_told_in_the_first_system_message(v4, v32):
    system = {"role": "system", "content": "Be brief."}
    for tokenizer, mark in ((v4, "<think>"), (v32, "</think>")):
        end = f"{USER}Hello{ASSISTANT}{mark}"
        assert tokenizer.chat([HELLO], schema=SCHEMA) == f"{BOS}{FORMAT}{end}"
        asked = tokenizer.chat([system, HELLO, system], schema=SCHEMA)
        assert asked.startswith(f"{BOS}Be brief.{FORMAT}{USER}Hello")
        assert asked.count(FORMAT) == 1


def test_a_schema_nested_too_deeply_is_refused(v4):
    deep = dict(SCHEMA)
    for _ in range(200_000):  # more than json holds in any version of Python
        deep = {"items": deep}
    for given in ({"schema": deep}, {"tools": [{"function": deep}]}):
        with pytest.raises(ConfigError, match="nested too deeply"):
            v4.chat([HELLO], **given)


def test_v4_writes_results_and_what_the_user_says_then_as_one_message(v4):
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [
        HELLO,
        {"role": "assistant", "content": "So.", "reasoning_content": "Hm", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "user", "content": "Go on"},
        {"role": "user", "content": "now"},
    ]
    said = (
        'So.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'  # noqa: RUF001
        f"</｜DSML｜tool_calls>{EOS}"  # noqa: RUF001
    )
    results = "<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>\n\nGo on\n\nnow"
    end = f"{USER}{results}{ASSISTANT}<think>"
    # Without tools the reasoning of earlier turns is dropped, with tools it is kept.
    dropped = f"{BOS}{USER}Hello{ASSISTANT}</think>{said}{end}"
    assert v4.chat(messages) == dropped
    tools = [{"function": {"name": "f"}}]
    assert v4.chat(messages, tools).endswith(f"{USER}Hello{ASSISTANT}<think>Hm</think>{said}{end}")
    assert v4.chat(messages, effort="none") == dropped.replace("<think>", "</think>")


def test_v4_answers_also_after_system_messages_and_reminders(v4):
    # The encoder has no beginning of an answer here, or one before the reminder.
    for role, mark in {"system": "", "latest_reminder": "<｜latest_reminder｜>"}.items():  # noqa: RUF001
        written = v4.chat([HELLO, {"role": role, "content": "Now."}])
        assert written == f"{BOS}{USER}Hello{mark}Now.{ASSISTANT}<think>"


def test_an_answer_that_has_begun_goes_on(v4, v32):
    begun = [HELLO, {"role": "assistant", "content": "Yes, "}]
    for tokenizer, effort, mark in (
        (v4, None, "<think></think>"), (v4, "none", "</think>"), (v32, None, "</think>"),
    ):  # fmt: skip
        written = tokenizer.chat(begun, begun=True, effort=effort)
        assert written == f"{BOS}{USER}Hello{ASSISTANT}{mark}Yes, "


def test_an_answer_goes_on_where_the_template_ends_the_last_message(tmp_path):
    """As transformers' continue_final_message: whatever the template writes behind it."""
    messages = [HELLO, {"role": "assistant", "content": "Yes, "}]
    folder = deepseek_files(tmp_path)

    def begun(template: str) -> str:
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer(folder, 0).chat(messages, begun=True)

    each = "{% for m in messages %}<|im_start|>{{ CONTENT }}<|im_end|>\n{% endfor %}END"
    start = "<|im_start|>Hello<|im_end|>\n<|im_start|>Yes,"
    assert begun(each.replace("CONTENT", "m.content")) == f"{start} "
    assert begun(each.replace("CONTENT", "m.content.strip()")) == start
    with pytest.raises(ConfigError, match="leaves the last message out"):
        begun("{{ messages[0].content }}")


def test_variables_of_a_request(tmp_path):
    folder = deepseek_files(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ enable_thinking }}{{ lang }}{{ eos_token }}")
    tokenizer = Tokenizer(folder, 0)
    assert tokenizer.chat([HELLO], effort="high") == f"True{EOS}"
    extra = {"enable_thinking": False, "lang": "de", "eos_token": "."}
    assert tokenizer.chat([HELLO], effort="high", extra=extra) == "Falsede."
    with pytest.raises(ConfigError, match="messages is not the template's to choose"):
        tokenizer.chat([HELLO], extra={"messages": []})


def test_developers_of_earlier_turns_are_dropped_with_the_reasoning(v4, v32):
    developer = {"role": "developer", "content": "Be brief."}
    assert v4.chat([developer, HELLO]) == f"{BOS}{USER}Hello{ASSISTANT}<think>"
    kept = v4.chat([developer, HELLO], effort="none")
    assert kept == f"{BOS}{USER}Be brief.{USER}Hello{ASSISTANT}</think>"
    assert v32.chat([developer, HELLO], effort="high") == f"{BOS}{USER}Hello{ASSISTANT}<think>"


def test_a_model_without_a_template_gets_ours(v4, v32, tmp_path):
    folder, config = deepseek_files(tmp_path), read_config(SAMPLE / "config.json")
    for kind, tokenizer in ((V4, v4), (V32, v32), ("deepseek_v3", None)):
        named = replace(config, family=FAMILIES[kind], bos_token_id=v4.token_id(BOS))
        opened = open_tokenizer(named, files_in(folder), folder)
        if tokenizer is None:
            with pytest.raises(ConfigError, match="no chat_template"):
                opened.chat([HELLO])
        else:
            assert opened.chat([HELLO]) == tokenizer.chat([HELLO])
            ids = opened.encode(opened.chat([HELLO]))
            assert ids[:2] == [opened.token_id(mark) for mark in (BOS, USER)]
            assert ids[-2] == opened.token_id(ASSISTANT)


def test_a_template_of_the_model_wins(v4, tmp_path):
    folder = deepseek_files(tmp_path)
    (folder / "chat_template.jinja").write_text("its own")
    own = FAMILIES[V4].own_template
    assert Tokenizer(folder, 0, own_template=own).chat([HELLO]) == "its own"
    assert FAMILIES["deepseek_v3"].own_template is None
