"""``slotmoe serve``: which requests are refused and in which words, which fields are ignored, and
what the largest requests cost."""

import json
import re
import tracemalloc

import pydantic
import pytest
from fastapi.exceptions import RequestValidationError

from slotmoe.model.generate import Answer
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve import errors as serve_errors
from slotmoe.tools.serve.anthropic import MessagesRequest
from slotmoe.tools.serve.app import TokenizeRequest
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.guard import MAX_KEYS, MAX_VALUES, check
from slotmoe.tools.serve.openai import ChatRequest
from slotmoe.tools.serve.responses import ResponsesRequest
from tests.support.apis import ASKED, CHAT, MESSAGES, OLLAMA, RESPONSES, TOOL
from tests.support.served import ANTHROPIC_TOOL, GREEDY, USER, Served, tokenizer_with

TEXT = "/v1/completions"
BASES = {**ASKED, TEXT: {**GREEDY, "prompt": "x"}}
PART = {"type": "image_url", "image_url": {"url": "x"}}
LONG = "x" * 400
RESULT = {"role": "tool", "tool_call_id": "x", "content": "y"}
NAMES = "a b", "x" * 129, ""
NAME = "String should match pattern '^[a-zA-Z0-9_-]{1,128}$'"
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": [{"name": "f"}]}}


def function(name):
    return {"type": "function", "function": {"name": name}}


FUNCTION, OTHER = function("f"), function("other")


def user(*content):
    return {"messages": [{"role": "user", "content": content[0] if len(content) == 1 else content}]}


def item(**about):
    return {"input": [about]}


USE = {"type": "tool_use", "id": "x", "name": "weather", "input": {}}
USED = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
PICTURE = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
DOCUMENT = {"type": "document", "source": {"type": "url"}}
YES = {"format": {"type": "json_schema", "schema": {"enum": ["yes"]}}}
MANY_IDS = {str(i): 1 for i in range(1025)}
STATELESS = "nothing is stored here; send the whole conversation as input"
WRONG = {  # in both of OpenAI's older APIs
    "temperature": [-1, "0"],
    "top_p": [-0.1],
    "top_k": [-2, 1 << 31],
    "min_p": [2],
    "n": [0, 17],
    "max_tokens": [True, -(10**30)],
    "seed": [1.5, 1 << 63],
    "stop": ["x" * 257, ["a", ""], ["a"] * 17, 5],
    "logit_bias": [{"4096": 1}, {"x": 1}, {LONG: 1}, {"1": 101}, MANY_IDS],
    "frequency_penalty": [3],
    "repetition_penalty": [0, 5e-324],
    "stream_options": [{"include_usage": True}],
}
# Path, fields, and how the message begins, which is with the parameter if no other is given.
REFUSED = [
    *((path, {name: v}, name) for name, vs in WRONG.items() for v in vs for path in (CHAT, TEXT)),
    (CHAT, user([PART]), "messages.0.content.0: a part of type 'image_url' can't be read"),
    (CHAT, user(5), "messages.0.content is neither text nor a list"),
    (CHAT, user(None), "messages.0: a message of the user has no content"),
    (CHAT, {"messages": [{"role": "wizard"}]}, "messages.0.role: Input should be 'system'"),
    (CHAT, {"messages": USER * 4097}, "messages has more than 4096 items"),
    (CHAT, {"messages": [RESULT]}, "messages: a result answers no call"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0: a message of the tool"),
    (CHAT, {"messages": [{"role": "assistant", "content": None}]}, "messages.0: a message of the"),
    (CHAT, {"messages": [{"role": "assistant", "audio": {}}]}, "messages: audio is not supported"),
    (CHAT, user("\ud800"), "messages.0.content: Input should be a valid string"),
    (CHAT, {"stop": ["a", ""]}, "stop.1 is empty"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    (CHAT, {"response_format": {"type": "yaml"}}, "response_format.type: Input should be 'text'"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format: the schema is missing"),
    (CHAT, {"tools": [FUNCTION] * 1025}, "tools has more than 1024 items"),
    *((CHAT, {"tools": [function(name)]}, f"tools.0.function.name: {NAME}") for name in NAMES),
    (CHAT, {"tools": [FUNCTION], "tool_choice": OTHER}, "tool_choice: 'other' is none of the"),
    (CHAT, {"tools": [FUNCTION], "tool_choice": ALLOWED}, "tool_choice is none that this"),
    (CHAT, {"tools": [FUNCTION], "tool_choice": 5}, "tool_choice is none that this server"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice can only be given with tools"),
    (CHAT, {"max_tokens": 0}, "max_tokens is 0, expected a positive count or -1"),
    (CHAT, {"max_tokens": 4, "min_tokens": 5}, "min_tokens is more than the limit of tokens"),
    (CHAT, {"max_completion_tokens": 2}, "give max_tokens or max_comp", "max_tokens"),
    (CHAT, {"tools": [FUNCTION] * 2}, "tool 'f' is there twice", "tools"),
    (CHAT, {"modalities": ["audio"]}, "modalities.0: Input should be 'text'"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions is not supported by this server: use tools"),
    (CHAT, user("word " * 600), "the prompt has 612 tokens and the context holds 512", None),
    (TEXT, {"prompt": ["x"] * 20}, "prompt has more than 16 items"),
    (TEXT, {"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
    (TEXT, {"prompt": 5}, "prompt is neither text, token ids nor a list of either"),
    (TEXT, {"prompt": [[1], []]}, "prompt.1 has fewer than 1 items"),
    (TEXT, {"prompt": ["x"] * 9, "n": 2}, "prompts times n is more than 16 answers", "n"),
    (TEXT, {"prompt": [5] * 512}, "the prompt has 512 tokens and the context holds 512", None),
    (TEXT, {"prompt": [4096]}, "a token id of the prompt is outside 0 to 4095", None),
    (TEXT, {"prompt": "word " * 150_000}, "", None),
    (TEXT, {"suffix": "y"}, "this model can't fill in the middle", None),
    (TEXT, {"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
    (TEXT, {"best_of": 2}, "best_of: Input should be 1"),
    (RESPONSES, {"input": []}, "input has fewer than 1 items"),
    (RESPONSES, item(type="reasoning", summary=[]), "input: holds no message"),
    (RESPONSES, item(type="computer_call", id="x"), "input: an item of the unknown type 'comp"),
    (RESPONSES, item(type="function_call", name="f"), "input: an item of type 'function_call' la"),
    (RESPONSES, item(type="item_reference", id="x"), f"input: item_reference: {STATELESS}"),
    (RESPONSES, item(role="user", content=[{"type": "input_image"}]), "input.0.content.0: a part"),
    (RESPONSES, item(type="function_call_output", call_id="x", output="y"), "messages: a result"),
    (RESPONSES, {"previous_response_id": "x"}, "previous_response_id is not supported by this se"),
    (RESPONSES, {"conversation": "c"}, "conversation is not supported by this server: nothing"),
    (RESPONSES, {"background": True}, "background: Input should be false"),
    (RESPONSES, {"truncation": "auto"}, "truncation: Input should be 'disabled'"),
    (RESPONSES, {"tools": [{"type": "nonsense"}]}, "tools.0 has the unknown 'type' 'nonsense'"),
    (RESPONSES, {"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    (RESPONSES, {"text": {"format": {"type": "yaml"}}}, "text.format.type: Input should be"),
    (RESPONSES, {"metadata": {"a": 1}}, "metadata.a: Input should be a valid string"),
    (RESPONSES, {"metadata": {str(i): "" for i in range(17)}}, "metadata has 17 labels, more than"),
    (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens: Input should be greater than"),
    (MESSAGES, {"max_tokens": "x"}, "max_tokens: Input should be a valid integer"),
    (MESSAGES, {"thinking": {"type": "hard"}}, "thinking.type: Input should be"),
    (MESSAGES, {"output_config": {"format": {"type": "yaml"}}}, "output_config.format.type: In"),
    (MESSAGES, user({"type": "thinking"}, USE), "messages: a block of type 'thinking' can't be"),
    (MESSAGES, user(PICTURE, USE), "messages.0.content.0: a block of type 'image' can't be re"),
    (MESSAGES, user(DOCUMENT, USE), "messages.0.content.0.source"),
    (MESSAGES, {"messages": [{"role": "user", "content": [USE]}, USED]}, "messages: a block of"),
    (MESSAGES, {"messages": [USED]}, "messages: a result answers no call"),
    (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": [USE]}]}, "messages: call"),
    (MESSAGES, {"messages": [*USER, {**USER[0], "role": "assistant"}], "output_config": YES}, "me"),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools.0.input_schema"),
    (MESSAGES, {"tools": [{"name": "odd", "input_schema": {"type": "array"}}]}, "tool 'odd': the"),
    (MESSAGES, {"mcp_servers": [{"type": "url"}]}, "mcp_servers is not supported by this server"),
    (MESSAGES, {"container": "x"}, "container is not supported by this server: the server runs"),
    (MESSAGES, {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool"}}, "tool_choice is none"),
    (MESSAGES, {"tool_choice": {"type": "any"}}, "tool_choice can only be given with tools"),
    (OLLAMA, {"messages": [{**USER[0], "images": ["aGk="]}]}, "messages: images is not supported"),
    (OLLAMA, {"options": {"temperature": "hot"}}, "options.temperature: Input should be"),
    (OLLAMA, {"format": "xml"}, "format: Input should be"),
    ("/api/generate", {"context": [1]}, "context is not supported by this server: send messages"),
    ("/api/generate", {"suffix": "x"}, "this model can't fill in the middle"),
    ("/tokenize", {}, "give either prompt or messages", "prompt"),
    ("/tokenize", {"prompt": "x", "messages": USER}, "give either prompt or messages", "prompt"),
    *(("/detokenize", wrong, "tokens") for wrong in ({"tokens": [4096]}, {"tokens": [-1]}, {})),
]  # fmt: skip
BODIES = [
    (b'{"a": 1,\n "b" 2}', "is not JSON: Expecting ':' delimiter at line 2, column 6"),
    (b"\xff\xfe", "is not JSON: byte 0 is not UTF-8"),
    (b"[" * 50_000, "it is nested too deeply"),
    (b'{"n": ' + b"9" * 5000 + b"}", "a number is too long"),
    (b"[]", "is not a JSON object"),
    (b"", "the body is missing"),
    (b'{"model": "sample", "prompt": "x", "temperature": NaN}', ""),
    (b'{"model": "sample", "prompt": "x", "temperature": 1e999}', ""),
    ('{"model": "sample"}'.encode("utf-16"), "is not UTF-8"),
]


def test_refusals_say_the_reason(roomy):
    for path, fields, reason, *param in REFUSED:
        status, answer = roomy.post(path, **{**BASES.get(path, {}), **fields})
        error = answer["error"]
        message = error if isinstance(error, str) else error["message"]
        assert status == 400 and message.startswith(reason) and message, (fields, answer)
        if path in (CHAT, TEXT, RESPONSES) and LONG not in str(fields):
            assert error["param"] == (param or [re.match(r"\w+", reason)[0]])[0], answer
            assert error["type"] == "invalid_request_error"
    for body, reason in BODIES:
        for path in (CHAT, TEXT, MESSAGES, RESPONSES):
            status, answer, _ = roomy.ask("POST", path, body)
            assert status == 400 and reason in answer["error"]["message"], answer
    assert roomy.post(TEXT, model="other", prompt="x")[0] == 404
    assert roomy.ask("POST", TEXT, b" " * (5 << 20))[0] == 413
    assert roomy.complete("Call me", max_tokens=1)["usage"]["completion_tokens"] == 1


VALUES = [5, 1.5, "x", [], {}, True, [5], [{}], {"type": "x"}, [{"type": "x"}], [{"role": "user"}]]
VALUES += [[{"role": "user", "content": wrong}] for wrong in ([5], [{"type": "x"}], {})]
PYTHON = re.compile(r"dictionary|instance|False|True|None|\(\)|_type|[a-z][A-Z]")


@pytest.mark.parametrize("kind", [ResponsesRequest, MessagesRequest, ChatRequest, TokenizeRequest])
def test_no_refusal_has_a_name_of_pythons(kind):
    """None of a wrong value for any field of any request."""
    asked = {"model": "x", "messages": USER, "input": "x"}
    asked = {name: value for name, value in asked.items() if name in kind.model_fields}
    for name in kind.model_fields:
        for value in VALUES:
            try:
                kind.model_validate(body := {**asked, name: value})
            except pydantic.ValidationError as found:
                places = [{**e, "loc": ("body", *e["loc"])} for e in found.errors()]
                refusal = serve_errors._invalid(RequestValidationError(places, body=body))
                assert not PYTHON.search(refusal.message), refusal.message


ODD = {"odd": {"x": [1]}}
UNKNOWN = [  # at any depth, in every API
    (CHAT, {"enable_thinking": False, "stream_options": None}),
    (CHAT, {"messages": [{**USER[0], **ODD}], "tools": [{**FUNCTION, **ODD}]}),
    (TEXT, {"prompt": "x", "use_beam_search": False}),
    (MESSAGES, user({"type": "text", "text": "x", "cache_control": {}}, {**DOCUMENT, "source":
        {"type": "text", "data": "x", **ODD}})),
    (MESSAGES, {"mcp_servers": [], "container": None, "speed": "fast", "context_management": {}}),
    (RESPONSES, item(role="user", content="x", status="completed")),
    (OLLAMA, {"messages": [{**USER[0], **ODD}], "options": {"num_ctx": 8, "num_predict": 1}}),
]  # fmt: skip


@pytest.mark.usefixtures("network")
def test_unknown_fields_are_ignored_and_named_once(runtime, capfd):
    with Served(runtime, is_logged=True) as served:
        for path, fields in UNKNOWN * 2:
            status, answer = served.post(path, **{**BASES[path], **fields})
            assert status == 200, answer
        for number in range(40):
            names = {f"n{number}-{i}-{'x' * 99}\n": 1 for i in range(10)}
            assert served.post(TEXT, **GREEDY, prompt="x", max_tokens=1, **names)[0] == 200
    lines = [line for line in capfd.readouterr().err.splitlines() if "unknown here" in line]
    told = [line.partition("the field ")[2].partition(" is")[0] for line in lines]
    wanted = "enable_thinking odd use_beam_search cache_control speed context_management status"
    assert {f"'{name}'" for name in (*wanted.split(), "num_ctx")} <= set(told)
    assert len(told) == len(set(told)) == 100 and max(map(len, told)) < 70
    assert lines[-1].endswith("further ones are not named")


def filled(head, item, tail, count=None):
    """``item`` so often, or as often as 4 MB hold."""
    count = count or ((4 << 20) - len(head) - len(tail)) // (len(item) + 1)
    return (head + ",".join([item] * count) + tail).encode()


KEYS = ",".join(f'"a{i}":1' for i in range(MAX_KEYS - 20))
HEAD = '{"model":"sample","max_tokens":3,'
CONTENT = HEAD + '"messages":[{"role":"user","content":['
HALF = MAX_VALUES // 2 - 50
LARGE = {
    "parts": filled(CONTENT, "{}", "]}]}"),
    "parts within the bound": filled(CONTENT, "{}", "]}]}", HALF),
    "good messages": filled(HEAD + '"messages":[', '{"role":"user","content":""}', "]}", 32_000),
    "prompts": filled(HEAD + '"prompt":[', "[]", "]}", HALF),
    "no ids": filled(HEAD + '"prompt":[', "1.5", "]}", MAX_VALUES - 50),
    "items": filled(HEAD + '"input":[', "{}", "]}", HALF),
    "system": filled(HEAD + '"messages":[],"system":[', "{}", "]}", HALF),
    "tools": filled(HEAD + '"messages":[],"tools":[', "{}", "]}", HALF),
    "stop": filled(HEAD + '"messages":[],"stop":[', '""', "]}", HALF),
    "unknown fields": (HEAD + KEYS + "}").encode(),
    "bias": (HEAD + '"logit_bias":{' + KEYS + "}}").encode(),
    "metadata": (HEAD + '"metadata":{' + KEYS + "}}").encode(),
    "text": (HEAD + '"messages":[{"role":"user","content":"' + "word " * 838_000 + '"}]}').encode(),
    "quotes": (HEAD + '"prompt":"' + '\\"' * (2 << 20) + '"}').encode()[-(4 << 20) :],
}


@pytest.fixture(scope="module")
def roomy(network, processes, runtime):
    with Served(runtime, max_body=4 << 20) as served:
        yield served


@pytest.mark.parametrize("shape", LARGE)
def test_largest_requests_cost_little(roomy, shape, monkeypatch):
    """They are refused, and few errors are made of them: these take time."""
    counts, told = [0], serve_errors._invalid

    def counted(problem):
        counts.append(len(problem.errors()))
        return told(problem)

    monkeypatch.setattr(serve_errors, "_invalid", counted)
    tracemalloc.start()
    for path in (CHAT, TEXT, MESSAGES, RESPONSES):
        assert roomy.ask("POST", path, LARGE[shape])[0] in (400, 413)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(counts) < 8 and peak < 128 << 20


@pytest.mark.usefixtures("heavy")
def test_values_are_counted_outside_of_strings():
    text = json.dumps({"text": '\\"{[,:' * MAX_VALUES, "more": [1, 2]}).encode()
    check(text)
    check(json.dumps({"ids": [1] * (MAX_VALUES - 10)}).encode())
    for beyond in ({"ids": [1] * MAX_VALUES, "t": '\\"'}, {str(i): 1 for i in range(MAX_KEYS + 1)}):
        with pytest.raises(RefusedError, match="holds more than"):
            check(json.dumps(beyond).encode())


@pytest.mark.usefixtures("network", "processes")
def test_tokenizer_with_more_ids_than_the_model_has_rows(runtime, tmp_path, monkeypatch):
    tokenizer = Tokenizer(tokenizer_with(tmp_path, ["<more>"], 4096), 0)
    monkeypatch.setattr(runtime, "tokenizer", tokenizer)
    assert tokenizer.size == 4097 == runtime.config.vocab_size + 1
    with Served(runtime) as wider:
        answer = wider.choice(response_format={"type": "json_object"}, max_tokens=5)
        assert answer["message"]["content"].startswith("{")
        assert wider.chat(min_tokens=3, logprobs=True, top_logprobs=3)[0] == 200
        assert wider.chat(logit_bias={"4096": 1})[0] == 400
        assert wider.chat(messages=[{"role": "user", "content": "a<more>"}])[0] == 400
        for prompt in ([4096], "a<more>"):
            for fields in ({}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
                assert wider.post(TEXT, **GREEDY, prompt=prompt, **fields)[0] == 400
        assert wider.text(echo=True, logprobs=1) and wider.service.engine.alive


def test_exception_of_one_answer_ends_that_answer_alone(served, monkeypatch, capfd):
    alone = served.text(max_tokens=30)
    for name in ("take", "score"):
        real = getattr(Answer, name)

        def work(answer, *given, real=real):
            if 300 in answer._penalties._prompt:
                raise IndexError("nobody foresaw this")
            return real(answer, *given)

        monkeypatch.setattr(Answer, name, work)
        body = {**GREEDY, "prompt": [0, 300], "echo": True, "logprobs": 0}
        status, answer = served.post(TEXT, **body)
        assert status == 500 and "server's log" in answer["error"]["message"]
        assert served.text(max_tokens=30) == alone
        assert "nobody foresaw this" in capfd.readouterr().err
        monkeypatch.undo()
    served.idle()
    assert served.service.engine.alive
