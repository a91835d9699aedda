"""The load generator aiperf: four clients at once, streamed and whole, on three routes."""

import json
import subprocess
import tempfile
from pathlib import Path

from cases import CASES, FOLDER, MODEL, URL


def profile(kind, *options):
    folder = Path(tempfile.mkdtemp())
    command = ["aiperf", "profile", "--model", MODEL, "--url", URL, "--endpoint-type", kind]
    command += ["--tokenizer", FOLDER, "--concurrency", "4", "--request-count", "8", *options]
    command += ["--synthetic-input-tokens-mean", "60", "--output-tokens-mean", "20"]
    command += ["--artifact-dir", str(folder), "--ui", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = folder.rglob("profile_export_aiperf.json")
    found = json.loads(report.read_text())
    assert found["request_count"]["avg"] == 8 and not found.get("error_summary"), found
    assert "ignore_eos:true" not in options or found["time_to_first_token"]["avg"] > 0


CASES |= {
    "chat whole": lambda: profile("chat"),
    "chat streamed": lambda: profile("chat", "--streaming", "--extra-inputs", "ignore_eos:true"),
    "completions streamed": lambda: profile(
        "completions", "--streaming", "--extra-inputs", "min_tokens:5"
    ),
    "responses streamed": lambda: profile("responses", "--streaming"),
}
