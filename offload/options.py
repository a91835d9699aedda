"""What ``Runtime.open`` is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slotmoe.errors import ConfigError, check_types
from slotmoe.offload.policy import POLICIES
from slotmoe.offload.policy.hybrid import MODES
from slotmoe.offload.policy.passes import DRAFTS
from slotmoe.system import MAX_THREADS


@dataclass(frozen=True)
class Options:
    """What ``Runtime.open`` is asked for; it documents them."""

    vram: float | str | None = None
    ram: float | str | None = None
    context: int | None = None
    threads: int | None = None
    cache_policy: str | None = None
    prefetch: bool = True
    quantize: bool = True
    slots: int | None = None
    kernels: str = "auto"
    logits_rows: int = 1
    sequences: int = 1
    misses: str = "auto"
    experts_dirs: Sequence[str | Path] = ()
    draft: str = "off"

    def __post_init__(self) -> None:
        check_types(vars(self), type(self).__annotations__)
        if not 1 <= self.sequences <= 256:
            raise ConfigError(f"sequences is {self.sequences}, expected 1 to 256")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"threads is {self.threads}, expected 1 to {MAX_THREADS}")
        for name, values in (("cache_policy", POLICIES), ("misses", MODES), ("draft", DRAFTS)):
            if (given := getattr(self, name)) is not None and given not in values:
                expected = f"expected one of: {', '.join(values)}"
                raise ConfigError(f"{name} {given!r:.40} is unknown, {expected}")
