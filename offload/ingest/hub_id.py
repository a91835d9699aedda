"""What the name of a model can mean, without importing what it takes to open one."""

import re


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``owner/model``; ``folder/model.gguf`` is a file."""
    if name.endswith(".gguf"):
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name) is not None
