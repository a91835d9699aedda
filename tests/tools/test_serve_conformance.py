"""``slotmoe serve`` as other people's programs see it: ``llm`` with an OpenAI endpoint,
schemathesis on the server's own description."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from tests.support.served import Served
from tests.support.tiny import SAMPLE

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The sample, where so many tokens end an answer that most are short."""
    source, destination = (tmp_path_factory.mktemp("terse") / name for name in ("source", "export"))
    shutil.copytree(SAMPLE, source)
    tokenizer = Tokenizer(source, 0)
    common = Counter(
        tokenizer.encode((Path(__file__).parents[1] / "data/heldout/sotu.txt").read_text())
    ).most_common()
    config = json.loads((source / "config.json").read_text())
    config["eos_token_id"] = [one for one, _ in common if tokenizer.decode([one]).startswith(" ")][
        :60
    ]  # none is in compact JSON
    (source / "config.json").write_text(json.dumps(config))
    quantize(source, destination)
    with (
        Runtime.open(destination, ram="2GiB", context=1024, sequences=8) as runtime,
        Served(runtime, ("first", "second"), 64, 4 << 20) as served,
    ):
        yield served


def check(served, *options):
    """What ``schemathesis run`` found with all of its checks."""
    command = [
        "run",
        f"http://127.0.0.1:{served.port}/openapi.json",
        "--header",
        "Authorization: Bearer first",
        "--no-color",
        *options,
    ]
    command += [
        "--checks",
        "all",
        "--exclude-checks",
        "positive_data_acceptance",
        "--continue-on-failure",
        "--output-sanitize",
        "false",
    ]
    command += [
        "--request-timeout",
        "90",
        "--max-response-time",
        "90",
    ]  # the model's speed is not the interface's
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks"}
    found = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *command],
        capture_output=True,
        text=True,
        env=environment,
    )
    print(found.stdout)
    assert found.returncode == 0, found.stderr


@pytest.mark.usefixtures("network")
def test_schemathesis(served):
    check(served, "--max-examples", "4", "--seed", "1", "--phases", "fuzzing")


@pytest.mark.usefixtures("nightly")
def test_schemathesis_at_length(served):
    check(served, "--max-examples", "100")


@pytest.fixture(scope="module")
def llm(served, tmp_path_factory):
    """Runs ``llm`` with the server as two of its models: one for messages, one for plain text."""
    folder = tmp_path_factory.mktemp("llm")
    endpoint = f"""
  model_name: sample
  api_base: http://127.0.0.1:{served.port}/v1
  api_key_name: slotmoe
"""
    models = f"- model_id: talk\n  supports_schema: true{endpoint}"
    models += f"- model_id: text\n  completion: true{endpoint}"
    (folder / "extra-openai-models.yaml").write_text(models)
    (folder / "keys.json").write_text('{"slotmoe": "first"}')

    def run(*arguments):
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"LLM_USER_PATH": str(folder)},
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_llm_talks_streamed_and_whole_and_continues(served, llm):
    options = ["-o", "temperature", "0", "-o", "max_tokens", "12"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me of the king."},
    ]

    def expected():
        body = {"model": "sample", "temperature": 0, "max_tokens": 12, "messages": messages}
        return served.ask("POST", "/v1/chat/completions", body, x_api_key="first")[1]["choices"][0][
            "message"
        ]["content"]

    for how in ([], ["--no-stream"]):
        assert (
            llm("-m", "talk", *how, *options, "-s", "Be brief.", "Tell me of the king.")
            == expected() + "\n"
        )
    messages += [
        {"role": "assistant", "content": expected()},
        {"role": "user", "content": "And the queen?"},
    ]
    assert llm("-c", *options, "And the queen?") == expected() + "\n"


def test_llm_continues_a_text_and_follows_a_schema(served, llm):
    body = {"model": "sample", "temperature": 0, "max_tokens": 12, "prompt": "My fellow citizens,"}
    expected = served.ask("POST", "/v1/completions", body, x_api_key="first")[1]["choices"][0][
        "text"
    ]
    for how in ([], ["--no-stream"]):
        found = llm(
            "-m",
            "text",
            *how,
            "-o",
            "temperature",
            "0",
            "-o",
            "max_tokens",
            "12",
            "My fellow citizens,",
        )
        assert found == expected + "\n"
    schema = {
        "type": "object",
        "properties": {"king": {"enum": ["Lear", "Henry"]}},
        "required": ["king"],
        "additionalProperties": False,
    }
    assert json.loads(llm("-m", "talk", "--schema", json.dumps(schema), "Who?"))["king"] in (
        "Lear",
        "Henry",
    )
