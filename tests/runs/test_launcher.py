"""Ranks as processes of this host. What they do for a run is in tests/commands/test_ranks.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from batchgen.checkpoint import Attempt, RunFolder, claim
from batchgen.runs import launcher
from batchgen.runs.launcher import RankError, start_ranks
from batchgen.runs.stop import Stop
from batchgen.world import World, from_environment
from tests.commands.starts import ENVIRONMENT, is_alive, until


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    folder = RunFolder(tmp_path / "out")
    folder.make()
    return claim(folder, World(), {}, 5.0)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `batchgen` whose ranks do what `rank.py` beside it says."""
    package = tmp_path / "stand-in" / "batchgen"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    program = "import os, sys, pathlib\nexec((pathlib.Path(__file__).parent.parent / 'rank.py').read_text())\n"
    (package / "__main__.py").write_text(program)
    monkeypatch.chdir(package.parent)  # `python -m` looks there first
    return package.parent


def test_ranks_get_the_variables_of_torchrun_and_the_attempt(ranks: Path, attempt: Attempt) -> None:
    (ranks / "rank.py").write_text(
        "import json; open('env-' + os.environ['RANK'], 'w').write(json.dumps(dict(os.environ)))"
    )
    environment = {**ENVIRONMENT, "TORCHELASTIC_USE_AGENT_STORE": "True", "MINE": "kept"}
    assert start_ranks(attempt, ["run"], 2, Stop(), environment) == [0, 0]
    found = [json.loads((ranks / f"env-{rank}").read_text()) for rank in range(2)]
    for rank, variables in enumerate(found):
        world = from_environment(variables)
        assert (world.rank, world.local_rank, world.size, world.local_size) == (rank, rank, 2, 2)
        assert world.attempt == attempt.number
        assert variables["BATCHGEN_STARTER"] == str(os.getpid())
        assert variables["MINE"] == "kept"
        assert "TORCHELASTIC_USE_AGENT_STORE" not in variables  # the store of a torchrun around the starter
        assert int(variables["OMP_NUM_THREADS"]) >= 1
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]


def test_ranks_get_the_command_and_their_stdout_is_stderr(
    ranks: Path, attempt: Attempt, capfd: pytest.CaptureFixture[str]
) -> None:
    (ranks / "rank.py").write_text("print(sys.argv[1:])")
    assert start_ranks(attempt, ["run", "two words"], 1, Stop(), ENVIRONMENT) == [0]
    assert capfd.readouterr() == ("", "['run', 'two words']\n")


@pytest.mark.parametrize("dying", [0, 1, 2])
def test_whichever_rank_dies_the_others_are_asked_to_end(ranks: Path, attempt: Attempt, dying: int) -> None:
    (ranks / "rank.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"if os.environ['RANK'] == '{dying}':\n    sys.exit(9)\n"
        "time.sleep(60)\n"
    )
    stop = Stop()
    codes = start_ranks(attempt, [], 3, stop, ENVIRONMENT)
    assert codes[dying] == 9
    assert 9 not in codes[:dying] + codes[dying + 1 :]
    assert stop.reason == f"rank {dying} died (exit code 9)"


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["no folder", "no folder", "no folder"], "no folder"),
        (["no folder", "", "no folder"], "ranks 0 and 2: no folder"),
        (["no folder", "no disk", "no folder"], "ranks 0 and 2: no folder\nrank 1: no disk"),
    ],
)
def test_what_ranks_tell_their_starter_is_said_once(
    ranks: Path, attempt: Attempt, told: list[str], sentence: str
) -> None:
    (ranks / "rank.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open('here-' + os.environ['RANK'], 'w')\n"
        "while not all(os.path.exists(f'here-{rank}') for rank in range(3)): time.sleep(0.01)\n"
        f"os.write(int(os.environ['BATCHGEN_TOLD_TO']), {told!r}[int(os.environ['RANK'])].encode())\n"
        "sys.exit(4)\n"
    )
    with pytest.raises(RankError) as caught:
        start_ranks(attempt, [], 3, Stop(), ENVIRONMENT)
    assert str(caught.value) == sentence


def test_a_rank_that_tells_why_it_dies_is_quoted(ranks: Path, attempt: Attempt) -> None:
    (ranks / "rank.py").write_text(
        "if os.environ['RANK'] == '1':\n"
        "    os.write(int(os.environ['BATCHGEN_TOLD_TO']), b'ValueError: odd, with rows a, b in work')\n"
        "    sys.exit(75)\n"
    )
    stop = Stop()
    assert start_ranks(attempt, [], 2, stop, ENVIRONMENT) == [0, 75]
    assert stop.reason == "rank 1 died: ValueError: odd, with rows a, b in work"


def test_rank_that_does_not_end_when_asked_is_killed(
    ranks: Path, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.2)
    (ranks / "rank.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open('deaf-' + os.environ['RANK'], 'w')\n"
        "while not all(os.path.exists(f'deaf-{rank}') for rank in range(2)): time.sleep(0.01)\n"
        "if os.environ['RANK'] == '1': sys.exit(9)\n"
        "time.sleep(60)\n"
    )
    assert start_ranks(attempt, [], 2, Stop(), ENVIRONMENT) == [-signal.SIGKILL, 9]


def test_signal_of_the_starter_is_passed_on_once(ranks: Path, attempt: Attempt) -> None:
    (ranks / "rank.py").write_text(
        "import signal, time\n"
        "got = []\n"
        "signal.signal(signal.SIGUSR2, lambda number, _: got.append(number))\n"
        "open('ready-' + os.environ['RANK'], 'w')\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "sys.exit(len(got) - 1)\n"
    )
    stop = Stop()

    def ask() -> None:
        until(lambda: len(list(ranks.glob("ready-*"))) == 2)
        os.kill(os.getpid(), signal.SIGUSR2)

    asking = threading.Thread(target=ask)
    with stop.on_signals():
        asking.start()
        assert start_ranks(attempt, [], 2, stop, ENVIRONMENT) == [0, 0]
    asking.join()
    assert stop.reason == "stopped by SIGUSR2"


def test_no_rank_is_started_after_a_stop_request(ranks: Path, attempt: Attempt) -> None:
    (ranks / "rank.py").write_text("open('started', 'w')")
    stop = Stop()
    stop.request("stopped by SIGTERM")
    assert start_ranks(attempt, [], 2, stop, ENVIRONMENT) == []
    assert not (ranks / "started").exists()


DIES_WITH_ITS_PARENT = """
import os, sys, time
from batchgen.runs.launcher import die_with
die_with(int(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {DIES_WITH_ITS_PARENT!r}, str(os.getpid())])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_rank_dies_with_its_starter() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        assert is_alive(child)
        parent.kill()
        until(lambda: not is_alive(child))


def test_rank_whose_starter_is_gone_already_does_not_start() -> None:
    other = subprocess.Popen([sys.executable, "-c", ""])
    other.wait()
    command = [sys.executable, "-c", DIES_WITH_ITS_PARENT, str(other.pid)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (75, "")


def test_a_frozen_rank_is_not_waited_for(ranks: Path, attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 3600.0)
    (ranks / "rank.py").write_text(
        "import signal, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    while open('/proc/' + pathlib.Path('frozen').read_text() + '/stat').read().split()[2] != 'T':\n"
        "        time.sleep(0.01)\n"
        "    sys.exit(9)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path('mine').write_text(str(os.getpid()))\n"
        "os.rename('mine', 'frozen')\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    (ranks / "frozen").write_text("self")
    assert start_ranks(attempt, [], 2, Stop(), ENVIRONMENT) == [9, -signal.SIGKILL]
