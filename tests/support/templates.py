"""Chat templates beside transformers' own rendering of them."""

import json

from slotmoe.errors import ConfigError
from slotmoe.model.chat import render_chat
from slotmoe.model.tokenizer import Tokenizer
from tests.support.tiny import SAMPLE

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SPECIAL |= {"image_token": "<image>"}
PLACE = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "<b>"]}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PLACE}}]
CALL = {"function": {"name": "weather", "arguments": {"zone": None, "city": "Köln", "days": 1.0}}}
ASKED = {"role": "user", "content": "Wetter? \n"}
CHATS = {
    "one": {"messages": [ASKED]},
    "tools": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "Hm"},
            {"role": "tool", "content": '{"t": "12 °C"}'},
            {"role": "assistant", "content": "12 °C", "reasoning_content": "So"},
            {"role": "user", "content": [{"type": "text", "text": "And"}]},
        ],
        "tools": TOOLS,
    },
    "begun": {"messages": [ASKED, {"role": "assistant", "content": " It is "}], "begun": True},
    "variables": {
        "messages": [ASKED],
        "extra": {"enable_thinking": False, "documents": [{"title": "a", "text": "b"}]},
    },
}


def tokenizer_in(folder):
    """The sample's with more special tokens."""
    (folder / "tokenizer.json").write_bytes((SAMPLE / "tokenizer.json").read_bytes())
    settings = SPECIAL | {"sep_token": None, "chat_template": "", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder, 0)


def both(template, tokenizer, messages, tools=None, begun=False, extra=None):
    """What transformers writes and what we write, each None where it refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = [{k: v for k, v in m.items() if v is not None} for m in messages]
    how = {"continue_final_message": begun, "add_generation_prompt": not begun, "tools": tools}
    try:
        named = SPECIAL | (extra or {})
        (theirs,), _ = render_jinja_template([plain], chat_template=template, **how, **named)
    except Exception:
        theirs = None
    tokenizer.template = template
    try:
        return theirs, render_chat(tokenizer, messages, tools, begun, extra=extra)
    except ConfigError:
        return theirs, None
