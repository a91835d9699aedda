"""Chat templates of our own, for models that ship Python code in place of one.

They are data, and run where a model's own template does.  Sources: the README, the encoder and the
tests in the folder ``encoding`` of each model on the hub.
"""

from pathlib import Path

_FOLDER = Path(__file__).with_name("templates")
_FILES = {
    "DeepseekV32ForCausalLM": "deepseek-v3.2.jinja",
    "DeepseekV4ForCausalLM": "deepseek-v4.jinja",
}


def own_template(architecture: str) -> str | None:
    """The template for a model of ``architecture`` whose files have none; None if it is not one of
    those."""
    file = _FILES.get(architecture)
    return None if file is None else (_FOLDER / file).read_text(encoding="utf-8")
