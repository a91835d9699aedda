"""A model as it lies on disk: an export, a checkpoint folder, or a GGUF file."""

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json, ReadFile, parse_json
from slotmoe.model.checkpoint.reader import Checkpoint, open_checkpoint
from slotmoe.model.config import Config, config_among
from slotmoe.model.sampling import Generation
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.devices.pages import Arena
from slotmoe.offload.machine import cache_folder
from slotmoe.quant.backends.base import Prepared
from slotmoe.quant.codecs.weight import Weight
from slotmoe.quant.export.layout import MANIFEST
from slotmoe.quant.export.reader import Export

Place = Callable[[str, Weight], Prepared]
"""Copies a weight, by its checkpoint name, to where it is multiplied."""

_LOADERS = 6  # threads: more than cores, since reading waits for the disk; 4 were no faster


def read_model(path: Path) -> tuple[Config, Tokenizer]:
    """``small_parts`` of the export or checkpoint at ``path``, which is opened and checked.  Raises
    ``ExportError``, ``CheckpointError`` or ``ConfigError``."""
    is_export = (path / MANIFEST).is_file()
    with Export.open(path) if is_export else open_checkpoint(path) as source:
        return small_parts(source, path)


def small_parts(source: Export | Checkpoint, path: Path) -> tuple[Config, Tokenizer]:
    """Config and tokenizer of the model at ``path``, of which ``Runtime`` can read all small files.
    Raises ``ConfigError``, and what reading raises."""
    config = config_among(source.small_file, path)
    generation_of(config, source.small_file, path)
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
    return Generation.of(config.eos_token_ids, {} if data is None else parse_json(data, path, Json))


def load_resident(
    export: Export, shapes: Mapping[str, tuple[int, ...]], place: Place
) -> dict[str, Prepared]:
    """The weights of ``shapes``, verified and placed; reading and copying overlap."""
    thread = threading.local()  # each thread's staging memory

    def load(name: str) -> Prepared:
        if not hasattr(thread, "staging"):
            thread.staging = Arena(4 << 20, alignment=4096)
        thread.staging.reuse()
        weight = export.resident(name, thread.staging.empty)
        if tuple(weight.shape) != shapes[name]:
            asked = f"config.json asks for {list(shapes[name])}"
            raise ConfigError(f"{export.folder}: {name} has shape {list(weight.shape)}, {asked}")
        return place(name, weight)

    pool = ThreadPoolExecutor(_LOADERS)
    try:
        # The largest first, so that no thread ends alone.
        names = sorted(shapes, key=lambda name: -math.prod(shapes[name]))
        return dict(zip(names, pool.map(load, names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
