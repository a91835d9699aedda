"""OpenAI's responses: ``/v1/responses``.  Its items become messages of a conversation; its events
tell what an answer's updates add to items.  Nothing is stored.

The model is offered functions: a tool that takes text is one of one argument, and one of a
namespace has both names.  Tools that only OpenAI runs are left out, which the answer's header says.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field
from starlette.responses import JSONResponse

from slotmoe.jsonfile import Json
from slotmoe.model.generate import Token
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.answers import Answers, EventStream, Update, chat_answers, event
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import ContentDelta, parse_arguments
from slotmoe.tools.serve.requests import Call, Count, Label, Message, TextOr, text_of
from slotmoe.tools.serve.service import Serving

PATH = "/v1/responses"
router = APIRouter()
_STATELESS = "nothing is stored here; send the whole conversation as input"
_REPEATED = "the response repeats it"
_SCORES = "message.output_text.logprobs"
_COMPACTED = "slotmoe: "  # what is behind it is a summary that this server wrote
_BEFORE = "A summary of what was before, in place of it:\n"
_SUMMARIZE = (
    "Summarize this conversation for a model that goes on with it and reads nothing but your "
    "summary: what is wanted, what was done and found, what is left. Write the summary alone."
)
_USER: Json = {"type": "message", "role": "user", "status": "completed"}
_OWN = ("temperature", "top_p")  # the server's own, where the request says nothing
_INPUT = "custom_tool_call_input"
# What a response has at first; what it says of its request, where that says nothing; by a delta's
# kind, how its item's id begins, how events call its text, what it has at first, and the part of it
# that holds the text, if one does.
_KNOWN: Json = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
_ECHOED: Json = _KNOWN["echoed"]


class Item(requests.Fields):
    """Which fields it needs depends on its type."""

    inside = "input"
    type: Label = "message"
    role: Literal["user", "assistant", "system", "developer", "latest_reminder"] | None = None
    content: requests.Content | None = None
    call_id: requests.CallId | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,258}$")] | None = None
    arguments: requests.Text | None = None
    output: requests.Result | None = None
    encrypted_content: requests.Text | None = None


def _known(item: object) -> object:
    """An item as the model knows it: of functions alone.  Without a type it is a message."""
    if not isinstance(item, dict):
        return item
    kind, space = str(item.get("type") or "message"), item.get("namespace")
    known = {} if space is None else {"name": f"{space}__{item.get('name')}"}
    if kind == "custom_tool_call" and isinstance(text := item.get("input"), str):
        known["arguments"] = json.dumps({"input": text})
    return {**item, **known, "type": kind.replace("custom_tool", "function")}


def _flat(tools: object) -> object:
    """Each tool of a namespace is one of the request's."""
    flat = list[object]()
    for tool in tools if isinstance(tools, list) else ():
        match tool:
            case {"type": "namespace", "name": name, "tools": [*parts]}:
                flat += [{**it, "namespace": name} if isinstance(it, dict) else it for it in parts]
            case _:
                flat.append(tool)
    return flat if isinstance(tools, list) else tools


class ClientTool(requests.Function):
    """A function, or what takes a text: to the model a function of one argument."""

    type: Literal["function", "custom"]
    namespace: requests.Name | None = None
    format: Json | None = None  # of the text

    @property
    def known(self) -> requests.Function:
        """As the model knows it."""
        space = "" if self.namespace is None else f"{self.namespace}__"
        known = self.model_copy(update={"name": space + self.name})
        if self.type == "custom":
            rules = [str(value) for value in (self.format or {}).values()]
            known.description = "\n".join([self.description or "", "`input` is its text.", *rules])
            text = {"type": "object", "properties": {"input": {"type": "string"}}}
            known.parameters = {**text, "required": ["input"], "additionalProperties": False}
        return known


class OtherTool(requests.Fields):
    """A tool that OpenAI runs, or that its models alone were taught to use."""

    type: Literal[
        "apply_patch", "code_interpreter", "computer", "computer_use_preview", "file_search",
        "image_generation", "local_shell", "mcp", "programmatic_tool_calling", "shell",
        "tool_search", "web_search", "web_search_2025_08_26", "web_search_preview",
        "web_search_preview_2025_03_11",
    ]  # fmt: skip


Tool = Annotated[ClientTool | OtherTool, Field(discriminator="type")]
Tools = Annotated[
    list[Tool],
    Field(max_length=requests.MAX_TOOLS),
    BeforeValidator(_flat, json_schema_input_type=list[Json]),
]


class TextConfig(requests.Fields):
    format: requests.ResponseFormat | None = None


class ReasoningConfig(requests.Fields):
    effort: Label | None = Field(None, description=requests.EFFORT)


class ResponsesRequest(requests.GenerationRequest):
    """``/v1/responses``."""

    input: TextOr[
        requests.Text, Annotated[list[Annotated[Item, BeforeValidator(_known)]], requests.SOME]
    ]
    instructions: requests.Text | None = None
    max_output_tokens: Count | None = None
    tools: Tools | None = Field(None, description="the model is offered those that the client runs")
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = Field(None, description="its `format` is that of `response_format`")
    background: Literal[False] | None = None
    include: list[Label] | None = Field(None, description=f"only `{_SCORES}` works")
    reasoning: ReasoningConfig | None = None
    top_logprobs: requests.TopLogprobs | None = None
    truncation: Literal["disabled"] | None = Field(None, description="nothing is dropped silently")
    metadata: requests.Labels | None = Field(None, description=_REPEATED)
    prompt_cache_key: Label | None = Field(None, description=_REPEATED)
    safety_identifier: Label | None = Field(None, description=_REPEATED)
    user: Label | None = Field(None, description=_REPEATED)
    max_tool_calls: Count | None = Field(None, description=_REPEATED)

    @property
    def offered(self) -> list[ClientTool]:
        """The tools that the model may use."""
        return [tool for tool in self.tools or () if isinstance(tool, ClientTool)]

    def chat(self) -> requests.Conversation:
        """Raises ``RefusedError``."""
        given = self.input
        said = [Message("user", given)] if isinstance(given, str) else messages_of(given)
        tools, choice = [tool.known for tool in self.offered], self.tool_choice
        if not tools and choice in ("none", "auto"):
            choice = None  # clients give it in any case
        policy = requests.tool_policy(tools, choice, self.parallel_tool_calls if tools else None)
        wanted = requests.rule_of(self.text.format if self.text is not None else None)
        effort = self.reasoning.effort if self.reasoning is not None else None
        messages = requests.with_system([self.instructions], said)
        return requests.Conversation(messages, policy, wanted, effort)

    def options(self) -> requests.AnswerOptions:
        is_scored = self.top_logprobs is not None or _SCORES in (self.include or ())
        logprobs = (self.top_logprobs or 0) if is_scored else None
        return requests.AnswerOptions(self.sampling(), self.max_output_tokens, logprobs=logprobs)


def messages_of(items: list[Item]) -> list[Message]:
    """A call is of the assistant's message before it, reasoning of the one behind it.  A summary is
    the user's.  Raises ``RefusedError`` for no message."""
    messages, thoughts = list[Message](), ""
    for item in items:
        match item:
            case Item(type="reasoning"):
                thoughts = text_of(item.content)
                continue
            case Item(type="function_call_output", call_id=str(id_), output=str() | list()):
                messages.append(Message("tool", text_of(item.output), call_id=id_))
            case Item(type="message", role=str(role), content=str() | list()):
                role = "system" if role == "developer" else role
                messages.append(Message(role, text_of(item.content)))
            case Item(type="function_call", call_id=str(id_), name=str(), arguments=str()):
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message("assistant"))
                messages[-1].calls.append(Call(id_, item.name or "", item.arguments or ""))
            case Item(type="compaction" | "compaction_summary" | "context_compaction"):
                ours, _, summary = (item.encrypted_content or "").partition(_COMPACTED)
                if ours or not summary:
                    summary = "[left out: only the server that wrote it can read it]"
                messages.append(Message("user", f"{_BEFORE}{summary}"))
            case Item(type="item_reference"):
                raise RefusedError(f"input: item_reference: {_STATELESS}", "input")
            case Item(type="message" | "function_call" | "function_call_output"):
                problem = f"an item of type {item.type!r} lacks a field that it needs"
                raise RefusedError(f"input: {problem}", "input")
            case _:
                problem = f"an item of the unknown type {item.type!r:.40}"
                raise RefusedError(f"input: {problem} can't be read", "input")
        if messages[-1].role == "assistant" and thoughts:
            messages[-1].thoughts, thoughts = thoughts, ""
    if not messages:
        raise RefusedError("input: holds no message", "input")
    return messages


@router.post(PATH, responses=EventStream.responses)
async def create(body: ResponsesRequest, request: Request, service: Serving) -> Response:
    service.check_model(body.model)
    answers = await chat_answers(service, request, body.chat(), body.options())
    left_out = sorted({tool.type for tool in body.tools or () if isinstance(tool, OtherTool)})
    request.state.relaxed += [f"tools: {kind} is left out" for kind in left_out]
    draft = Draft(body, answers)

    async def events() -> AsyncIterator[str]:
        for kind in ("created", "in_progress"):
            yield draft.event(kind, response=draft.response)
        try:
            async for update in answers.updates():
                for text in draft.add(update):
                    yield text
        except RefusedError as problem:
            code = "server_error" if problem.status >= 500 else "invalid_prompt"
            error = {"code": code, "message": problem.message}
            draft.response |= {"status": "failed", "error": error}
        yield draft.event(draft.response["status"], response=draft.response)

    if body.stream:
        return EventStream(events(), answers)
    for update in await answers.whole():
        list(draft.add(update))
    return answers.respond(draft.response)


@router.post(f"{PATH}/compact")
async def compact(body: ResponsesRequest, request: Request, service: Serving) -> Response:
    """What the user said and a summary of all, to go on with instead.  The model reads of functions
    as in the requests before, so that what it has read stays cached."""
    service.check_model(body.model)
    chat = body.chat()
    asked = replace(chat, messages=[*chat.messages, Message("user", _SUMMARIZE)])
    answers = await chat_answers(service, request, asked, body.options(), can_call=False)
    (update,) = await answers.whole()
    said = [message.text for message in chat.messages if message.role == "user"]
    output = [{**_USER, "content": [{"type": "input_text", "text": text}]} for text in said]
    output.append({"type": "compaction", "encrypted_content": _COMPACTED + update.text})
    output = [{"id": f"item_{uuid.uuid4().hex}", **item} for item in output]
    about: Json = {"id": f"resp_{uuid.uuid4().hex}", "object": "response.compaction"}
    about |= {"created_at": int(time.time()), "usage": _usage(answers)}
    return JSONResponse({**about, "output": output})


@router.post(f"{PATH}/input_tokens")
async def count_tokens(body: ResponsesRequest, service: Serving) -> Response:
    service.check_model(body.model)
    count = len(await service.chat_ids(body.chat()))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


class Draft:
    """A response while it is written."""

    def __init__(self, body: ResponsesRequest, answers: Answers):
        # What changes nothing is not echoed: it may be no value that clients know.
        repeated = {*_ECHOED} - {"reasoning"}
        given = body.model_dump(by_alias=True, exclude_none=True, include=repeated)
        given = {name: value for name, value in given.items() if value or name != "text"}
        self._tools = {tool.known.name: tool for tool in body.offered}
        self._events = 0
        self._answers, self._kind = answers, ""  # of the item that is open
        self._texts: list[str] = []  # of the item that is open
        self._scored: list[Token] = []  # of its text
        self._coming: list[Token] = []  # whose text is still to come
        self._output: list[Json] = []
        self.response: Json = {
            **{"id": f"resp_{uuid.uuid4().hex}", "created_at": int(time.time())},
            **{"model": answers.service.name, **_KNOWN["begun"], **_ECHOED},
            **{name: getattr(answers.service.sampling, name) for name in _OWN},
            **given,
            **{"tools": [tool.model_dump() for tool in body.offered], "output": self._output},
        }

    def event(self, kind: str, **content: object) -> str:
        text = event({"type": f"response.{kind}", "sequence_number": self._events, **content})
        self._events += 1
        return text

    def add(self, update: Update) -> Iterator[str]:
        """Events of what ``update`` adds, up to the end of the last item."""
        if update.finish is not None and not self._output and not update.content:
            update.content = [ContentDelta()]  # an empty answer has an empty message
        self._coming += update.tokens
        for delta in update.content:
            if delta.name is not None or delta.kind != self._kind:
                yield from self._close()
                yield from self._open(delta)
            if delta.text:
                yield from self._write(delta.text)
            if delta.complete:
                yield from self._close()
        if update.finish is None:
            return
        is_cut = update.finish == "length"
        status = "incomplete" if is_cut else "completed"
        yield from self._close(status)
        self.response |= {"status": status, "usage": _usage(self._answers)}
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())

    def _open(self, delta: ContentDelta) -> Iterator[str]:
        self._kind, number = delta.kind, uuid.uuid4().hex
        tool = self._tools.get(delta.name or "")
        kind = "custom" if tool is not None and tool.type == "custom" else delta.kind
        about = _KNOWN["items"][kind]
        self._name, self._part = about["event"], about["part"]
        item = {"id": f"{about['id']}_{number}", "status": "in_progress", **about["begun"]}
        if delta.name is not None:
            item |= {"call_id": f"call_{number}", "name": tool.name if tool else delta.name}
        if tool is not None and tool.namespace is not None:
            item["namespace"] = tool.namespace
        index = len(self._output)
        self._output.append(item)
        self._texts, self._scored = [], []
        self._where: Json = {"item_id": item["id"], "output_index": index}
        yield self.event("output_item.added", output_index=index, item=item)
        if self._part:
            self._where["content_index"] = 0
            yield self.event("content_part.added", **self._where, part=self._part)

    def _write(self, text: str) -> Iterator[str]:
        self._texts.append(text)
        scores, coming = Json(), self._coming
        if self._kind == "text":
            scores["logprobs"] = self._answers.scores(coming)
            self._scored += coming
        self._coming = []
        if self._name != _INPUT:  # which comes whole
            yield self.event(f"{self._name}.delta", **self._where, **scores, delta=text)

    def _close(self, status: str = "completed") -> Iterator[str]:
        """End the item that is open, if one is."""
        if not self._kind:
            return
        item, text = self._output[-1], "".join(self._texts)
        scores = self._answers.scores([*self._scored, *self._coming])
        if self._part:
            done = {"text": text} | ({"logprobs": scores} if self._kind == "text" else {})
            part = {**self._part, **done}
            item["content"] = [part]
        elif self._name == _INPUT:
            # One that is cut off ends in the middle of the argument.
            given = parse_arguments(text) or parse_arguments(f'{text}"}}') or {}
            item |= (done := {"input": given.get("input", "")})
            yield self.event(f"{self._name}.delta", **self._where, delta=done["input"])
        else:
            item |= (done := {"name": item["name"], "arguments": text})
        yield self.event(f"{self._name}.done", **self._where, **done)
        if self._part:
            yield self.event("content_part.done", **self._where, part=part)
        item["status"], self._kind = status, ""
        yield self.event("output_item.done", output_index=len(self._output) - 1, item=item)


def _usage(answers: Answers) -> Json:
    usage = answers.usage()
    counts: Json = {"input_tokens": usage.prompt, "output_tokens": usage.answer}
    counts["input_tokens_details"] = {"cached_tokens": usage.cached, "cache_write_tokens": 0}
    counts["output_tokens_details"] = {"reasoning_tokens": usage.reasoning or 0}
    return {**counts, "total_tokens": usage.prompt + usage.answer}
