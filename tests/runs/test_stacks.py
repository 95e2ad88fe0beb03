"""Asking for the stacks of a process that works on."""

from __future__ import annotations

import subprocess
import sys

# A thread asks for its own process's stacks again and again, and runs on; the main thread waits, as in a collective.
ASKS_ITSELF = """
import os, threading
from batchgen.runs import stacks

def deeper(depth):
    return sum(deeper(depth - 1) for _ in range(2)) if depth else 1

def ask():
    try:
        for _ in range(300):
            with stacks.answering():
                assert stacks._ask(os.getpid())
                deeper(9)
                said = stacks._answer(os.getpid())
            assert "in ask" in said and "in wait" in said, said
        good.append(True)
    finally:
        done.set()

good, done = [], threading.Event()
threading.Thread(target=ask).start()
done.wait()
assert good
"""


def test_a_process_that_asks_itself_lives_on() -> None:
    ended = subprocess.run([sys.executable, "-c", ASKS_ITSELF], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr[-2000:]
