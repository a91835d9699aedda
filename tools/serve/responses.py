"""OpenAI's responses: ``/v1/responses``.  Its events tell what an answer's updates add to items."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter
from starlette.responses import JSONResponse

from slotmoe.jsonfile import Json
from slotmoe.tools.serve.answers import (
    Answers,
    EventStream,
    Update,
    chat_answers,
    chat_prompt,
    event,
)
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.reader import ContentDelta
from slotmoe.tools.serve.response_items import Item, ItemReference, ResponsesRequest
from slotmoe.tools.serve.service import Service

PATH = "/v1/responses"
router = APIRouter()
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)
# What a response says of its request, and what it says where the request says nothing.
_ECHOED: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


@router.post(PATH, responses=EventStream.responses)
async def create(body: ResponsesRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    body.model = body.model or service.name
    items = _conversation(service, request.state.owner, body)
    answers = await chat_answers(request, body.chat(items))
    draft = Draft(body, answers)

    def store(response: Json) -> None:
        if body.store is not False and response["status"] != "failed":
            sent = [_json(item) for item in items]
            output = [*sent, *response["output"]]
            service.responses.put(request.state.owner, response, output)

    async def events() -> AsyncIterator[str]:
        for text in draft.begin():
            yield text
        try:
            async for update in answers.updates():
                for text in draft.add(update):
                    yield text
        except RefusedError as problem:
            draft.fail(problem)
        store(draft.response)
        yield draft.event(f"response.{draft.response['status']}", response=draft.response)

    if body.stream:
        return EventStream(events(), answers)
    (update,) = await answers.whole()
    for _ in draft.add(update):
        pass
    store(draft.response)
    return JSONResponse(draft.response)


@router.post(f"{PATH}/input_tokens")
async def count_tokens(body: ResponsesRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(body.model or service.name)
    items = _conversation(service, request.state.owner, body)
    prompt = await asyncio.to_thread(chat_prompt, service, body.chat(items))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prompt)})


@router.get(PATH + "/{id}")
async def retrieve(id: str, request: Request) -> Response:
    stored = request.app.state.service.responses.get(request.state.owner, id)
    if stored is None:
        raise _missing(id)
    return JSONResponse(stored.response)


@router.delete(PATH + "/{id}")
async def delete(id: str, request: Request) -> Response:
    if not request.app.state.service.responses.delete(request.state.owner, id):
        raise _missing(id)
    return JSONResponse({"id": id, "object": "response", "deleted": True})


def _missing(id_: str) -> RefusedError:
    problem = f"the response {id_!r:.80} is not stored here, or no longer"
    return RefusedError(problem, "id", 404, "response_not_found")


def _conversation(service: Service, owner: str, body: ResponsesRequest) -> list[Item]:
    """All items up to the answer, those of earlier responses included.  Raises ``RefusedError``."""
    items = list[Item]()
    if body.previous_response_id is not None:
        stored = service.responses.get(owner, body.previous_response_id)
        if stored is None:
            problem = f"{body.previous_response_id!r:.80} is not stored here, or no longer"
            name, code = "previous_response_id", "previous_response_not_found"
            raise RefusedError(f"{name}: {problem}; send the whole conversation", name, 400, code)
        items += [_ITEM.validate_python(item) for item in stored.items]
    for item in body.items():
        if isinstance(item, ItemReference):
            known = service.responses.item(owner, item.id)
            if known is None:
                problem = f"the item {item.id!r:.80} is not stored here, or no longer"
                raise RefusedError(f"input: {problem}; send it whole", "input")
            item = _ITEM.validate_python(known)
        items.append(item)
    return items


def _json(part: Any) -> Json:
    content: Json = part.model_dump(by_alias=True, exclude_none=True)
    return content


class Draft:
    """A response while it is written."""

    def __init__(self, body: ResponsesRequest, answers: Answers):
        # What changes nothing is not echoed: it may be no value that clients know.
        unused: Any = {"reasoning": True, "text": {"verbosity"}}
        shape: Any = {"by_alias": True, "exclude_none": True, "include": set(_ECHOED)}
        given = body.model_dump(**shape, exclude=unused)
        if not given.get("text"):
            given.pop("text", None)
        self._answers, self._number = answers, 0
        self._texts: list[str] = []  # of the item that is open
        self._scores: list[Json] = []  # of its tokens
        self._coming: list[Json] = []  # of tokens whose text is still to come
        self.response: Json = {
            **{"id": f"resp_{uuid.uuid4().hex}", "object": "response", "model": body.model},
            **{"created_at": int(time.time()), "completed_at": None, "status": "in_progress"},
            **{"background": False, "error": None, "incomplete_details": None},
            **_ECHOED,
            **given,
            **{"tools": [_tool(tool) for tool in body.functions()], "output": [], "usage": None},
        }
        self._output: list[Json] = self.response["output"]

    def event(self, kind: str, **content: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **content})

    def begin(self) -> Iterator[str]:
        for kind in ("created", "in_progress"):
            yield self.event(f"response.{kind}", response=self.response)

    def fail(self, problem: RefusedError) -> None:
        """The response ends with an error."""
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": problem.message}

    def add(self, update: Update) -> Iterator[str]:
        """Events of what ``update`` adds, up to the end of the last item."""
        if update.finish is not None and not self._output and not update.content:
            update.content = [ContentDelta()]  # an empty answer has an empty message
        self._coming += self._answers.scores(update.tokens)
        for delta in update.content:
            kind = _KINDS[(delta.call is not None, delta.reasoning)]
            if delta.name is not None or not self._is_open or self._output[-1]["type"] != kind:
                yield from self._close("completed")
                yield from self._open(kind, delta.name)
            if delta.text:
                yield from self._write(delta.text)
            if delta.complete:
                yield from self._close("completed")
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

    @property
    def _is_open(self) -> bool:
        return bool(self._output) and self._output[-1]["status"] == "in_progress"

    @property
    def _where(self) -> Json:
        """Of the item that is open."""
        where = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return (
            where if self._output[-1]["type"] == "function_call" else {**where, "content_index": 0}
        )

    def _open(self, kind: str, name: str | None) -> Iterator[str]:
        number = uuid.uuid4().hex
        item: Json = {"id": f"{_PREFIXES[kind]}_{number}", "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"call_id": f"call_{number}", "name": name, "arguments": ""}
        self._output.append(item)
        self._texts, self._scores = [], []
        index = len(self._output) - 1
        yield self.event("response.output_item.added", output_index=index, item=item)
        if kind in _PARTS:
            yield self.event(
                "response.content_part.added", **self._where, part=_PARTS[kind]("", [])
            )

    def _write(self, text: str) -> Iterator[str]:
        self._texts.append(text)
        kind, where = self._output[-1]["type"], self._where
        if kind == "message":
            where["logprobs"] = self._coming
            self._scores += self._coming
        self._coming = []
        yield self.event(f"response.{_TEXTS[kind]}.delta", **where, delta=text)

    def _close(self, status: str) -> Iterator[str]:
        if not self._is_open:
            return
        item, text, where = self._output[-1], "".join(self._texts), self._where
        kind = item["type"]
        if kind == "function_call":
            item["arguments"] = text
            about: Json = {"name": item["name"], "arguments": text}
        else:
            scores = [*self._scores, *self._coming]
            item["content"] = [_PARTS[kind](text, scores)]
            about = {"text": text} | ({"logprobs": scores} if kind == "message" else {})
        yield self.event(f"response.{_TEXTS[kind]}.done", **where, **about)
        if kind in _PARTS:
            yield self.event("response.content_part.done", **where, part=item["content"][0])
        item["status"] = status
        index = where["output_index"]
        yield self.event("response.output_item.done", output_index=index, item=item)


def _part(text: str, scores: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}


def _thought(text: str, _: list[Json]) -> Json:
    return {"type": "reasoning_text", "text": text}


# By the type of an item: of a delta that is of a call or of reasoning, or of neither.
_KINDS = {(False, False): "message", (False, True): "reasoning", (True, False): "function_call"}
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PARTS: dict[str, Callable[[str, list[Json]], Json]] = {"message": _part, "reasoning": _thought}
_TEXTS = {
    "message": "output_text",
    "reasoning": "reasoning_text",
    "function_call": "function_call_arguments",
}


def _tool(tool: Any) -> Json:
    about = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", **about}


def _usage(answers: Answers) -> Json:
    usage = answers.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": answers.reasoning_tokens or 0},
        "total_tokens": usage["total_tokens"],
    }
