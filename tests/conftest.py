"""Fixtures of all tests: model folders, built once a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import PACKAGES, Cluster, missing

_READER = """
import os
from batchgen.engines.ds_zero import extensions
from batchgen.models import cache_folder
extensions.prepare(cache_folder(os.environ), print)
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Of tests in one process. A worker of pytest-xdist collects too, and leaves the building to who started it."""
    if not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        _begin_to_build(session.config, [one.nodeid for one in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """The same where workers run the tests, which all collect the same ones: of the first of them."""
    if node.gateway.id == "gw0":
        _begin_to_build(node.config, ids)


def _begin_to_build(config: pytest.Config, tests: Sequence[str]) -> None:
    """Begins to build what the tests of NVMe need minutes of, and only late: beside the others it takes less."""
    if not any("test_ds_zero" in name for name in tests):
        return
    # One core, when nobody else wants it.
    command = ["nice", "-n", "19", sys.executable, "-W", "ignore", "-c", _READER]
    environment = {**os.environ, "MAX_JOBS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    quiet = subprocess.DEVNULL
    builder = subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    config.add_cleanup(lambda: (builder.kill(), builder.wait()))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer and a chat template; 512 tokens of context, float32."""
    from tests import tiny_models as models

    return models.save(tmp_path_factory.mktemp("models") / "llama", models.llama)


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLOOM (ALiBi, no position ids), same tokenizer, no chat template."""
    from tests import tiny_models as models

    return models.save(tmp_path_factory.mktemp("models") / "bloom", models.bloom, chat=False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, prepared in the user's own cache, where the next session finds it."""
    from batchgen.models import cache_folder, prepare_default

    return prepare_default(cache_folder(os.environ), print)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm of two nodes, with four GPUs each that are none. `scripts/test` installs it where it can."""
    if missing():
        why = f"no {', '.join(missing())}: apt-get install {PACKAGES}"
        # CI must not pass by leaving these tests out.
        pytest.fail(why) if os.environ.get("REQUIRE_SLURM") else pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
