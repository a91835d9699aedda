"""One question in the words of each API, and its answers in one form."""

import json

from tests.support.served import GREEDY, USER, WEATHER

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MESSAGES, OLLAMA = "/v1/messages", "/api/chat"
KING = USER[0]["content"]
OPTIONS = {"temperature": 0, "num_predict": 12}
TOOL = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
# The same question on each route, for 12 tokens.
ASKED = {
    CHAT: {**GREEDY, "messages": USER, "max_tokens": 12},
    RESPONSES: {**GREEDY, "input": KING, "max_output_tokens": 12},
    MESSAGES: {**GREEDY, "messages": USER, "max_tokens": 12},
    OLLAMA: {"model": "sample:latest", "messages": USER, "stream": False, "options": OPTIONS},
    "/api/generate": {"model": "sample", "prompt": KING, "stream": False, "options": OPTIONS},
}


def ask(served, path, **fields):
    status, answer = served.post(path, **{**ASKED.get(path, {}), **fields})
    assert status == 200, answer
    return answer


def events(served, path, **fields):
    """Of a stream, in the form of each API, without pings."""
    body = {**ASKED.get(path, GREEDY), "stream": True, **fields}
    connection, response = served.open("POST", path, body)
    text = response.read().decode()
    connection.close()
    assert response.status == 200, text
    if path.startswith("/api/"):
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in text.splitlines()]
    parts = [part.partition("data: ") for part in text.split("\n\n")[:-1]]
    found = [json.loads(data) for _, _, data in parts if data not in ("", "[DONE]")]
    is_named = path in (RESPONSES, MESSAGES)
    assert (parts[-1][2] == "[DONE]") is not is_named
    if is_named:
        assert [name for name, _, _ in parts] == [f"event: {event['type']}\n" for event in found]
    return found


def parts_of(path, answer):
    """Reasoning and text of a whole answer."""
    if path == CHAT:
        message = answer["choices"][0]["message"]
        return message.get("reasoning_content", ""), message["content"] or ""
    if path == RESPONSES:
        texts = {item["type"]: item["content"][0]["text"] for item in answer["output"]}
        return texts.get("reasoning", ""), texts["message"]
    if path == MESSAGES:
        return tuple("".join(b.get(k, "") for b in answer["content"]) for k in ("thinking", "text"))
    message = answer.get("message", answer)
    return message.get("thinking", ""), message.get("content", message.get("response"))


def streamed_parts(path, found):
    """The same of a stream."""
    if path in (OLLAMA, "/api/generate"):
        texts = zip(*[parts_of(path, part) for part in found], strict=True)
    elif path == RESPONSES:
        kinds = "response.reasoning_text.delta", "response.output_text.delta"
        texts = [[e["delta"] for e in found if e["type"] == kind] for kind in kinds]
    else:
        kinds = ("reasoning_content", "content") if path == CHAT else ("thinking", "text")
        deltas = [e["choices"][0]["delta"] if path == CHAT else e.get("delta", {}) for e in found]
        texts = [[delta.get(kind) or "" for delta in deltas] for kind in kinds]
    return tuple("".join(pieces) for pieces in texts)
