"""``slotmoe serve`` as other people's programs see it: ``llm`` with an OpenAI endpoint,
schemathesis on the server's own description."""

import json
import os
import shlex
import subprocess
import sys
from collections import Counter

import jsonschema_rs
import pytest

from slotmoe.offload.runtime import Runtime
from tests.support.forkserver import ROOT, Forked
from tests.support.served import ANTHROPIC_TOOL, GREEDY, TOOLS, USER, Served

KING = USER[0]["content"]


@pytest.fixture(scope="module")
def served(network, processes, sample_export):
    """The sample, where so many tokens end an answer that most are short."""
    with (
        Runtime.open(sample_export, ram="2GiB", context=1024, sequences=8) as runtime,
        pytest.MonkeyPatch.context() as patch,
    ):
        ids = runtime.tokenizer.encode((ROOT / "tests/data/heldout/sotu.txt").read_text())
        common = [one for one, _ in Counter(ids).most_common()]
        words = [one for one in common if runtime.tokenizer.decode([one]).startswith(" ")]
        patch.setattr(runtime, "eos_token_ids", frozenset(words[:60]))  # none is in compact JSON
        with Served(runtime, ("first", "second"), waiting=64, max_body=4 << 20) as served:
            yield served


# The time-outs: the model's speed is not the interface's.
OPTIONS = """--header 'Authorization: Bearer first' --no-color --checks all --continue-on-failure
    --exclude-checks positive_data_acceptance --output-sanitize false
    --max-examples 100 --request-timeout 90 --max-response-time 90"""


@pytest.mark.usefixtures("nightly")
def test_schemathesis(served):
    """What ``schemathesis run`` finds with all of its checks."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks"}
    command += shlex.split(OPTIONS)
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.fixture(scope="module")
def llm(served, tmp_path_factory):
    """Runs ``llm`` with the server as two of its models: one for messages, one for plain text."""
    folder = tmp_path_factory.mktemp("llm")
    endpoint = f"\n  model_name: sample\n  api_base: {served.address}/v1\n  api_key_name: slotmoe\n"
    models = f"- model_id: talk\n  supports_schema: true{endpoint}"
    models += f"- model_id: text\n  completion: true{endpoint}"
    (folder / "extra-openai-models.yaml").write_text(models)
    (folder / "keys.json").write_text('{"slotmoe": "first"}')
    environment = os.environ | {"LLM_USER_PATH": str(folder)}

    def run(*arguments):
        child = Forked(*arguments, program="from llm.cli import cli; cli()", env=environment)
        out, err = child.communicate()
        assert child.returncode == 0, err
        return out.decode()

    return run


LIMITS = ["-o", "temperature", "0", "-o", "max_tokens", "12"]


def test_llm_talks_streamed_and_whole_and_continues(served, llm):
    asked = ["-s", "Be brief.", KING]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": KING}]

    def expected():
        body = {**GREEDY, "max_tokens": 12, "messages": messages}
        return served.post("/v1/chat/completions", **body)[1]["choices"][0]["message"]["content"]

    for how in ([], ["--no-stream"]):
        assert llm("-m", "talk", *how, *LIMITS, *asked) == expected() + "\n"
    messages += [{"role": "assistant", "content": expected()}]
    messages += [{"role": "user", "content": "And the queen?"}]
    assert llm("-c", *LIMITS, "And the queen?") == expected() + "\n"
    answer = served.post("/v1/completions", **GREEDY, max_tokens=12, prompt=KING)[1]
    assert llm("-m", "text", *LIMITS, KING) == answer["choices"][0]["text"] + "\n"
    schema = {"type": "object", "properties": {"king": {"enum": ["Lear", "Henry"]}}}
    schema |= {"required": ["king"], "additionalProperties": False}
    found = json.loads(llm("-m", "talk", "--schema", json.dumps(schema), "Who?"))
    assert found["king"] in ("Lear", "Henry")


CHAT = {**GREEDY, "messages": USER, "max_tokens": 200}
NAMED = {"tools": TOOLS, "tool_choice": "required"}
SCORED = {"logprobs": True, "top_logprobs": 1}
RESPONSE = {**GREEDY, "input": KING, "max_output_tokens": 4}
ASKED = [
    ("/v1/chat/completions", {**CHAT, **SCORED, "max_tokens": 3}),
    ("/v1/chat/completions", {**CHAT, **NAMED}),
    ("/v1/completions", {**GREEDY, "prompt": KING, "max_tokens": 3, "logprobs": 2}),
    ("/v1/messages", CHAT),
    ("/v1/messages", {**CHAT, "tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "any"}}),
    ("/v1/messages/count_tokens", {"model": "sample", "messages": USER}),
    ("/v1/responses", {**RESPONSE, "top_logprobs": 1}),
    ("/v1/responses/input_tokens", {"input": KING}),
    ("/tokenize", {"prompt": KING}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/apply-template", {"messages": USER}),
    ("/api/chat", {"model": "sample", "messages": USER, "stream": False}),
    ("/api/generate", {"model": "sample", "prompt": KING, "stream": False}),
    ("/api/show", {"model": "sample"}),
    *((path, None) for path in ("/health", "/stats", "/v1/models", "/api/tags", "/api/version")),
]


def test_answers_are_as_described(served):
    described = served.ask("GET", "/openapi.json", x_api_key="first")[1]
    assert all(name.isalpha() for name in described["components"]["schemas"])  # none is Python's

    def check(path, answer, *, method="get", status="200"):
        content = described["paths"][path][method]["responses"][status]["content"]
        schema = content["application/json"]["schema"] | {"components": described["components"]}
        jsonschema_rs.validate(schema, answer)
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, {})

    for path, body in ASKED:
        method = "GET" if body is None else "POST"
        status, answer, _ = served.ask(method, path, body, x_api_key="first")
        assert status == 200, (path, answer)
        check(path, answer, method=method.lower())
        if body is not None:
            check(path, served.post(path, odd=1)[1], method="post", status="4XX")
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            content = route["responses"]["200"]["content"].get("application/json")
            assert content is None or content["schema"], f"{method} {path}"
