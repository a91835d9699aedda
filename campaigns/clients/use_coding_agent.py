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
    "x-app": "cli",
    "x-api-key": "unused",
    "x-stainless-retry-count": "0",
    "x-stainless-timeout": "600",
}


def tool(number):
    text = {"type": "string", "description": f"What tool {number} is about."}
    items = {"type": "array", "items": {"type": "object", "properties": {"text": text}}}
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"path": text, "limit": {"type": "number"}, "items": items},
        "required": ["path"],
        "additionalProperties": False,
    }
    about = f"Tool {number} does what no other tool does. " * 12
    return {"name": f"Tool{number}", "description": about, "input_schema": schema}


TOOLS = [tool(number) for number in range(30)]
TOOLS[-1] |= KEPT
REMINDER = {"type": "text", "text": "<system-reminder>\nNothing is open.\n</system-reminder>"}
BODY = {
    "model": MODEL,
    "max_tokens": 40,
    "temperature": 1,
    "stream": True,
    "system": [
        {"type": "text", "text": "You are an agent for a command line."},
        {"type": "text", "text": "Follow the project's rules. " * 100, **KEPT},
        {"type": "text", "text": "The folder is /project.", **KEPT},
    ],
    "tools": TOOLS,
    "metadata": {"user_id": "user_0_account__session_1"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "messages": [
        {"role": "user", "content": [REMINDER, {"type": "text", "text": QUESTION, **KEPT}]}
    ],
}
CALLS = [
    {"type": "tool_use", "id": f"toolu_{i}", "name": f"Tool{i}", "input": {"path": f"{i}.py"}}
    for i in range(3)
]
RESULTS = [
    {"type": "tool_result", "tool_use_id": "toolu_0", "content": "nothing", "is_error": True},
    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [REMINDER]},
    {"type": "tool_result", "tool_use_id": "toolu_2", "content": "1\tline\n" * 50, **KEPT},
]
THOUGHT = {"type": "thinking", "thinking": "Let me look.", "signature": "c2ln"}


def post(path, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{URL}{path}?beta=true", data, HEADERS)
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read().decode()


def events(body):
    parts = [part for part in post("/v1/messages", body).split("\n\n") if part]
    kinds = [json.loads(part.partition("data: ")[2])["type"] for part in parts]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop", kinds


@case
def a_first_turn():
    events(BODY)


@case
def a_turn_after_results():
    said = [THOUGHT, {"type": "text", "text": "I look."}, *CALLS]
    turns = [{"role": "assistant", "content": said}, {"role": "user", "content": RESULTS}]
    events({**BODY, "messages": [*BODY["messages"], *turns]})


@case
def a_call_of_a_large_set():
    choice = {"type": "any", "disable_parallel_tool_use": True}
    body = {**BODY, "stream": False, "max_tokens": 400, "tool_choice": choice, "temperature": 0}
    (block,) = json.loads(post("/v1/messages", body))["content"]
    assert block["type"] == "tool_use" and block["input"].keys() >= {"path"}


@case
def a_title_whole_without_tools():
    """What agents ask small models for on the side."""
    body = {name: BODY[name] for name in ("model", "max_tokens", "system", "messages", "metadata")}
    assert json.loads(post("/v1/messages", body))["stop_reason"]


@case
def counting():
    body = {name: BODY[name] for name in ("model", "system", "messages", "tools", "thinking")}
    assert json.loads(post("/v1/messages/count_tokens", body))["input_tokens"] > 1000
