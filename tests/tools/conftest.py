"""Fixtures of the server's tests."""

import pytest

from slotmoe.offload.runtime import Runtime
from tests.support.served import Served


@pytest.fixture(scope="module")
def context():
    """Of ``runtime``; a file may override it."""
    return 512


@pytest.fixture(scope="module")
def runtime(sample_export, context):
    with Runtime.open(sample_export, ram="2GiB", context=context, sequences=8) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def served(runtime):
    with Served(runtime) as served:
        yield served
