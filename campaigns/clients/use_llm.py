"""The command ``llm`` with an OpenAI endpoint."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import MODEL, PARAMETERS, QUESTION, SYSTEM, URL, both, case, weather

folder = Path(tempfile.mkdtemp())
ABOUT = f"  model_name: {MODEL}\n  api_base: {URL}/v1\n"
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: talk\n  supports_schema: true\n  supports_tools: true\n{ABOUT}"
    f"- model_id: text\n  completion: true\n{ABOUT}"
)


def llm(stream, *arguments):
    how = ["-o", "temperature", "0", "-o", "max_tokens", "60", *["--no-stream"] * (not stream)]
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments, *how],
        env=os.environ | {"LLM_USER_PATH": str(folder)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


@both()
def text(stream):
    answer = llm(stream, "-m", "talk", "-s", SYSTEM, QUESTION)
    assert llm(stream, "-c", "And the queen?")
    return answer


@both()
def completion(stream):
    return llm(stream, "-m", "text", "My fellow citizens,")


@case
def schema():
    answer = json.loads(llm(True, "-m", "talk", "--schema", json.dumps(PARAMETERS), QUESTION))
    assert weather(answer["city"])


@both()
def tools(stream):
    """The model may call them or not; a call is answered."""
    function = "def weather(city: str) -> str:\n    return 'rain'"
    asked = ["-m", "talk", "--functions", function, "--chain-limit", "2", QUESTION]
    return (llm(stream, *asked),)
