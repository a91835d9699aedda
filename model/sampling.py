"""How tokens are chosen, and what a model says of that; without torch."""

import math
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from slotmoe.errors import ConfigError, check_types
from slotmoe.jsonfile import Json

OWN_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of a model
_FINITE = sys.float_info.max
RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 1_000_000, False),
    "top_p": (0, 1, True),
    "top_k": (0, math.inf, False),
    "seed": (0, (1 << 63) - 1, False),
    "min_p": (0, 1, False),
    "repetition_penalty": (0, 1000, True),
    "presence_penalty": (-_FINITE, _FINITE, False),
    "frequency_penalty": (-_FINITE, _FINITE, False),
}
"""The least and the most of each setting, and whether it has to be above the least."""


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep every token.

    ``repetition_penalty`` divides or multiplies the logits of what prompt and answer hold (arXiv
    1909.05858), 1 is off; ``presence_penalty`` and ``frequency_penalty`` are taken from those of
    what the answer holds, once or once per time, as OpenAI's API defines them; ``logit_bias`` (id,
    value) is added.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        check_types(vars(self), type(self).__annotations__)
        for name, (least, most, is_open) in RANGES.items():
            value = getattr(self, name)
            if value is None or (least < value <= most) or (value == least and not is_open):
                continue
            start = f"above {least}" if is_open else f"from {least}"
            end = "" if most == math.inf else f" to {most}"
            raise ConfigError(f"{name} is {value}, expected a number {start}{end}")
        if not all(math.isfinite(by) for _, by in self.logit_bias):
            raise ConfigError(f"logit_bias is {self.logit_bias}, expected finite numbers")

    def with_given(self, **given: Any) -> "Sampling":
        """The same with those of ``given`` that are not None.  Raises ``ConfigError``."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


class Generation(NamedTuple):
    """What a model says of its texts: the tokens at which they end, and how to choose tokens."""

    eos_token_ids: tuple[int, ...]
    sampling: Sampling

    @classmethod
    def of(cls, eos_token_ids: Collection[int], about: Json) -> "Generation":
        """By ``generation_config.json``, and by the config's ``eos_token_ids``.  A setting that is
        not given, or that no ``Sampling`` can have, is off, the temperature 1."""
        ends, sampling = about.get("eos_token_id"), Sampling(temperature=1.0)
        ends = ends if isinstance(ends, list) else [ends]
        for name in OWN_SETTINGS:
            with suppress(KeyError, TypeError, ValueError, OverflowError, ConfigError):
                value = (int if name == "top_k" else float)(about[name])
                sampling = sampling.with_given(**{name: value})
        if about.get("do_sample") is False:
            sampling = sampling.with_given(temperature=0.0)
        return cls(tuple({*eos_token_ids, *(i for i in ends if isinstance(i, int))}), sampling)
