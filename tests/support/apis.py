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
    connection, response = served.open("POST", path, {**ASKED[path], "stream": True, **fields})
    text = response.read().decode()
    connection.close()
    assert response.status == 200, text
    if path.startswith("/api/"):
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in text.splitlines()]
    parts = [part.partition("data: ") for part in text.split("\n\n")[:-1]]
    found = [json.loads(data) for _, _, data in parts if data not in ("", "[DONE]")]
    assert (parts[-1][2] == "[DONE]") == (path == CHAT)
    if path != CHAT:
        assert [name for name, _, _ in parts] == [f"event: {event['type']}\n" for event in found]
    return found


def parts_of(path, answer):
    """Reasoning, text and arguments of a whole answer."""
    if path == CHAT:
        message = answer["choices"][0]["message"]
        calls = [json.loads(c["function"]["arguments"]) for c in message.get("tool_calls", ())]
        return message.get("reasoning_content", ""), message["content"] or "", calls
    if path == RESPONSES:
        texts = {"reasoning": "", "message": ""}
        texts |= {i["type"]: i["content"][0]["text"] for i in answer["output"] if "content" in i}
        calls = [json.loads(i["arguments"]) for i in answer["output"] if "arguments" in i]
        return texts["reasoning"], texts["message"], calls
    if path == MESSAGES:
        join = {k: "".join(b.get(k, "") for b in answer["content"]) for k in ("thinking", "text")}
        return *join.values(), [b["input"] for b in answer["content"] if b["type"] == "tool_use"]
    message = answer.get("message", answer)
    calls = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
    return message.get("thinking", ""), message.get("content", message.get("response")), calls


# Where a stream has reasoning, text and arguments.
KINDS = {
    CHAT: ("reasoning_content", "content", "arguments"),
    RESPONSES: ("reasoning_text", "output_text", "function_call_arguments"),
    MESSAGES: ("thinking", "text", "partial_json"),
}


def streamed_parts(path, found):
    """The same of a stream."""
    if path not in KINDS:
        parts = [parts_of(path, part) for part in found]
        thoughts, texts = ("".join(part[n] for part in parts) for n in (0, 1))
        return thoughts, texts, [call for part in parts for call in part[2]]
    texts = []
    for kind in KINDS[path]:
        if path == RESPONSES:
            texts.append(
                "".join(e["delta"] for e in found if e["type"] == f"response.{kind}.delta")
            )
            continue
        deltas = [e["delta"] for e in found if "delta" in e]
        if path == CHAT:
            deltas = [event["choices"][0]["delta"] for event in found]
            deltas += [call["function"] for d in deltas for call in d.get("tool_calls", ())]
        texts.append("".join(delta.get(kind) or "" for delta in deltas))
    return texts[0], texts[1], [json.loads(texts[2])] if texts[2] else []


def counts_of(answer):
    """Tokens of prompt and answer, whoever tells them."""
    if "usage" not in answer:
        return answer["prompt_eval_count"], answer["eval_count"]
    usage = answer["usage"]
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    made = usage.get("completion_tokens", usage.get("output_tokens"))
    return prompt + usage.get("cache_read_input_tokens", 0), made
