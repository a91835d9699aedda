"""Small models that campaigns attack."""

import json

from slotmoe.offload.ingest.quantize import quantize
from tests.support.tiny import SAMPLE, SMALL, write_checkpoint

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def sample_export(folder):
    quantize(SAMPLE, folder / "sample")
    return folder / "sample"


def talking(folder, shards=1, **sizes):
    """A checkpoint ``source`` with a chat template, and its ``export``."""
    write_checkpoint(folder / "source", shards, **sizes)
    path = folder / "source" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    quantize(folder / "source", folder / "export")


def few_words(folder, shards=1, layers=2, words=300):
    """A tiny checkpoint whose tokenizer has few ``words``: a large one is read, not understood."""
    sizes = {**SMALL, "num_hidden_layers": layers, "vocab_size": words}
    write_checkpoint(folder, shards, **sizes)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    model = tokenizer["model"]
    model["vocab"] = {word: id_ for word, id_ in model["vocab"].items() if id_ < words}
    pairs = (pair if isinstance(pair, list) else pair.split() for pair in model["merges"])
    model["merges"] = [list(pair) for pair in pairs if "".join(pair) in model["vocab"]]
    path.write_text(json.dumps(tokenizer))


def tiny_export(folder):
    few_words(folder / "checkpoint", layers=3)
    quantize(folder / "checkpoint", folder / "export", workers=1)
    return folder / "export"
