"""lm-evaluation-harness: log-probabilities of texts, beside those of ``slotmoe eval``."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
import lm_eval
from cases import FOLDER, MODEL, PYTHON, URL, case
from lm_eval.api.task import ConfigurableTask

HELD_OUT = Path(__file__).parents[2] / "tests" / "data" / "heldout" / "sotu.txt"
WINDOW, SIZE, COUNT = 1024, 1500, 8  # each text fits into a window, so both score it whole
folder = Path(tempfile.mkdtemp())
whole = HELD_OUT.read_text(encoding="utf-8")
texts = [whole[start : start + SIZE] for start in range(0, SIZE * COUNT, SIZE)]


def evaluated(kind, **about):
    data = folder / f"{kind}.json"
    data.write_text(json.dumps([{"text": text, "next": text[:9]} for text in texts]))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    config = {"task": kind, **files, "test_split": "test", "output_type": kind, **about}
    model = f"model={MODEL},base_url={URL}/v1/completions,tokenizer={FOLDER},max_length={WINDOW}"
    model += ",tokenizer_backend=huggingface,num_concurrent=2"
    tasks = [ConfigurableTask(config=config)]
    found = lm_eval.simple_evaluate("local-completions", model_args=model, tasks=tasks)
    return next(iter(found["results"].values()))


@case
def bits_per_byte_are_those_of_slotmoe_eval():
    rolling = evaluated("loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}")
    command = [PYTHON, "-m", "slotmoe", "eval", FOLDER, "--window", str(WINDOW), "--json"]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        command += ["--text", str(folder / f"{number}.txt")]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert abs(rolling["bits_per_byte,none"] - report["bits_per_byte"]) <= 1e-4


@case
def answers_until_a_stop():
    asked = {"doc_to_text": "{{text}}", "doc_to_target": "{{next}}"}
    asked["metric_list"] = [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    ]
    asked["generation_kwargs"] = {"until": ["."], "max_gen_toks": 12, "temperature": 0}
    assert "exact_match,none" in evaluated("generate_until", **asked)
