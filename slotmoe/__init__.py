"""slotmoe: DeepSeek-V2 on one machine whose GPU, perhaps whose RAM, is far smaller.

with slotmoe.Runtime.open("sample") as runtime:
    for token in runtime.generate("It is a truth universally acknowledged,", max_new_tokens=32):
        print(token.text, end="", flush=True)

Names are imported when they are first used: some need torch, and ``slotmoe.signals`` goes first.
"""

from importlib import import_module

TYPE_CHECKING = False  # as typing has it, which takes as long to import as all of this
if TYPE_CHECKING:
    from slotmoe.errors import (
        CheckpointError,
        ConfigError,
        DeviceError,
        DownloadError,
        ExportError,
        PlanError,
        SlotmoeError,
    )
    from slotmoe.model.generate import Token
    from slotmoe.offload.runtime import Runtime
    from slotmoe.quant.export.reader import Export

__version__ = "0.1.0"
__all__ = ["CheckpointError", "ConfigError", "DeviceError", "DownloadError", "Export"]
__all__ += ["ExportError", "PlanError", "Runtime", "SlotmoeError", "Token", "__version__"]
_LAZY = {
    "Export": "slotmoe.quant.export.reader",
    "Runtime": "slotmoe.offload.runtime",
    "Token": "slotmoe.model.generate",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'slotmoe' has no attribute {name!r}")
    return getattr(import_module(_LAZY.get(name, "slotmoe.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
