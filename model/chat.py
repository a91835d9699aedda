"""Messages through a model's chat template, which comes from a stranger: it runs in jinja2's
immutable sandbox inside a child process."""

import json
from collections.abc import Mapping, Sequence

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.model.child import TEMPLATE
from slotmoe.model.tokenizer import Tokenizer

_REASONING = ("reasoning_content", "thinking", "reasoning")
_GIVEN = {"messages", "tools"}  # which no other variables replace
_HERE = "\ue000 "  # ends a text that goes on; a template that keeps whitespace keeps the space


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    tools: list[Json] | None = None,
    begun: bool = False,
    effort: str | None = None,
    schema: Json | None = None,
    extra: Json | None = None,
) -> str:
    """``messages`` through the chat template of ``tokenizer``, ready for the assistant's answer,
    which goes on with the text of the last message if that is ``begun``; ``tools`` as templates
    expect them; an ``effort`` of "none" switches reasoning off where the template can, and any
    other on; the answer follows the JSON ``schema``, if there is one.  ``extra`` are further
    variables of the template, and go before others (``chat_template_kwargs``).  Raises
    ``ConfigError`` if there is no template, if it fails or exceeds its limits."""
    if tokenizer.template is None:
        problem = "tokenizer_config.json: has no chat_template, so this is not a chat model"
        other = "or continue text with 'slotmoe run MODEL PROMPT', without --chat"
        raise ConfigError(f"{problem}: take its Chat or Instruct version, {other}")
    if taken := _GIVEN & {*(extra or ())}:
        problem = f"chat_template_kwargs: {min(taken)} is not the template's to choose"
        raise ConfigError(f"{problem}; give it as a field of the request")
    chat = [_message(message) for message in messages]
    if begun:
        chat[-1]["content"] = f"{chat[-1].get('content', '')}{_HERE}"
    variables = {"messages": chat, "add_generation_prompt": not begun, **tokenizer.spellings}
    variables |= {"tools": tools or None, "documents": None}
    if effort is not None:  # the words of DeepSeek and Kimi, GLM, Mistral, our own, gpt-oss
        thinking = effort != "none"
        variables |= {"thinking": thinking, "enable_thinking": thinking, "effort": effort}
        variables["reasoning_effort"] = "high" if thinking else "none"
        if tokenizer.reasoning is not None and tokenizer.reasoning.header:  # which always reasons
            low = {"none": "low", "minimal": "low", "low": "low", "medium": "medium"}
            variables["reasoning_effort"] = low.get(effort, "high")
    if schema is not None:
        variables["response_format"] = schema
    request = {"template": tokenizer.template, "variables": variables | (extra or {})}
    try:
        data = json.dumps(request).encode()
    except RecursionError:
        raise ConfigError("a schema is nested too deeply for the chat template") from None
    text = TEMPLATE.run(data, "chat_template").decode()
    if not begun:
        return text
    before, mark, rest = text.rpartition(_HERE[0])
    if not mark:
        problem = "chat_template: leaves the last message out, so no answer can go on with it"
        raise ConfigError(f"{problem}; end with a message of the user")
    return before if rest.startswith(_HERE[1]) else before.rstrip()


def _message(given: Mapping[str, object]) -> Json:
    """What of a message has a value, with its reasoning under the names that templates have."""
    message = {name: value for name, value in given.items() if value is not None}
    thoughts = [message[name] for name in _REASONING if name in message]
    if thoughts:
        message = {"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]}
    return message
