"""What the name of a model can mean, without importing what it takes to open one."""

from __future__ import annotations

import re
from importlib.util import find_spec

from slotmoe.errors import ConfigError


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``owner/model``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name) is not None


def require_hub_library() -> None:
    """Raise ``ConfigError`` that names the extra unless huggingface_hub is installed."""
    if find_spec("huggingface_hub") is None:
        raise ConfigError(
            "a model on the hub needs huggingface_hub, which is not installed: "
            "pip install 'slotmoe[hub]', or give the path of a folder that holds the model"
        )
