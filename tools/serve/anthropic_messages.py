"""Messages and tools of Anthropic's API, checked field by field.  They become messages of OpenAI's
chat.

What a request adds to the one before it comes last in the text that the model reads, so that all
before it stays cached: the system's messages stay where they are, and tools may be offered late.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Literal, TypeAlias
from xml.sax.saxutils import quoteattr

from pydantic import Field

from slotmoe.jsonfile import Json
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.fields import BY_TYPE, accepted
from slotmoe.tools.serve.formats import described
from slotmoe.tools.serve.requests import DESCRIBED, REPLAYED, TextOr

_IN_PLACE = accepted("a message stays where it is, so that what follows it stays cached")
_UNCITED = accepted("the model cites nothing")


class Cacheable(requests.Model):
    cache_control: Annotated[Json | None, requests.CACHED] = None


class Tool(requests.Function, Cacheable):
    type: Literal["custom"] | None = None
    parameters: Annotated[Json, Field(alias="input_schema")]
    eager_input_streaming: Annotated[bool | None, DESCRIBED] = None
    defer_loading: bool | None = Field(None, description="offered where a message names it")
    input_examples: Annotated[list[Json] | None, DESCRIBED] = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, DESCRIBED] = None


class Offer:
    """The tools of a request.  The model reads of a deferred one where it is first offered."""

    def __init__(self, tools: list[Tool]):
        self._tools = tools
        self._unread = {tool.name: tool for tool in tools if tool.defer_loading}
        self._deferred = frozenset(self._unread)
        self._known = {tool.name for tool in tools}
        self._names = self._known - self._deferred

    def change(self, name: str, added: bool) -> str:
        """What the model reads.  Raises ``RefusedError``."""
        if name not in self._known:
            raise RefusedError(f"messages: {name!r} is none of the tools", "messages")
        (self._names.add if added else self._names.discard)(name)
        tool = self._unread.pop(name, None) if added else None
        text = name if tool is None else json.dumps(described(tool), ensure_ascii=False)
        return f"This function {'can' if added else 'cannot'} be called now: {text}\n"

    def policy(
        self, choice: requests.Model | str | None, parallel: bool | None
    ) -> requests.ToolPolicy | None:
        """After all messages.  Raises ``RefusedError``."""
        offered = [tool for tool in self._tools if tool.name in self._names]
        policy = requests.tool_policy(offered, choice, parallel)
        return policy and replace(policy, functions=self._tools, deferred=self._deferred)


class TextBlock(requests.TextPart):
    citations: Annotated[list[Json] | None, REPLAYED] = None

    def read(self, offer: Offer) -> str:
        """What the model reads of a block.  Raises ``RefusedError``."""
        return self.text


Text: TypeAlias = TextOr[requests.Text, list[TextBlock]]


class PlainSource(requests.Model):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    content: Annotated[requests.Text, Field(alias="data")]


class BlockSource(requests.Model):
    type: Literal["content"]
    content: Text


class Document(Cacheable):
    type: Literal["document"]
    source: Annotated[PlainSource | BlockSource, BY_TYPE]
    title: requests.Text | None = None
    context: requests.Text | None = None
    citations: Annotated[Json | None, _UNCITED] = None

    def read(self, offer: Offer) -> str:
        about = f"title={quoteattr(self.title or '')} context={quoteattr(self.context or '')}"
        return f"\n<document {about}>\n{read(self.source.content, offer)}\n</document>\n"


class SearchResult(Cacheable):
    type: Literal["search_result"]
    source: requests.Text
    title: requests.Text
    content: list[TextBlock]
    citations: Annotated[Json | None, _UNCITED] = None

    def read(self, offer: Offer) -> str:
        about = f"source={quoteattr(self.source)} title={quoteattr(self.title)}"
        return f"\n<search_result {about}>\n{read(self.content, offer)}\n</search_result>\n"


class ToolReference(Cacheable):
    type: Literal["tool_reference"]
    tool_name: requests.Name

    def read(self, offer: Offer) -> str:
        return offer.change(self.tool_name, True)


class ToolName(requests.FunctionName):
    type: Literal["tool_reference"]


class ToolChange(Cacheable):
    type: Literal["tool_addition", "tool_removal"]
    tool: ToolName

    def read(self, offer: Offer) -> str:
        return offer.change(self.tool.name, self.type == "tool_addition")


Quote: TypeAlias = TextBlock | Document | SearchResult
Readable: TypeAlias = Quote | ToolReference | ToolChange


def read(content: str | Iterable[Readable], offer: Offer) -> str:
    """What the model reads.  Raises ``RefusedError``."""
    return content if isinstance(content, str) else "".join(part.read(offer) for part in content)


class ToolUse(Cacheable):
    type: Literal["tool_use"]
    id: requests.CallId
    name: requests.Name
    input: Json
    caller: Annotated[Json | None, REPLAYED] = None
    toolset_name: Annotated[None, REPLAYED] = None

    def call(self) -> requests.ToolCall:
        try:
            arguments = json.dumps(self.input, ensure_ascii=False)
        except RecursionError:
            raise RefusedError("messages: an input is nested too deeply", "messages") from None
        return requests.ToolCall.of(self.id, self.name, arguments)


class ToolResult(Cacheable):
    type: Literal["tool_result"]
    tool_use_id: requests.CallId
    content: TextOr[requests.Text, list[Annotated[Quote | ToolReference, BY_TYPE]]] | None = None
    is_error: bool | None = None
    toolset_name: Annotated[None, REPLAYED] = None

    def message(self, offer: Offer) -> requests.ToolMessage:
        kind = requests.FailedToolMessage if self.is_error else requests.ToolMessage
        text = read(self.content or "", offer)
        return kind.model_construct(role="tool", tool_call_id=self.tool_use_id, content=text)


class Thinking(requests.Model):
    type: Literal["thinking"]
    thinking: requests.Text
    signature: requests.Text | None = None


class RedactedThinking(requests.Model):
    type: Literal["redacted_thinking"]
    data: Annotated[requests.Text, REPLAYED]


Block: TypeAlias = Annotated[Quote | ToolUse | ToolResult | Thinking | RedactedThinking, BY_TYPE]


class Turn(requests.Model):
    role: Literal["user", "assistant"]
    content: TextOr[requests.Text, list[Block]]

    def messages(self, offer: Offer) -> list[requests.ChatMessage]:
        """Each result of a call, then the text and the calls.  Raises ``RefusedError``."""
        blocks: list[Block] = [TextBlock.model_construct(text=self.content)]
        if isinstance(self.content, list):
            blocks = self.content
        thoughts = [block.thinking for block in blocks if isinstance(block, Thinking)]
        calls = [block.call() for block in blocks if isinstance(block, ToolUse)]
        results = [block.message(offer) for block in blocks if isinstance(block, ToolResult)]
        if (calls and self.role == "user") or (results and self.role == "assistant"):
            raise RefusedError(f"a message of the {self.role} can't hold such a block", "messages")
        text = read((block for block in blocks if isinstance(block, Readable)), offer)
        about: Json = {"tool_calls": calls, "reasoning_content": "".join(thoughts)}
        message = requests.said(self.role, text, **about)
        return [*results, message] if text or calls or not results else [*results]


class SystemTurn(requests.Model):
    role: Literal["system"]
    content: TextOr[requests.Text, list[Annotated[TextBlock | ToolChange, BY_TYPE]]]
    clear_at: Annotated[Literal["next_user_message", "never"] | None, _IN_PLACE] = None
    output_config: Annotated[Json | None, accepted("that of the request is followed")] = None

    def messages(self, offer: Offer) -> list[requests.ChatMessage]:
        """Raises ``RefusedError``."""
        text, kind = read(self.content, offer), requests.InsertedMessage
        return [kind.model_construct(role="system", content=text)] if text else []


AnthropicMessage: TypeAlias = Annotated[Turn | SystemTurn, Field(discriminator="role")]
