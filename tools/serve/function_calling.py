"""A conversation with tool calls and reasoning as the text that a model was trained on."""

import re
from dataclasses import replace
from functools import cached_property
from typing import TypeAlias

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.model.chat import render_chat
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve import formats, requests
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import parse_arguments
from slotmoe.tools.serve.requests import Call, Message

_UNCALLED = "a result answers no call of the message before it"
Turn: TypeAlias = tuple[Message, list[Message]]  # a message, and results of its calls


class Dialect:
    """How a model was trained to call functions, by its tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.format = tokenizer, formats.format_of(tokenizer)
        self.is_native = self.format is not formats.PLAIN
        template = tokenizer.template or ""
        self._reminds = requests.REMINDER in template
        self._template_has_tools = self.is_native and bool(re.search(r"\btools\b", template))
        # Tokens that appear in the text of an answer with tool calls.
        ids = {tokenizer.token_id(mark): mark for mark in self.format.marks}
        self.shown = {id_: mark for id_, mark in ids.items() if id_ is not None}

    def prompt(self, chat: requests.Conversation) -> str:
        """``chat`` as text for the model.  Raises ``RefusedError``, ``ConfigError``."""
        messages, policy = chat.messages, chat.policy
        if any(m.role == requests.REMINDER for m in messages) and not self._reminds:
            problem = f"this model has no role {requests.REMINDER!r}"
            raise RefusedError(f"messages: {problem}", "messages")
        if any(m.inserted for m in messages) and not self._inserts:
            messages = _told_by_user(messages)
        turns, tools = with_results(messages), None
        functions = policy.functions if policy is not None else ()
        if self.format.structured:
            written = self._structured(_apart(turns) if self.format.single else turns)
        else:
            written = self._native(turns) if self.is_native else self._plain(turns)
        if self._template_has_tools:
            tools = [{"type": "function", "function": formats.described(f)} for f in functions]
        elif functions:  # at the end of the system message
            system = "You are a helpful Assistant." if self.is_native else ""
            if written[0]["role"] == "system":
                system = written.pop(0)["content"]
            about = [system, formats.describe(self.format, functions)]
            written.insert(0, {"role": "system", "content": "\n\n".join(filter(None, about))})
        goes_on = self.is_native and not self.format.structured and bool(turns[-1][1])
        schema = chat.wanted.rule if chat.wanted and chat.wanted.kind == "json" else None
        how = chat.continues or goes_on, chat.effort, schema, chat.extra
        return render_chat(self._tokenizer, written, tools, *how)

    @cached_property
    def _inserts(self) -> bool:
        """Whether the template leaves a message of the system's in the midst where it is."""
        roles = "system user system assistant user system".split()
        said = [{"role": role, "content": f"<{number}>"} for number, role in enumerate(roles)]
        try:
            text = render_chat(self._tokenizer, said)
        except ConfigError:
            return False
        return re.findall(r"<\d>", text) == [message["content"] for message in said]

    def _structured(self, turns: list[Turn]) -> list[Json]:
        """For a template that writes calls, results and reasoning itself."""
        written, count = list[Json](), 0
        for message, results in turns:
            about: Json = {"role": message.role, "content": message.text}
            if message.thoughts:
                about["reasoning_content"] = message.thoughts
            ids, calls = list[str](), list[Json]()
            for call in message.calls:
                name, arguments = call.name, call.arguments or "{}"
                ids.append(f"functions.{name}:{count}" if self.format.numbered_ids else call.id)
                given = parse_arguments(arguments) if self.format.object_arguments else arguments
                if not isinstance(given, dict) and self.format.object_arguments:
                    problem = f"arguments {arguments!r:.80} are no JSON object"
                    raise RefusedError(f"messages: {problem}", "messages")
                function = {"name": name, "arguments": given}
                calls.append({"id": ids[-1], "type": "function", "function": function})
                count += 1
            written.append(about | ({"tool_calls": calls} if calls else {}))
            for id_, call, result in zip(ids, message.calls, results, strict=True):
                about = {"role": "tool", "tool_call_id": id_, "name": call.name}
                written.append({**about, "content": result.text})
        return written

    def _plain(self, turns: list[Turn]) -> list[Json]:
        """For a template that knows no functions: results are in a message of the user."""
        written = list[Json]()
        for message, results in turns:
            text = message.text + ("\n" if message.text and message.calls else "")
            text += self.format.write(message.calls)
            written.append({"role": message.role, "content": text})
            if message.thoughts:
                written[-1]["reasoning_content"] = message.thoughts
            responses = []
            for call, result in zip(message.calls, results, strict=True):
                error = ' error="true"' if result.failed else ""
                tag = f'tool_response name="{call.name}"{error}'
                responses.append(f"<{tag}>\n{result.text}\n</tool_response>")
            if responses:
                written.append({"role": "user", "content": "\n".join(responses)})
        return written

    def _native(self, turns: list[Turn]) -> list[Json]:
        """Calls, results and what follows them as one message of the assistant: DeepSeek-V2.5's
        template itself loses text beside calls and parts of calls and results."""
        written, goes_on = list[Json](), False
        begin, before, behind, end = self.format.outputs
        for message, results in turns:
            text = message.text + self.format.write(message.calls)
            if results:
                texts = [f"{before}{result.text}{behind}" for result in results]
                text += self._tokenizer.eos_token + begin + "\n".join(texts) + end
            if goes_on and message.role == "assistant":
                written[-1]["content"] += text
            else:
                written.append({"role": message.role, "content": text})
            goes_on = bool(results)
        return written


def _apart(turns: list[Turn]) -> list[Turn]:
    """A message for each call, and what was said before the first among its reasoning."""
    apart = list[Turn]()
    for message, results in turns:
        thoughts = "\n\n".join(filter(None, (message.thoughts, message.text)))
        for call, result in zip(message.calls, results, strict=True):
            alone = replace(message, text="", thoughts=thoughts, calls=[call])
            apart.append((alone, [result]))
            thoughts = ""
        if not message.calls:
            apart.append((message, results))
    return apart


def _told_by_user(messages: list[Message]) -> list[Message]:
    """What is inserted ends the user's message or the result before it, or begins the user's."""
    told, after = list[Message](), False
    for message in messages:
        inserted = message.inserted
        if inserted:
            message = Message("user", f"<system>\n{message.text}\n</system>")
        joins = ("user", "tool") if inserted else ("user",) if after else ()
        if message.role == "user" and told and told[-1].role in joins:
            last = told.pop()
            message = replace(last, text=f"{last.text}\n\n{message.text}")
        told.append(message)
        after = inserted
    return told


def with_results(messages: list[Message]) -> list[Turn]:
    """Each message with its calls' results in order.  Raises ``RefusedError`` for others."""
    turns: list[Turn] = []
    for message in messages:
        if message.role != "tool":
            turns.append((message, []))
        elif turns:
            turns[-1][1].append(message)
        else:
            raise RefusedError(f"messages: {_UNCALLED}", "messages")
    return [(message, _in_order(message.calls, results)) for message, results in turns]


def _in_order(calls: list[Call], results: list[Message]) -> list[Message]:
    ids, answered = [call.id for call in calls], [result.call_id for result in results]
    if sorted(ids) != sorted(answered):
        missing = next((id_ for id_ in ids if id_ not in answered), None)
        problem = _UNCALLED if missing is None else f"call {missing!r:.80} has no result"
        raise RefusedError(f"messages: {problem}", "messages")
    names = {call.id: call.name for call in calls}
    for result in results:
        if result.name not in (None, names[result.call_id]):
            problem = f"the result for {result.call_id!r:.80} has the name of another function"
            raise RefusedError(f"messages: {problem}", "messages")
    return sorted(results, key=lambda result: ids.index(result.call_id))
