"""The command line as it is typed: help, names, and how a command that is cut short ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fasttrain
from fasttrain import cli
from fasttrain.__main__ import main as run_process
from fasttrain.cli import main
from fasttrain.data.dataset import Dataset
from fasttrain.distributed import World
from fasttrain.errors import Interrupted, TrainingInterrupted, UserError
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.system import program
from fasttrain.system.run_log import RunLog
from fasttrain.system.signals import STOPPING, raise_on_signals

ROOT = Path(__file__).resolve().parents[1]
METRICS = {
    "epoch": 24,
    "train_loss": 2.30261,
    "train_accuracy": 1.0,
    "test_loss": 10.1234,
    "test_accuracy": 1.0,
    "test_accuracy_views": 1.0,
    "lr": 1.23e-05,
    "seconds": 12345.678,
    "images_per_sec": 1234567.8,
    "data_wait_share": 0.0123,
}


def start(*args: str, **options) -> subprocess.Popen[str]:
    """`fasttrain` in a process that handles signals as one that a terminal started."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"import sys; sys.argv[1:] = {list(args)!r}\n"
    code += "from fasttrain.__main__ import main; sys.exit(main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **options}
    return subprocess.Popen([sys.executable, "-c", code], **pipes)


@pytest.mark.parametrize("args", [[], ["help"], ["--help"], ["-h"]])
def test_help_lists_every_command(args: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.findall(r"^  ([a-z-]+) +\S", said.split("commands:")[1], re.MULTILINE) == list(cli.COMMANDS)


def test_help_of_a_command_and_the_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["help", "predict"])
    assert stop.value.code == 0 and "--top-k" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(
        rf"fasttrain {fasttrain.__version__} \([0-9a-f]{{12}}(, changed since)?\)\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("typed", "said"),
    [("tran", "did you mean train?"), ("fly", "expected one of train, find-lr"), ("--verson", "--verson")],
)
def test_a_typo_in_the_command_is_named(typed: str, said: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([typed])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("on_gpu", "preset"), [(False, "laptop"), (True, "default")])
def test_help_shows_what_this_machine_would_use(on_gpu: bool, preset: str, monkeypatch, capsys) -> None:
    epochs = PRESETS[preset].epochs
    monkeypatch.setattr(cli, "_on_gpu", lambda _: on_gpu)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"Passes over the training images. (default: {epochs})" in said


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "a\\b", "..", ".hidden", "", "-x", "a\nb", "x" * 81]
)
def test_a_name_that_could_leave_the_folder_is_refused(name: str, capsys) -> None:
    with pytest.raises(UserError, match=r"(?s)--name .*expected up to 80 letters"):
        Recipe(name=name)
    assert main(["train", f"--name={name}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["mine", "größe 3", "lr=0.01,wd=5e-4", "v1.2_final", "a" * 80])
def test_a_plain_name_is_taken(name: str) -> None:
    assert Recipe(name=name).name == name


def test_a_row_of_the_table_fits_a_narrow_terminal(tmp_path: Path, capsys) -> None:
    RunLog(tmp_path).epoch(METRICS)
    *header, row = capsys.readouterr().out.splitlines()
    assert len(header) == 2 and max(map(len, [*header, row])) <= 80
    assert [len(line) for line in header] == [len(row)] * 2  # each name ends above its figure
    assert row.split()[:3] == ["24", "2.3026", "100.00%"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [0.0, 0.6])
def test_a_signal_while_modules_are_imported_is_one_line(signum: int, seconds: float, tmp_path) -> None:
    """From the package's first line on: at 0.0 s the command line's own imports, later torch's."""
    process = start("train", "--data", "synthetic", "--data-dir", str(tmp_path), "--out", str(tmp_path / "r"))
    while b"fasttrain" not in Path(f"/proc/{process.pid}/maps").read_bytes() and not _started(process.pid):
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert error.count("\n") == 1 and f"{signal.Signals(signum).name}: stopped" in error


def _started(pid: int) -> bool:
    """Whether the process handles SIGTERM: then the package's own handlers are in place."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_any_command_is_one_line(signum: int, monkeypatch, capsys) -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    monkeypatch.setitem(cli.COMMANDS, "data", (lambda _: signal.raise_signal(signum), ""))
    monkeypatch.setattr(sys, "argv", ["fasttrain", "data"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    try:
        with pytest.raises(SystemExit) as end:
            run_process()
        assert end.value.code == 128 + signum
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == f"fasttrain data: {signal.Signals(signum).name}: stopped\n"


def test_a_signal_ends_a_process_whose_threads_wait() -> None:
    """As one that imports torch in the background may, for seconds or, with a broken lock, for ever."""
    code = (
        "import os, signal, sys, threading, time\nfrom fasttrain import cli\n"
        "def wait(_):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
        "cli.COMMANDS['data'] = wait, ''\nsys.argv = ['fasttrain', 'data']\n"
        "from fasttrain.__main__ import main\nsys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (143, "fasttrain data: SIGTERM: stopped\n")


def test_a_signal_changes_nothing_once_the_command_has_ended() -> None:
    """Python takes a while to end, and then handlers are gone."""
    code = (
        "import atexit, os, signal, sys\nfrom fasttrain.__main__ import main\n"
        "atexit.register(lambda: [os.kill(os.getpid(), s) for s in (signal.SIGTERM, signal.SIGHUP)])\n"
        "sys.argv = ['fasttrain', '--version']\nsys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("fasttrain ")


@pytest.mark.parametrize(
    ("stop", "rank", "said"),
    [
        (Interrupted("SIGTERM: stopped", signal.SIGTERM), "0", "fasttrain doctor: SIGTERM: stopped\n"),
        (
            Interrupted("SIGTERM: stopped", signal.SIGTERM),
            "1",
            "fasttrain doctor, rank 1: SIGTERM: stopped\n",
        ),
        (TrainingInterrupted("SIGTERM: saved", signal.SIGTERM), "0", "fasttrain doctor: SIGTERM: saved\n"),
        (TrainingInterrupted("SIGTERM: saved", signal.SIGTERM), "1", ""),
    ],
)
def test_ranks_that_stop_together_say_so_once(stop, rank: str, said: str, monkeypatch, capsys) -> None:
    def interrupted(_: object) -> int:
        raise stop

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setitem(cli.COMMANDS, "doctor", (interrupted, ""))
    assert main(["doctor"]) == 143
    assert capsys.readouterr().err == said


def test_only_ranks_that_stop_together_wait_for_each_other(monkeypatch) -> None:
    left = []
    monkeypatch.setattr(World, "close", lambda world: left.append(world))
    for error in (Interrupted("SIGINT", signal.SIGINT), TrainingInterrupted("saved", signal.SIGINT)):
        with pytest.raises(Interrupted), World():
            raise error
    assert len(left) == 1


def test_a_signal_ends_a_rank_that_connects(monkeypatch) -> None:
    """It waits outside Python there, for an hour if need be, and would never run a handler of Python's."""
    handlers = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)

    def connect(*_: object, **__: object) -> None:
        handlers.extend(signal.getsignal(signum) for signum in STOPPING)
        raise UserError("connected")

    monkeypatch.setattr(dist, "init_process_group", connect)
    with pytest.raises(UserError, match="connected"), raise_on_signals():
        World.join(torch.device("cpu"))
    assert handlers == [signal.SIG_DFL] * 3


def test_a_reader_who_leaves_is_no_error(dataset_dir: Path, tmp_path) -> None:
    """A closed pipe: a command ends, but a training goes on to its end."""
    read, write = os.pipe()
    os.close(read)
    show = start("data", "--data-dir", str(dataset_dir), stdout=write)
    assert (show.communicate(timeout=60)[1], show.returncode) == ("", 0)
    flags = ["--data-dir", str(dataset_dir), "--out", str(tmp_path), "--device", "cpu", "--width", "4"]
    training = start(
        "train", *flags, "--epochs", "1", "--batch-size", "16", "--loader", "tensor", stdout=write
    )
    assert (training.communicate(timeout=120)[1], training.returncode) == ("", 0)
    os.close(write)
    [run] = tmp_path.iterdir()
    assert (run / "result.json").exists() and (run / "report.html").exists()


def test_a_terminal_that_knows_only_ascii_gets_every_line(dataset_dir: Path, tmp_path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    odd = tmp_path / "größe"
    odd.mkdir()
    (odd / "cifar-10-batches-bin").symlink_to(dataset_dir / "cifar-10-batches-bin")
    for args, status, said in (
        (["data", "--data-dir", str(odd)], 0, "gr\\xf6\\xdfe"),
        (["help", "train"], 0, "--epochs"),
        (["train", "--out", f"{odd}/cifar-10-batches-bin/test_batch.bin/ö"], 2, "\\xf6"),
    ):
        process = start(*args, env=environment)
        out, error = process.communicate(timeout=60)
        assert process.returncode == status and said in out + error
        assert "Traceback" not in error


def test_messages_name_the_program_as_this_shell_finds_it(tmp_path: Path, monkeypatch) -> None:
    environment = tmp_path / "env" / "bin"
    environment.mkdir(parents=True)
    for name in ("python", "fasttrain"):
        (environment / name).write_text("")
        (environment / name).chmod(0o755)
    monkeypatch.setattr(program.sys, "executable", str(environment / "python"))
    monkeypatch.setattr(program.sys, "argv", ["/x/fasttrain/__main__.py"])
    monkeypatch.setenv("PATH", str(environment))
    assert program.program() == "fasttrain"
    monkeypatch.setenv("PATH", "/nowhere")
    assert program.program() == f"{environment / 'python'} -m fasttrain"
    monkeypatch.chdir(tmp_path)
    assert program.program() == "env/bin/python -m fasttrain"
    other = tmp_path / "other"
    other.mkdir()
    (other / "fasttrain").write_text("")
    (other / "fasttrain").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))  # another program of this name
    assert program.program() == "env/bin/python -m fasttrain"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--out", "{tmp}/file/runs"], "--out"),
        (["train", "--save-every", "often"], "--save-every often"),
        (["profile", "--out", "{tmp}/file/profile"], "--out"),
        (
            ["export", "{tmp}/none.pt", "--format", "onnx", "--out", "{tmp}/nowhere/m.onnx"],
            "nowhere is not a folder",
        ),
        (["evaluate", "{tmp}/none.pt"], "none.pt: no such file"),
        (["evaluate", "{tmp}"], "holds no last.pt"),
    ],
)
def test_cheap_checks_come_before_the_images(args, said, tmp_path, monkeypatch, capsys) -> None:
    from fasttrain.data import load_dataset

    def no_images(*_: object, **__: object) -> Dataset:
        pytest.fail("loaded the images first")

    monkeypatch.setattr(load_dataset, "load_dataset", no_images)
    (tmp_path / "file").write_text("")
    assert main([arg.format(tmp=tmp_path) for arg in args]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
