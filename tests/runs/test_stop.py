"""The stop request: real signals in real processes."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import suppress

import pytest

from batchgen.runs.stop import SIGNALS, Stop
from tests.checkpoint.folders import start

WAIT = """
import sys, time
from batchgen.runs.stop import Stop
stop = Stop()
with stop.on_signals():
    print("ready", flush=True)
    while not stop():
        time.sleep(0.01)
    print(stop.reason, stop.signal, flush=True)
    if len(sys.argv) > 1:
        time.sleep(60)
"""


def ready(*arguments: object) -> subprocess.Popen[str]:
    process = start(WAIT, *arguments)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_the_process_ends_in_order(number: signal.Signals) -> None:
    process = ready()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, f"stopped by {number.name} {number.value}\n", "")


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    process = ready("stay")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped by SIGINT 2\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err


def test_a_second_sigterm_changes_nothing() -> None:
    process = ready("stay")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped by SIGTERM 15\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.communicate()


def test_the_first_reason_stays() -> None:
    stop = Stop()
    assert not stop()
    stop.request("the disk is full")
    stop.request("stopped by SIGTERM")
    assert stop()
    assert stop.reason == "the disk is full"
    assert stop.signal is None


def test_the_handlers_of_before_come_back_even_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with suppress(RuntimeError), Stop().on_signals():
        assert not set(before) & {signal.getsignal(number) for number in SIGNALS}
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_leaves_the_signals_to_their_owner() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def work() -> None:
        with Stop().on_signals():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before
