"""OpenAI's responses: ``/v1/responses``.  Its events tell what an answer's updates add to items."""

import time
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Literal, TypeAlias

from fastapi import APIRouter, Query, Request, Response
from pydantic import TypeAdapter
from starlette.responses import JSONResponse

from slotmoe.jsonfile import Json
from slotmoe.tools.serve.answers import Answers, EventStream, Update, chat_answers, event
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.reader import ContentDelta
from slotmoe.tools.serve.requests import Label
from slotmoe.tools.serve.response_items import InputMessage, Item, ItemReference, ResponsesRequest
from slotmoe.tools.serve.response_store import Stored
from slotmoe.tools.serve.service import Service, Serving

PATH = "/v1/responses"
router = APIRouter()
Event: TypeAlias = Annotated[int, Query(ge=-1)]
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)
# What a response says of its request, and what it says where the request says nothing.
_NOTHING = "instructions max_output_tokens max_tool_calls previous_response_id prompt_cache_key"
_OWN = ("temperature", "top_p")  # the server's own, where the request says nothing
_ECHOED: Json = dict.fromkeys((*_NOTHING.split(), "safety_identifier", "user", *_OWN))
_ECHOED |= {"metadata": {}, "parallel_tool_calls": True, "store": True, "tool_choice": "auto"}
_ECHOED |= {"reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}}}
_ECHOED |= {"top_logprobs": 0, "truncation": "disabled"}


@router.post(PATH, responses=EventStream.responses)
async def create(body: ResponsesRequest, request: Request, service: Serving) -> Response:
    items = _conversation(service, request.state.owner, body)
    answers = await chat_answers(service, request, body.chat(items), body.options())
    draft = Draft(body, answers)
    begin = [draft.event(kind, response=draft.response) for kind in ("created", "in_progress")]

    def end() -> str:
        last = draft.event(draft.response["status"], response=draft.response)
        if body.store is not False and draft.response["status"] != "failed":
            conversation = [*map(_listed, items), *draft.response["output"]]
            given = request.state.owner, draft.response, conversation, "".join(draft.events)
            service.responses.put(*given)
        return last

    async def events() -> AsyncIterator[str]:
        yield "".join(begin)
        try:
            async for update in answers.updates():
                for text in draft.add(update):
                    yield text
        except RefusedError as problem:
            code = "server_error" if problem.status >= 500 else "invalid_prompt"
            error = {"code": code, "message": problem.message}
            draft.response |= {"status": "failed", "error": error}
        yield end()

    if body.stream:
        return EventStream(events(), answers)
    for update in await answers.whole():
        list(draft.add(update))
    end()
    return JSONResponse(draft.response)


@router.post(f"{PATH}/input_tokens")
async def count_tokens(body: ResponsesRequest, request: Request, service: Serving) -> Response:
    items = _conversation(service, request.state.owner, body)
    count = len(await service.chat_ids(body.chat(items)))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


@router.get(PATH + "/{id}", responses=EventStream.responses)
async def retrieve(
    id: str, request: Request, service: Serving, stream: bool = False, starting_after: Event = -1
) -> Response:
    stored = _found(service, request.state.owner, id)
    if not stream:
        return JSONResponse(stored.response)
    events = zlib.decompress(stored.events).split(b"\n\n")[starting_after + 1 :]
    return Response(b"\n\n".join(events), media_type=EventStream.media_type)


@router.get(PATH + "/{id}/input_items")
async def input_items(
    id: str,
    request: Request,
    service: Serving,
    after: Label | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    stored = _found(service, request.state.owner, id)
    items = stored.items[: len(stored.items) - len(stored.response["output"])]
    items = items[:: 1 if order == "asc" else -1]
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise RefusedError(f"after: {after!r:.80} is none of the items", "after")
    items = items[0 if after is None else ids.index(after) + 1 :]
    page = {"object": "list", "data": items[:limit], "has_more": len(items) > limit}
    ends = [item["id"] for item in items[:limit]] or [None]
    return JSONResponse({**page, "first_id": ends[0], "last_id": ends[-1]})


@router.delete(PATH + "/{id}")
async def delete(id: str, request: Request, service: Serving) -> Response:
    _found(service, request.state.owner, id)
    service.responses.delete(request.state.owner, id)
    return JSONResponse({"id": id, "object": "response", "deleted": True})


def _found(service: Service, owner: str, id_: str, before: bool = False) -> Stored:
    """The one of a path, or the one ``before`` a request.  Raises ``RefusedError``."""
    if (stored := service.responses.get(owner, id_)) is None:
        kind, status = ("previous_response", 400) if before else ("response", 404)
        problem = f"{id_!r:.80} is not stored here, or no longer; send the whole conversation"
        raise RefusedError(f"{kind}_id: {problem}", f"{kind}_id", status, f"{kind}_not_found")
    return stored


def _conversation(service: Service, owner: str, body: ResponsesRequest) -> list[Item]:
    """All items up to the answer, with earlier responses'.  Raises ``RefusedError``."""
    service.check_model(body.model)
    items = list[Item]()
    if body.previous_response_id is not None:
        stored = _found(service, owner, body.previous_response_id, before=True)
        items += map(_ITEM.validate_python, stored.items)
    given = body.input
    if isinstance(given, str):
        given = [InputMessage.model_construct(role="user", content=given)]
    for item in given:
        if isinstance(item, ItemReference):
            known = service.responses.item(owner, item.id)
            if known is None:
                problem = f"the item {item.id!r:.80} is not stored here, or no longer"
                raise RefusedError(f"input: {problem}; send it whole", "input")
            item = _ITEM.validate_python(known)
        items.append(item)
    return items


class Draft:
    """A response while it is written."""

    def __init__(self, body: ResponsesRequest, answers: Answers):
        # What changes nothing is not echoed: it may be no value that clients know.
        rest: Json = {"reasoning": True, "text": {"verbosity"}}
        given = body.model_dump(by_alias=True, exclude_none=True, include={*_ECHOED}, exclude=rest)
        given = {name: value for name, value in given.items() if value or name != "text"}
        names = {"type", "name", "description", "parameters", "strict"}
        tools = [tool.model_dump(include=names) for tool in body.functions()]
        self.events: list[str] = []
        self._answers, self._kind = answers, ""  # of the item that is open
        self._texts: list[str] = []  # of the item that is open
        self._scores: list[Json] = []  # of its tokens
        self._coming: list[Json] = []  # of tokens whose text is still to come
        self._output: list[Json] = []
        self.response: Json = {
            **{"id": f"resp_{uuid.uuid4().hex}", "object": "response"},
            **{"model": answers.service.name},
            **{"created_at": int(time.time()), "completed_at": None, "status": "in_progress"},
            **{"background": False, "error": None, "incomplete_details": None},
            **_ECHOED,
            **{name: getattr(answers.service.sampling, name) for name in _OWN},
            **given,
            **{"tools": tools, "output": self._output, "usage": None},
        }

    def event(self, kind: str, **content: object) -> str:
        text = event({"type": f"response.{kind}", "sequence_number": len(self.events), **content})
        self.events.append(text)
        return text

    def add(self, update: Update) -> Iterator[str]:
        """Events of what ``update`` adds, up to the end of the last item."""
        if update.finish is not None and not self._output and not update.content:
            update.content = [ContentDelta()]  # an empty answer has an empty message
        self._coming += self._answers.scores(update.tokens)
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
        kind, prefix, self._name, begun, self._part = _ITEMS[delta.kind]
        item: Json = {"id": f"{prefix}_{number}", "type": kind, "status": "in_progress", **begun}
        if delta.name is not None:
            item |= {"call_id": f"call_{number}", "name": delta.name, "arguments": ""}
        index = len(self._output)
        self._output.append(item)
        self._texts, self._scores = [], []
        self._where: Json = {"item_id": item["id"], "output_index": index}
        yield self.event("output_item.added", output_index=index, item=item)
        if self._part:
            self._where["content_index"] = 0
            yield self.event("content_part.added", **self._where, part=self._part)

    def _write(self, text: str) -> Iterator[str]:
        self._texts.append(text)
        scores: Json = {"logprobs": self._coming} if self._kind == "text" else {}
        self._scores += scores.get("logprobs", ())
        self._coming = []
        yield self.event(f"{self._name}.delta", **self._where, **scores, delta=text)

    def _close(self, status: str = "completed") -> Iterator[str]:
        """End the item that is open, if one is."""
        if not self._kind:
            return
        item, text, scores = self._output[-1], "".join(self._texts), [*self._scores, *self._coming]
        if self._part:
            done = {"text": text} | ({"logprobs": scores} if self._kind == "text" else {})
            part = {**self._part, **done}
            item["content"] = [part]
        else:
            done = {"name": item["name"], "arguments": text}
            item |= done
        yield self.event(f"{self._name}.done", **self._where, **done)
        if self._part:
            yield self.event("content_part.done", **self._where, part=part)
        item["status"], self._kind = status, ""
        yield self.event("output_item.done", output_index=len(self._output) - 1, item=item)


# By a delta's kind: the type of its item, how its id begins, the name of its text in events, what
# the item has at first, and the part of it that holds the text.
_TEXT = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
_THOUGHT = {"type": "reasoning_text", "text": ""}
_ITEMS: dict[str, tuple[str, str, str, Json, Json]] = {
    "text": ("message", "msg", "output_text", {"role": "assistant", "content": []}, _TEXT),
    "reasoning": ("reasoning", "rs", "reasoning_text", {"summary": [], "content": []}, _THOUGHT),
    "call": ("function_call", "fc", "function_call_arguments", {}, {}),
}


def _usage(answers: Answers) -> Json:
    usage = answers.usage()
    counts: Json = {"input_tokens": usage.prompt, "output_tokens": usage.answer}
    counts["input_tokens_details"] = {"cached_tokens": usage.cached, "cache_write_tokens": 0}
    counts["output_tokens_details"] = {"reasoning_tokens": usage.reasoning or 0}
    return {**counts, "total_tokens": usage.prompt + usage.answer}


def _listed(item: Item) -> Json:
    """An item of a request, with what clients expect of one that a server lists."""
    listed = {"status": "completed", **item.model_dump(exclude_none=True)}
    if isinstance(listed.get("content"), str):
        kind = "output_text" if listed["role"] == "assistant" else "input_text"
        listed["content"] = [{"type": kind, "text": listed["content"], "annotations": []}]
    return {"id": f"{listed['type']}_{uuid.uuid4().hex}", **listed}
