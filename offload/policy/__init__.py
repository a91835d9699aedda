"""Decisions over integers, without torch; ``cache`` has the policies of these names."""

POLICIES = (
    "lru",
    "lfu",
    "lfu+bypass",
    "lrfu",
    "lrfu+bypass",
    "least-stale",
    "least-stale+bypass",
    "layer-aware",
    "layer-aware+bypass",
    "learned",
    "learned+bypass",
)
# The most hits at every size and on every text: `slotmoe replay`.
DEFAULT_POLICY = "learned+bypass"
