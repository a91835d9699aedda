"""Fixtures that several files share: the bundled sample as a checkpoint and as an export."""

import os
from pathlib import Path

import pytest

import model
from offload.quantize import quantize

SAMPLE = Path(model.__file__).parent / "sample"


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Nothing a test does may depend on, or leave anything in, the user's own cache folder."""
    os.environ["SLOTMOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def sample_export(tmp_path_factory):
    """The bundled sample, quantized with the default settings."""
    destination = tmp_path_factory.mktemp("sample") / "export"
    quantize(SAMPLE, destination)
    return destination
