"""What ``tests/test_serve_conformance.py`` has schemathesis do beyond the server's description: it
adds the limits of the open model and the fields that need or exclude each other, and it checks
answers with the types of OpenAI's and Anthropic's clients."""

import json

import anthropic.types
import anthropic.types.shared
import openai.types.chat
import openai.types.responses
import openai.types.shared
import pydantic
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from slotmoe.tools.serve.requests import MAX_ANSWERS

VOCABULARY, CONTEXT = 4096, 1024  # of the sample as the test serves it
TOKEN_ID = r"^([0-9]{1,3}|[0-3][0-9]{3}|40[0-8][0-9]|409[0-5])$"


def given(name):
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def equal(name, value):
    return {"required": [name], "properties": {name: {"const": value}}}


def many_prompts(count):
    """``count`` prompts leave so many answers for each."""
    items = {"type": ["string", "array"]}
    prompts = {"type": "array", "minItems": count, "maxItems": count, "items": items}
    n = {"anyOf": [{"type": "null"}, {"type": "integer", "maximum": MAX_ANSWERS // count}]}
    return {
        "if": {"required": ["prompt"], "properties": {"prompt": prompts}},
        "then": {"properties": {"n": n}},
    }


STREAMED = {"if": given("stream_options"), "then": equal("stream", True)}
RULES = {
    "ChatRequest": [
        STREAMED,
        {"if": given("top_logprobs"), "then": equal("logprobs", True)},
        {"not": {"allOf": [given("max_tokens"), given("max_completion_tokens")]}},
        {"not": equal("max_tokens", 0)},
        {"not": equal("max_completion_tokens", 0)},
    ],
    "CompletionRequest": [
        STREAMED,
        {"if": equal("max_tokens", 0), "then": equal("echo", True)},
        *(many_prompts(count) for count in range(2, MAX_ANSWERS + 1)),
    ],
    "MessagesRequest": [],
    "CountRequest": [],
    "ResponsesRequest": [],
    "TokenizeRequest": [],
}


@schemathesis.hook
def before_load_schema(context, raw_schema):
    schemas = raw_schema["components"]["schemas"]
    for name, rules in RULES.items():
        schemas[name]["properties"]["model"] = {"const": "sample"}
        if rules:
            schemas[name]["allOf"] = rules
    for name in ("ChatRequest", "CompletionRequest"):
        fields = schemas[name]["properties"]
        fields["logit_bias"]["anyOf"][0]["propertyNames"] = {"pattern": TOKEN_ID}
        # FastAPI rounds these.
        fields["seed"]["anyOf"][0] |= {"minimum": -(1 << 63), "exclusiveMaximum": 1 << 63}
    fields = schemas["CompletionRequest"]["properties"]
    fields["suffix"] = {"type": "null"}  # the sample has no tokens for a gap
    _, prompt, _, prompts = fields["prompt"]["oneOf"]
    for ids in (prompt, prompts["items"]):
        ids["items"]["exclusiveMaximum"] = VOCABULARY
        ids["maxItems"] = CONTEXT - 1


ONLY_THE_SERVER_CAN_TELL = (
    b"the context holds",  # how many tokens a text has
    b"echo with logprobs would give",
    b"messages: ",  # which result belongs to which call
    b"a message of the",
    b"neither content nor tool_calls",
    b"tool_choice",  # whether it names one of the tools
    b"with tools",
    b"is there twice",
    b"the schema",  # a schema within the request
    b"follow a schema",
    b"keeps no threads",
    b"not stored here",
    b"holds no message",
    b"either prompt or messages",
    b"min_tokens is more",
)


@schemathesis.check
def accepted_if_it_fits(ctx, response, case):
    """Valid requests are accepted, but for reasons that no schema can say."""
    if response.status_code != 400 or not any(
        reason in response.content for reason in ONLY_THE_SERVER_CAN_TELL
    ):
        positive_data_acceptance(ctx, response, case)


class Models(pydantic.BaseModel):
    object: str
    data: list[openai.types.Model]


class Refusal(pydantic.BaseModel):
    error: openai.types.shared.ErrorObject


ANSWERS = {
    "/v1/models": Models,
    "/v1/models/{name}": openai.types.Model,
    "/v1/chat/completions": openai.types.chat.ChatCompletion,
    "/v1/completions": openai.types.Completion,
    "/v1/messages": anthropic.types.Message,
    "/v1/messages/count_tokens": anthropic.types.MessageTokensCount,
    "/v1/responses": openai.types.responses.Response,
    "/v1/responses/{id}": openai.types.responses.Response,
    "/v1/responses/input_tokens": openai.types.responses.InputTokenCountResponse,
}
# What a route may answer with; a GET has no body to refuse.
STATUSES = {"GET": {200, 401, 403, 404}, "POST": {200, 400, 401, 403, 404, 408, 413, 415, 429}}
STATUSES["DELETE"] = STATUSES["GET"]
PING = '{"type":"ping"}'
EVENTS = {
    "/v1/chat/completions": openai.types.chat.ChatCompletionChunk,
    "/v1/messages": anthropic.types.RawMessageStreamEvent,
    "/v1/responses": openai.types.responses.ResponseStreamEvent,
}


@schemathesis.check
def clients_understand_it(ctx, response, case):
    """Answers, events and refusals have every field that the clients' types require, of the type
    that they require."""
    kind, path = response.headers["content-type"][0].partition(";")[0], case.operation.path
    if case.method == case.operation.method.upper():
        assert response.status_code in STATUSES[case.method], response.status_code
    if kind == "text/event-stream":
        events = [part.partition("data: ")[2] for part in response.text.split("\n\n")]
        expected = pydantic.TypeAdapter(EVENTS.get(path, dict))
        for event in events:
            if event not in ("", "[DONE]", PING) and "error" not in json.loads(event):
                expected.validate_json(event, strict=True)
    elif response.status_code == 200 and path in ANSWERS:
        pydantic.TypeAdapter(ANSWERS[path]).validate_json(response.content, strict=True)
    elif response.status_code not in (200, 405):
        is_anthropic = path.startswith("/v1/messages")
        refusal = anthropic.types.shared.ErrorResponse if is_anthropic else Refusal
        pydantic.TypeAdapter(refusal).validate_json(response.content, strict=True)
