"""Exports that are made when a checkpoint is run: one in the cache for each source's content."""

import shutil
from pathlib import Path

from slotmoe.model.gguf.checkpoint import open_checkpoint
from slotmoe.offload import model_cache
from slotmoe.offload.ingest import output_dir
from slotmoe.offload.ingest.encoder import codecs_for
from slotmoe.offload.ingest.quantize import Notify, Progress, ignore, quantize, resident_mode
from slotmoe.offload.plan.memory import export_bytes, sizes_of
from slotmoe.quant.export.layout import FORMAT_VERSION
from slotmoe.sizes import format_size


def cached_export(
    source: Path,
    cache: Path,
    progress: Progress | None = None,
    reading: Progress = ignore,
    notify: Notify = ignore,
) -> Path:
    """Export of the checkpoint ``source`` in the folder ``cache``, quantized now if it is not there
    yet.

    It is named after the source's content (``slotmoe.offload.model_cache``), which is read,
    ``reading(done, total)`` in bytes, when it is new here or has changed.  ``notify`` is
    told where the export will be.
    """
    files = model_cache.contents(source)
    note = model_cache.note_of(source, files, FORMAT_VERSION, cache)
    known = model_cache.noted_export(note)
    if known is not None and model_cache.is_export(cache / known):
        model_cache.mark_used(cache / known)
        return cache / known
    key = model_cache.content_key(files, FORMAT_VERSION, reading)
    destination = model_cache.with_key(cache, key)
    if destination is None:
        destination = cache / f"{source.resolve().name}-{key}"
        output_dir.make_cache(cache)
        with open_checkpoint(source) as checkpoint:
            config, codecs = checkpoint.config, codecs_for(checkpoint)
        sizes = sizes_of(config, resident_mode("auto"), codecs)
        size = format_size(export_bytes(config, sizes))
        free = format_size(shutil.disk_usage(cache).free)
        notify(f"{source} is quantized once, into {destination}: {size} of {free} that are free")
        quantize(source, destination, wait_for_lock=True, progress=progress or ignore)
    model_cache.note_export(note, destination.name, source)
    model_cache.mark_used(destination)
    return destination
