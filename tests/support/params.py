"""Long lists of parameters."""

import pytest


def nth(step, parameters, quick=None):
    """All ``parameters``: each ``step``-th runs in the usual tests, in quick ones if ``quick`` has
    its first value or is None, the others with ``-m slow``.  A step without a common divisor with
    the lengths of the lists that ``parameters`` are a product of meets every value of each."""
    found = list(parameters)
    for at, one in enumerate(found):
        values = one if isinstance(one, tuple) else (one,)
        if at % step or (quick and values[0] not in quick):
            mark = pytest.mark.slow if at % step else pytest.mark.full
            found[at] = pytest.param(*values, marks=mark)
    return found
