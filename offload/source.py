"""A model as it lies on disk: an export, a checkpoint folder, or a GGUF file."""

from pathlib import Path

from slotmoe.jsonfile import parse_json
from slotmoe.model.checkpoint import Checkpoint
from slotmoe.model.config import Config, config_among
from slotmoe.model.files import ReadFile
from slotmoe.model.gguf.checkpoint import open_checkpoint
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.quant.export.layout import MANIFEST
from slotmoe.quant.export.reader import Export


def open_source(path: Path) -> Export | Checkpoint:
    """What is at ``path``, open and checked: a context manager.  Raises ``ExportError``,
    ``CheckpointError`` or ``ConfigError``."""
    return Export.open(path) if (path / MANIFEST).is_file() else open_checkpoint(path)


def read_model(path: Path) -> tuple[Config, Tokenizer]:
    """Config and tokenizer of the model at ``path``.  Raises as ``open_source`` does."""
    with open_source(path) as source:
        config = config_among(source.small_file, path)
        return config, Tokenizer(path, config.bos_token_id, source.small_file)


def eos_token_ids(config: Config, read: ReadFile, path: Path) -> tuple[int, ...]:
    """The tokens at which an answer ends, by the config and by ``generation_config.json``."""
    path = path / "generation_config.json"
    data = read(path.name, 1 << 20)
    value = None if data is None else parse_json(data, path).get("eos_token_id")
    extra = value if isinstance(value, list) else [value]
    return tuple({*config.eos_token_ids, *(id for id in extra if isinstance(id, int))})
