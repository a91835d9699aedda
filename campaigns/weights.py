"""Weights that say anything, under right checksums, for the fuzzer: a model computes from them.

The model is opened once.  For each case the product's own parts read the changed files again and
answer a prompt, in one thread.  Each case of ``WHOLE`` opens the model itself instead.
"""

import ctypes
import threading
from dataclasses import replace
from itertools import count

from campaigns.cases import lawful, sign_manifest
from campaigns.models import tiny_export
from slotmoe.model.generate import Answer, Sampling
from slotmoe.model.names import resident_shapes
from slotmoe.model.network import Network
from slotmoe.offload.devices.device import Device
from slotmoe.offload.engine.batch import Batch
from slotmoe.offload.engine.loading import Options, _Loader
from slotmoe.offload.engine.requests import Request
from slotmoe.offload.experts.ahead import NextGate
from slotmoe.offload.plan.memory import PREFILL_CHUNK
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import RESIDENT, tensor_parts
from slotmoe.quant.export.writer import span_checksums

WHOLE = 256
M_ARENA_MAX = -8  # of mallopt
PROMPT, TOKENS = [1, 2, 3, 2, 1], 2
SIZES = {"context": 32, "ram": "1GiB", "threads": 1}


class Opened:
    """The model of ``export``, and ``manifest``, by which ``file`` is checked when it is read."""

    def __init__(self, export, file):
        self._loader = _Loader(export, Options(**SIZES), Device(), "", print)
        self._model = self._loader.open()
        self._place, self._file = self._loader._placer(), file
        self.layout, self.manifest = self._model.export.layout, self._model.export.manifest
        self._weights, self._names = {}, resident_shapes(self._model.config)
        self._weights = self._resident({*self._names})
        self._network = self._network_of(self._weights)

    def _resident(self, changed):
        """The weights, of which those are read again that the ``changed`` tensors are of."""
        export, place = self._model.export, self._place
        names = [
            name for name in self._names if any(f"{of}.".startswith(f"{name}.") for of in changed)
        ]
        return self._weights | {name: place(name, export.resident(name)) for name in names}

    def _network_of(self, weights):
        model = self._model
        return Network(model.config, weights, model.backend, model.experts, PREFILL_CHUNK)

    def answer(self, changed):
        """What the loader makes of the file, of which those tensors or records are ``changed``,
        then what the engine does."""
        model, loader = self._model, self._loader
        network, weights = self._network, self._weights
        if self._file == RESIDENT:
            network = self._network_of(weights := self._resident(changed))
        gates = NextGate(model.config, weights, model.backend)
        experts = loader._experts(model.export, model.store, gates, [])
        network.experts = experts
        batch = Batch(replace(model, network=network, experts=experts))
        ends = model.generation.eos_token_ids
        request = Request(PROMPT, Answer(PROMPT, model.tokenizer, ends, Sampling(), TOKENS))
        batch.waiting.append(request)
        while batch.waiting or batch.running:
            batch.step()
        experts.slots.close()
        if request.problem is not None:
            raise request.problem


def body(folder, pattern):
    """A parser of the bytes behind the header of the file that ``pattern`` finds."""
    threading.stack_size(1 << 20)  # the limit is of addresses, and a thread takes many: for its
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # stack, and for a heap of its own
    export = tiny_export(folder)
    (path,) = export.glob(pattern)
    name = str(path.relative_to(export))
    opened, cases = Opened(export, name), count()
    entry = opened.manifest["files"][name]
    good, start = path.read_bytes(), entry["header_bytes"]
    places, spans = zip(*spans_of(entry, opened.layout.record_bytes), strict=True)
    right = span_checksums(path, spans)[1]

    def parse(data):
        data = (data + good[start + len(data) :])[: len(good) - start]
        path.write_bytes(good[:start] + data)
        entry["checksum"], sums = span_checksums(path, spans)
        changed = []
        for (name, into, key), digest, before in zip(places, sums, right, strict=True):
            into[key] = digest
            changed += [name] * (digest != before)
        if next(cases) % WHOLE:
            return lawful(lambda: opened.answer(changed))
        (export / "slotmoe.json").write_bytes(sign_manifest(opened.manifest))
        return lawful(lambda: answer_alone(export))

    return [good[start:]], parse


def spans_of(entry, record_bytes):
    """Of each tensor or record of a file: its name, where its checksum is kept and under which key,
    and of which bytes it is."""
    start = entry["header_bytes"]
    for number in range(len(entry.get("records", ()))):
        first = start + number * record_bytes
        yield (number, entry["records"], number), (first, first + record_bytes)
    for name, part in tensor_parts(entry).items() if "tensors" in entry else ():
        yield (name, entry["tensors"][name], "checksum"), part.span(start)


def answer_alone(export):
    with Runtime.open(export, **SIZES) as runtime:
        list(runtime.generate(PROMPT, TOKENS))
