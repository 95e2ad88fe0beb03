"""Fixtures of all tests: model folders, built once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer and a chat template; 512 tokens of context, float32."""
    from tests import models

    return models.save(tmp_path_factory.mktemp("models") / "llama", models.llama)


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLOOM (ALiBi, no position ids), same tokenizer, no chat template."""
    from tests import models

    return models.save(tmp_path_factory.mktemp("models") / "bloom", models.bloom, chat=False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, prepared in the user's own cache, where the next session finds it."""
    from batchgen.models import cache_folder, prepare_default

    return prepare_default(cache_folder(os.environ), print)
