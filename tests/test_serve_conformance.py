"""``slotmoe serve`` as other people's programs see it: ``llm`` with an OpenAI endpoint, schemathesis on the server's own description."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from model.tokenizer import Tokenizer
from offload.quantize import quantize
from offload.runtime import Runtime
from tests.served import PROMPTS, Served
from tests.tiny import SAMPLE
from tools.serve_description import _below


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The sample with a context that holds whatever is drawn, and so many tokens that end an answer that all are short."""
    source, destination = (tmp_path_factory.mktemp("terse") / name for name in ("source", "export"))
    shutil.copytree(SAMPLE, source)
    common = Counter(Tokenizer(source, 0).encode((SAMPLE.parent / "deepseek_v2.py").read_text() + " ".join(PROMPTS)))
    config = json.loads((source / "config.json").read_text())
    config |= {"eos_token_id": [one for one, _ in common.most_common(60)], "max_position_embeddings": 32768}
    (source / "config.json").write_text(json.dumps(config))
    quantize(source, destination)
    with (
        Runtime.open(destination, ram="4GiB", context=32768, sequences=8) as runtime,
        Served(runtime, ("first", "second"), 64, 4 << 20) as served,
    ):
        yield served


def check(served, *options):
    """What ``schemathesis run`` found with all of its checks."""
    command = ["run", f"http://127.0.0.1:{served.port}/openapi.json", "--header", "Authorization: Bearer first", "--checks", "all"]
    command += ["--mode", "all", "--continue-on-failure", "--no-color", "--output-sanitize", "false", *options]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": ""}
    found = subprocess.run([sys.executable, "-m", "schemathesis.cli", *command], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_schemathesis(served):
    print(check(served, "--max-examples", "8", "--seed", "1", "--phases", "fuzzing"))


@pytest.mark.slow
def test_schemathesis_at_length(served):
    print(check(served, "--max-examples", "100", "--request-timeout", "60"))
