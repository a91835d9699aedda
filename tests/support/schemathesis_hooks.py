"""What ``tests/tools/test_serve_apis.py`` has schemathesis do beyond the server's description: it
asks for the open model, and it checks answers by the types of OpenAI's and Anthropic's clients."""

import json

import anthropic.types
import anthropic.types.shared
import openai.types.chat
import openai.types.responses
import pydantic
import schemathesis


@schemathesis.hook
def before_load_schema(context, raw_schema):
    for schema in raw_schema["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"const": "sample"}


ANSWERS = {
    "/v1/models/{name}": openai.types.Model,
    "/v1/chat/completions": openai.types.chat.ChatCompletion,
    "/v1/completions": openai.types.Completion,
    "/v1/messages": anthropic.types.Message,
    "/v1/messages/count_tokens": anthropic.types.MessageTokensCount,
    "/v1/responses": openai.types.responses.Response,
    "/v1/responses/input_tokens": openai.types.responses.InputTokenCountResponse,
}
PING = '{"type":"ping"}'
EVENTS = {
    "/v1/chat/completions": openai.types.chat.ChatCompletionChunk,
    "/v1/messages": anthropic.types.RawMessageStreamEvent,
    "/v1/responses": openai.types.responses.ResponseStreamEvent,
}


@schemathesis.check
def clients_understand_it(ctx, response, case):
    """Whatever the clients' types require is there, of the type that they require."""
    kind, path = response.headers["content-type"][0].partition(";")[0], case.operation.path
    if kind == "text/event-stream":
        events = [part.partition("data: ")[2] for part in response.text.split("\n\n")]
        expected = pydantic.TypeAdapter(EVENTS.get(path, dict))
        for event in events:
            if event not in ("", "[DONE]", PING) and "error" not in json.loads(event):
                expected.validate_json(event, strict=True)
    elif response.status_code == 200 and path in ANSWERS:
        pydantic.TypeAdapter(ANSWERS[path]).validate_json(response.content, strict=True)
    elif response.status_code not in (200, 405) and path.startswith("/v1/messages"):
        refusal = pydantic.TypeAdapter(anthropic.types.shared.ErrorResponse)
        refusal.validate_json(response.content, strict=True)
