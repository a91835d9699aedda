"""Requests in the form in which coding agents send them to Anthropic's API: a system message in
parts that are marked for caching, many tools, beta headers, long histories with results.

The form is that of agents' recorded traffic; the texts are ours."""

import json
import urllib.request

from cases import MODEL, QUESTION, URL, case

KEPT = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
HEADERS = {
    "content-type": "application/json",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,"
    "fine-grained-tool-streaming-2025-05-14,context-management-2025-06-27,prompt-caching-scope",
    "anthropic-dangerous-direct-browser-access": "true",
    **{"x-app": "cli", "x-api-key": "unused"},
    **{"x-stainless-retry-count": "0", "x-stainless-timeout": "600"},
}
ABOUT = {"type": "string", "description": "What the tool is about."}
ITEMS = {"type": "array", "items": {"type": "object", "properties": {"text": ABOUT}}}
PARAMETERS = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"path": ABOUT, "limit": {"type": "number"}, "items": ITEMS},
    "required": ["path"],
    "additionalProperties": False,
}


def text(words, **more):
    return {"type": "text", "text": words, **more}


REMINDER = text("<system-reminder>\nNothing is open.\n</system-reminder>")
BODY = {
    **{"model": MODEL, "max_tokens": 40, "temperature": 1, "stream": True},
    "system": [
        text("You are an agent for a command line."),
        text("Follow the project's rules. " * 100, **KEPT),
        text("The folder is /project.", **KEPT),
    ],
    "tools": [
        {
            "name": f"Tool{number}",
            "description": f"Tool {number} does what no other tool does. " * 12,
            "input_schema": PARAMETERS,
            **(KEPT if number == 29 else {}),
        }
        for number in range(30)
    ],
    "metadata": {"user_id": "user_0_account__session_1"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "messages": [{"role": "user", "content": [REMINDER, text(QUESTION, **KEPT)]}],
}
RESULTS = [
    {"content": "nothing", "is_error": True},
    {"content": [REMINDER]},
    {"content": "1\tline\n" * 50, **KEPT},
]


def post(path, names=BODY, **changes):
    data = json.dumps({**{name: BODY[name] for name in names}, **changes}).encode()
    request = urllib.request.Request(f"{URL}{path}?beta=true", data, HEADERS)
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read().decode()


def stream(**changes):
    parts = [part for part in post("/v1/messages", **changes).split("\n\n") if part]
    kinds = [json.loads(part.partition("data: ")[2])["type"] for part in parts]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds


@case
def a_first_turn():
    stream()


@case
def a_turn_after_results():
    said = [{"type": "thinking", "thinking": "Let me look.", "signature": "c2ln"}, text("I look.")]
    results = []
    for number, result in enumerate(RESULTS):
        call = {"name": f"Tool{number}", "input": {"path": f"{number}.py"}}
        said.append({"type": "tool_use", "id": f"toolu_{number}", **call})
        results.append({"type": "tool_result", "tool_use_id": f"toolu_{number}", **result})
    turns = [{"role": "assistant", "content": said}, {"role": "user", "content": results}]
    stream(messages=[*BODY["messages"], *turns])


@case
def a_call_of_a_large_set():
    changes = {"stream": False, "max_tokens": 400, "temperature": 0}
    changes["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
    (block,) = json.loads(post("/v1/messages", **changes))["content"]
    assert block["type"] == "tool_use" and block["input"].keys() >= {"path"}


@case
def counting():
    names = ("model", "system", "messages", "tools", "thinking")
    assert json.loads(post("/v1/messages/count_tokens", names))["input_tokens"] > 1000
