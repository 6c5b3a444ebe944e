import signal
import subprocess
import sys
import threading

import pytest

from fasttrain.system.signals import catch_signals

pytestmark = pytest.mark.usefixtures("default_sigint")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """These lines in a process of their own, after two that import what they need."""
    imports = "import signal\nfrom fasttrain.system.signals import catch_signals, ignore_sigterm\n"
    return subprocess.run([sys.executable, "-c", imports + code], capture_output=True, text=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_note_and_the_handlers_come_back(signum: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with catch_signals() as signalled:
        assert signalled() is None
        signal.raise_signal(signum)
        assert signalled() == signum
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_ends_the_block_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), catch_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after the second signal")


def test_a_second_sigterm_ends_the_process() -> None:
    code = (
        "with catch_signals():\n    signal.raise_signal(signal.SIGTERM)\n    print('first', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print('second', flush=True)\n"
    )
    done = run_python(code)
    assert (done.stdout, done.returncode) == ("first\n", -signal.SIGTERM)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_destructor_is_not_lost(signum: signal.Signals) -> None:
    """Python only prints an exception that a destructor raises, and goes on."""
    code = (
        "import time\nfrom fasttrain.system.signals import raise_on_signals\n"
        f"class Ends:\n    def __del__(self):\n        signal.raise_signal({int(signum)})\n"
        "try:\n    with raise_on_signals():\n        Ends()\n        time.sleep(10)\n"
        "except KeyboardInterrupt as stop:\n    print(type(stop).__name__)\n"
    )
    done = run_python(code)
    name = "KeyboardInterrupt" if signum == signal.SIGINT else "Interrupted"
    assert (done.stdout, done.stderr, done.returncode) == (f"{name}\n", "", 0)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with catch_signals() as signalled:
            signal.raise_signal(signal.SIGINT)
            assert signalled() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_that_ends_itself_has_its_say_before_sigterm() -> None:
    code = (
        "with catch_signals():\n    signal.raise_signal(signal.SIGTERM)\n    ignore_sigterm()\n"
        "    signal.raise_signal(signal.SIGTERM)\nsignal.raise_signal(signal.SIGTERM)\nprint('why')\n"
    )
    done = run_python(code)
    assert (done.stdout, done.returncode) == ("why\n", 0)


def test_another_thread_leaves_the_signals_alone() -> None:
    handlers = []

    def body() -> None:
        with catch_signals() as signalled:
            handlers.append(signal.getsignal(signal.SIGINT))
            assert signalled() is None

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 on this system")
def test_sigusr1_prints_every_threads_stack() -> None:
    code = "with catch_signals():\n    signal.raise_signal(signal.SIGUSR1)\n"
    done = run_python(code)
    assert done.returncode == 0 and "line 4 in <module>" in done.stderr
