"""The twin of a GPU with clocks that are counted, not waited for: when the host, the compute stream
and the one copy engine are free.

Nothing sleeps, so a machine's load changes nothing.  The host pays for each launch and each call of
the device, and for each expert that it computes; a kernel and a copy begin when their stream, what
they wait for and the host are ready.
"""

from dataclasses import dataclass

from tests.support.twin import Point, Twin


@dataclass(frozen=True)
class Rates:
    """Seconds: of a record over the link, of a record through the CPU's kernels, of a kernel, of a
    call by the host, and until a host that waits goes on."""

    copy: float
    compute: float
    kernel: float = 5e-6
    call: float = 8e-6
    wake: float = 15e-6


class TimedTwin(Twin):
    """``small_by_engine``: the copy engine carries small tensors too, behind the records in
    flight, as torch's own copies are."""

    def __init__(self, rates, small_by_engine=False):
        super().__init__()
        self.rates, self._by_engine = rates, small_by_engine
        self.host = self.stream = self.engine = 0.0  # when each is free
        self.idle, self.gaps = 0.0, []  # of the engine; from a choice to the first copy behind it
        self._ends, self._chosen = {}, None

    def backend(self, kernels, threads):
        return super().backend("torch", threads)

    def _call(self):
        self.host += self.rates.call

    def launch(self, rows):
        super().launch(rows)
        self._kernel(2)  # gate and up, down

    def _kernel(self, count=1):
        self.host += count * self.rates.call
        self.stream = max(self.stream, self.host) + count * self.rates.kernel

    def record(self):
        point = Point(self._tick)
        point.at = self.stream
        return point

    def wait(self, event):
        super().wait(event)
        self.stream = max(self.stream, self._ends.get(event, 0.0))

    def copy(self, source, target, after):
        self._call()
        copy = super().copy(source, target, after)
        begin = max(self.engine, self.host, after.at)
        self.idle += begin - self.engine if self.engine else 0.0
        self.engine = self._ends[copy] = begin + self.rates.copy
        if self._chosen is not None:
            self.gaps.append(begin - self._chosen)
            self._chosen = None
        return copy

    def _small(self):
        """A small tensor on its way: a kernel, or the engine's next copy."""
        self._kernel()
        if self._by_engine:
            self.engine = self.stream = max(self.engine, self.stream) + self.rates.kernel

    def write(self, source, target):
        self._small()
        super().write(source, target)

    def download(self, *tensors):
        for _ in tensors:
            self._small()
        download, twin, at = super().download(*tensors), self, self.stream

        class Timed:
            def get(self):
                twin.host = max(twin.host, at) + twin.rates.wake
                twin._chosen = twin.host
                return download.get()

            def others(self):
                return download.others()

        return Timed()

    def cpu(self, ops):
        """``ops`` of the CPU, whose experts take their time."""
        original, twin = ops.experts, self

        def experts(x_TD, records, slots_E, indices_TK, y_TKD):
            twin.host += twin.rates.compute * int((slots_E >= 0).sum())
            original(x_TD, records, slots_E, indices_TK, y_TKD)

        ops.experts = experts

    @property
    def now(self):
        return max(self.host, self.stream)
