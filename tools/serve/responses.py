"""What the description of the API says about answers, which are plain JSON, and refusals."""

from types import GenericAlias
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

Count = Annotated[int, Field(ge=0)]
_REASONS = {
    400: "The request is not understood, not supported, or does not fit the context",
    401: "The API key is missing or wrong",
    403: "The host name is not allowed, or the request comes from a page of another origin",
    404: "Not here",
    408: "The body did not arrive in time",
    413: "The body is larger than the server takes",
    415: "The body is not JSON",
    429: "Too many answers are waiting",
    500: "The model failed",
    503: "The model has failed",
}


def _object(name: str, **fields: Any) -> Any:
    """A model whose ``fields`` are all required."""
    required: Any = {field: (kind, ...) for field, kind in fields.items()}
    return create_model(name, **required)


def _list(item: Any) -> GenericAlias:
    return GenericAlias(list, item)


def _completion(name: str, kind: Any, **content: Any) -> Any:
    """OpenAI's completion, whose choices have ``content``."""
    choice = _object(f"{name}Choice", index=Count, finish_reason=str, **content)
    tokens = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), Count)
    about = {"id": str, "object": kind, "created": Count, "model": str}
    return _object(name, **about, choices=_list(choice), usage=_object(f"{name}Usage", **tokens))


Health = _object("Health", status=str)
_counts: Any = dict.fromkeys(("context", "running", "queued"), Count)
Stats = _object("Stats", model=str, memory=dict[str, Any], **_counts)
_MODEL: dict[str, Any] = {"id": str, "object": Literal["model"], "created": Count}
Model = _object("Model", **_MODEL, owned_by=str, max_model_len=Count)
ModelList = _object("ModelList", object=Literal["list"], data=_list(Model))
_Message = _object("AnswerMessage", role=Literal["assistant"])
ChatCompletion = _completion("ChatCompletion", Literal["chat.completion"], message=_Message)
TextCompletion = _completion("TextCompletion", Literal["text_completion"], text=str)
AnthropicAnswer = _object(
    "AnthropicAnswer",
    id=str,
    type=Literal["message"],
    role=Literal["assistant"],
    content=_list(_object("ContentBlock", type=str)),
    stop_reason=str,
    usage=_object("AnthropicUsage", input_tokens=Count, output_tokens=Count),
)
_Text = str | None
_Problem = _object("OpenAIProblem", message=str, type=str, param=_Text, code=_Text)
OpenAIError = _object("OpenAIError", error=_Problem)
_AnthropicProblem = _object("AnthropicProblem", type=str, message=str)
AnthropicError = _object("AnthropicError", type=Literal["error"], error=_AnthropicProblem)


def refusals(model: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` of a route that refuses with these ``statuses`` and ``model``."""
    return {status: {"model": model, "description": _REASONS[status]} for status in statuses}


def post_responses(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` of a route that generates, whole or as a stream."""
    fields = {"data": {"type": "string"}, "event": {"type": "string"}}
    event = {"type": "object", "required": ["data"], "properties": fields}
    stream = {"content": {"text/event-stream": {"schema": event}}}
    return {200: stream, **refusals(model, *_REASONS)}
