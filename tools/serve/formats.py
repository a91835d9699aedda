"""The formats in which models write tool calls: a table.

A row is used where the tokenizer has a token for each of its ``marks`` and the chat template has
``spelled`` and not ``unspelled``.  Every other model gets ``PLAIN`` and a description in words.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from slotmoe.jsonfile import Json
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.requests import Call, Function

INDEX = "{index}"


@dataclass(frozen=True)
class CallFormat:
    """Tool calls as text: ``opening``, ``head NAME middle ARGUMENTS tail`` of all calls joined by
    ``joint``, ``closing``.  In ``middle`` may be the ``INDEX`` of the call in the conversation.

    Arguments are JSON, or as ``tagged`` says what is before, between and behind the key and the
    value of each: text as it is, other values as JSON.  Behind the key may be of which of these two
    ``kinds`` the value is, else the schema decides.  A ``gap`` is around each argument, and a
    ``lead`` between text and calls, which belongs to neither.  A template that is ``structured``
    gets calls and results as such, with ``object_arguments`` or their JSON.
    """

    opening: str
    head: str
    middle: str
    tail: str
    joint: str
    closing: str
    marks: tuple[str, ...] = ()
    spelled: tuple[str, ...] = ()
    unspelled: tuple[str, ...] = ()
    tagged: tuple[str, str, str] | None = None
    kinds: tuple[str, str] | None = None
    gap: str = ""
    lead: str = ""
    structured: bool = True
    object_arguments: bool = False
    numbered_ids: bool = False  # a call's id is spelled for the model

    def write(self, calls: list[Call]) -> str:
        """``calls`` as the model writes them, of a format with JSON and without an index."""
        texts = [
            self.head + call.name + self.middle + (call.arguments or "{}") + self.tail
            for call in calls
        ]
        return self.opening + self.joint.join(texts) + self.closing if texts else ""


PLAIN = CallFormat(
    "<tool_call>", '{"name": "', '", "arguments": ', "}</tool_call>", "\n<tool_call>", "",
    structured=False,
)  # fmt: skip
_NAMES = "calls_begin call_begin sep call_end calls_end "
_NAMES += "outputs_begin output_begin output_end outputs_end"
_CALLS, _CALL, _SEP, _END_CALL, _END_CALLS, OUTPUTS, OUTPUT, END_OUTPUT, END_OUTPUTS = (
    f"<\uff5ctool\u2581{name}\uff5c>" for name in _NAMES.replace("_", "\u2581").split()
)
_DEEPSEEK = (_CALLS, _CALL, _SEP, _END_CALL, _END_CALLS)
_NAMES = "calls_section_begin call_begin call_argument_begin call_end calls_section_end"
_KIMI = tuple(f"<|tool_{name}|>" for name in _NAMES.split())
_GLM = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
# As their templates write them; the oldest also as its model card shows it:
# https://huggingface.co/deepseek-ai/DeepSeek-V2.5-1210, "Function calling".
DEEPSEEK_V3_1 = CallFormat(
    _CALLS, _CALL, _SEP, _END_CALL, "", _END_CALLS,
    marks=_DEEPSEEK, spelled=(_CALL, _SEP), unspelled=("```json",),
)  # fmt: skip
NATIVE = CallFormat(
    _CALLS, f"{_CALL}function{_SEP}", "\n```json\n", f"\n```{_END_CALL}", "\n", _END_CALLS,
    marks=_DEEPSEEK, spelled=(_CALLS,), structured=False,
)  # fmt: skip
KIMI = CallFormat(
    _KIMI[0], _KIMI[1] + "functions.", f":{INDEX}{_KIMI[2]}", _KIMI[3], "", _KIMI[4],
    marks=_KIMI, spelled=(_KIMI[1],), numbered_ids=True,
)  # fmt: skip
GLM = CallFormat(
    _GLM[0], "", "", _GLM[1], _GLM[0], "",
    marks=_GLM, spelled=(_GLM[2],), object_arguments=True,
    tagged=(_GLM[2], _GLM[3] + _GLM[4], _GLM[5]),
)  # fmt: skip
MISTRAL = CallFormat(
    "[TOOL_CALLS]", "", "[ARGS]", "", "[TOOL_CALLS]", "",
    marks=("[TOOL_CALLS]", "[ARGS]"), spelled=("[TOOL_CALLS]", "[ARGS]"),
)  # fmt: skip
_DSML = "\uff5cDSML\uff5c"


def _dsml(block: str) -> CallFormat:
    """As the folder ``encoding`` of DeepSeek-V3.2 and V4 has it; they differ in the ``block``."""
    return CallFormat(
        f"<{_DSML}{block}>", f'\n<{_DSML}invoke name="', '">', f"</{_DSML}invoke>", "",
        f"\n</{_DSML}{block}>",
        marks=(_DSML,), spelled=(_DSML, block), object_arguments=True,
        tagged=(f'<{_DSML}parameter name="', '" string="', f"</{_DSML}parameter>"),
        kinds=('true">', 'false">'), gap="\n", lead="\n\n",
    )  # fmt: skip


DEEPSEEK_V3_2, DEEPSEEK_V4 = _dsml("function_calls"), _dsml("tool_calls")
_FORMATS = (DEEPSEEK_V3_1, NATIVE, KIMI, GLM, MISTRAL, DEEPSEEK_V3_2, DEEPSEEK_V4)


def format_of(tokenizer: Tokenizer) -> CallFormat:
    """The format that a model was trained on, as far as its tokenizer and template show it."""
    template = tokenizer.template or ""
    for row in _FORMATS:
        is_spelled = all(text in template for text in row.spelled)
        is_other = any(text in template for text in row.unspelled)
        has_tokens = all(tokenizer.token_id(mark) is not None for mark in row.marks)
        if is_spelled and has_tokens and not is_other:
            return row
    return PLAIN


def is_text(schema: object) -> bool:
    """Whether a tagged argument of this schema is written as it is, without quotes."""
    if not isinstance(schema, dict):
        return False
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"


def text_arguments(function: Function) -> frozenset[str]:
    """Keys of the tagged arguments that are text."""
    properties = function.schema_of_arguments.get("properties", {})
    return frozenset(key for key, schema in properties.items() if is_text(schema))


def described(function: Function) -> Json:
    about = {"name": function.name, "description": function.description or ""}
    return {**about, "parameters": function.schema_of_arguments}


_PLAIN_HINT = (
    '\n\nTo call one, write <tool_call>{"name": "NAME", "arguments": {...}}</tool_call>, where the '
    "arguments follow the function's parameters, a JSON schema. To call several, write each on a "
    "line of its own. Write nothing after calls; their results follow in <tool_response>. If no "
    "function is needed, answer in plain text."
)
_HINT = (
    "\n\nTo call functions, write exactly this, with JSON that follows the parameters:\n"
    f"{_CALLS}{_CALL}NAME{_SEP}ARGUMENTS{_END_CALL}{_END_CALLS}"
)


def describe(call_format: CallFormat, functions: Sequence[Function]) -> str:
    """Functions for a model whose template does not describe them."""
    is_plain = call_format is PLAIN
    indent, texts = None if is_plain else 4, list[str]()
    for function in functions:
        text = json.dumps(described(function), ensure_ascii=False, indent=indent)
        texts.append(text if is_plain else f"- `{function.name}`:\n```json\n{text}\n```")
    if is_plain:
        return "You can call these functions:\n" + "\n".join(texts) + _PLAIN_HINT
    heading = "## Tools\n\n### Function\n\nYou have the following functions available:\n\n"
    return heading + "\n".join(texts) + (_HINT if call_format is DEEPSEEK_V3_1 else "")
