"""Decisions over integers, without torch; ``cache`` has the policies of these names."""

POLICIES = ("lru", "lfu-decay", "learned")
BY_KERNELS = ("learned",)  # those that native kernels compute
DEFAULT, WITHOUT_KERNELS = "learned", "lfu-decay"  # where kernels are there, and where they are not


def available(kernels: bool) -> list[str]:
    """The policies that a machine with or without native ``kernels`` has."""
    return [policy for policy in POLICIES if kernels or policy not in BY_KERNELS]
