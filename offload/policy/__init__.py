"""Decisions over integers, without torch; ``cache`` has the policies of these names."""

POLICIES = (
    "lru",
    "lrfu",
    "lrfu+bypass",
    "layer-aware",
    "layer-aware+bypass",
    "learned",
    "learned+bypass",
)
# The most hits at every size and on every text: `slotmoe replay`.
DEFAULT_POLICY = "learned+bypass"
