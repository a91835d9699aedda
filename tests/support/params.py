"""Long lists of parameters."""

import pytest


def nth(step, parameters):
    """All ``parameters``: each ``step``-th runs in the usual tests, the others with ``-m slow``.  A
    step without a common divisor with the lengths of the lists that ``parameters`` are a product of
    meets every value of each."""
    found = list(parameters)
    for at, one in enumerate(found):
        if at % step:
            values = one if isinstance(one, tuple) else (one,)
            found[at] = pytest.param(*values, marks=pytest.mark.slow)
    return found
