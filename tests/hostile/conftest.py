"""A valid checkpoint in two shards and its export; tests work on copies."""

import shutil

import pytest

from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from tests.support.tiny import write_checkpoint


@pytest.fixture(scope="package")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(folder / "checkpoint", shards=2)
    options = {"resident": "nf4", "codecs": EXPERT_CODECS["nf4", "4"]}
    quantize(folder / "checkpoint", folder / "export", **options)
    return folder


@pytest.fixture
def checkpoint(good, tmp_path):
    shutil.copytree(good / "checkpoint", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def export(good, tmp_path):
    shutil.copytree(good / "export", tmp_path / "export")
    return tmp_path / "export"
