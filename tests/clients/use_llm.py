"""The command ``llm`` with an OpenAI endpoint."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import MODEL, PARAMETERS, QUESTION, SYSTEM, URL, case, main

folder = Path(tempfile.mkdtemp())
ABOUT = f"  model_name: {MODEL}\n  api_base: {URL}/v1\n"
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: talk\n  supports_schema: true\n  supports_tools: true\n{ABOUT}"
    f"- model_id: text\n  completion: true\n{ABOUT}"
)
GREEDY = ["-o", "temperature", "0", "-o", "max_tokens"]


def llm(*arguments):
    command = [sys.executable, "-m", "llm", *arguments]
    environment = os.environ | {"LLM_USER_PATH": str(folder)}
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@case
def text_whole_and_streamed():
    asked = ["-m", "talk", *GREEDY, "60", "-s", SYSTEM, QUESTION]
    assert llm(*asked) == llm(*asked, "--no-stream") != "\n"
    assert llm("-c", *GREEDY, "60", "And the queen?") != "\n"


@case
def completion_whole_and_streamed():
    asked = ["-m", "text", *GREEDY, "60", "My fellow citizens,"]
    assert llm(*asked) == llm(*asked, "--no-stream") != "\n"


@case
def schema():
    answer = llm("-m", "talk", *GREEDY, "60", "--schema", json.dumps(PARAMETERS), QUESTION)
    assert json.loads(answer)["city"] in PARAMETERS["properties"]["city"]["enum"]


@case
def tools_whole_and_streamed():
    """The model may call them or not; a call is answered."""
    function = "def weather(city: str) -> str:\n    return 'rain'"
    asked = ["-m", "talk", *GREEDY, "60", "--functions", function, "--chain-limit", "2", QUESTION]
    assert llm(*asked) == llm(*asked, "--no-stream")


main()
