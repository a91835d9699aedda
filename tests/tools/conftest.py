"""Fixtures of the server's tests."""

from functools import cache

import pytest

from slotmoe.model.child import Child
from slotmoe.offload.runtime import Runtime
from tests.support.served import Served


@pytest.fixture(scope="session", autouse=True)
def one_child_for_each_input():
    """Most requests here are about other things than their chat template, whose child takes a tenth
    of a second; the same input gives the same output.  Errors are not kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "run", cache(Child.run))
        yield


@pytest.fixture(scope="module")
def context():
    """Of ``runtime``; a file may override it."""
    return 512


@pytest.fixture(scope="module")
def runtime(sample_export, context):
    with Runtime.open(sample_export, ram="2GiB", context=context, sequences=8) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def served(network, processes, runtime):
    with Served(runtime) as served:
        yield served
