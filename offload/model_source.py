"""A model as it lies on disk: an export, a checkpoint folder, or a GGUF file."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import parse_json
from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.model.config import Config, config_among
from slotmoe.model.files import ReadFile
from slotmoe.model.generate import Generation
from slotmoe.model.gguf.checkpoint import open_checkpoint
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import locate
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
        return config, open_tokenizer(config, source.small_file, path)


def open_tokenizer(config: Config, read: ReadFile, path: Path) -> Tokenizer:
    """The tokenizer of the model at ``path``.  Raises ``ConfigError``."""
    verdicts = None
    with suppress(ConfigError):  # without a cache folder each is parsed anew
        verdicts = cache_folder() / "tokenizers"
    own = config.family.own_template
    return Tokenizer(path, config.bos_token_id, read, verdicts, own, config.vocab_size)


def generation_of(config: Config, read: ReadFile, path: Path) -> Generation:
    """What the model at ``path`` says of its texts.  Raises ``ConfigError``."""
    path = path / "generation_config.json"
    data = read(path.name, 1 << 20)
    return Generation.of(config.eos_token_ids, {} if data is None else parse_json(data, path))


def resolve_model(path: str | Path, revision: str | None = None, **reporting: Any) -> Path:
    """Path of a ``MODEL``, as ``locate`` finds it.  A hub id becomes an export in the cache folder
    first; ``slotmoe.offload.ingest.hub.hub_export`` gets ``revision`` and ``reporting``.  Raises
    ``ConfigError``, and what that raises."""
    if (folder := locate(path, revision)) is not None:
        return folder
    from slotmoe.offload.ingest.hub import hub_export

    return hub_export(str(path), revision, cache_folder(), **reporting)
