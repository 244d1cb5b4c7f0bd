import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sft_dist.topology import Topology
from sft_dist.watchdog import HUNG_EXIT_CODE, Heartbeat, Watchdog, clear, name_culprit

SECONDS = 0.6
ROOT = Path(__file__).parents[2]


class Exits:
    """Stands in for the end of the process."""

    def __init__(self):
        self.codes, self.accounts, self.done = [], [], threading.Event()

    def __call__(self, code):
        self.codes.append(code)
        self.done.set()


def watching(folder, exits, rank=0, world_size=1, life="a", on_hang=None):
    return Watchdog(folder, Topology(rank, world_size, rank), SECONDS, on_hang or exits.accounts.append, life, exits)


def beat_for(watchdog, seconds, step=3, phase="forward"):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watchdog.beat(step, phase)
        time.sleep(SECONDS / 10)


def test_beats_keep_it_quiet_and_an_orderly_end_leaves_nothing(tmp_path):
    exits = Exits()
    with watching(tmp_path / "watch", exits) as watchdog:
        beat_for(watchdog, 3 * SECONDS)
    assert exits.codes == []
    assert not (tmp_path / "watch").exists()


def test_waiting_for_what_has_a_time_out_of_its_own_is_no_hang(tmp_path):
    exits = Exits()
    with watching(tmp_path, exits) as watchdog:
        for _ in range(12):
            watchdog.wait(3, "waits for a save")
            time.sleep(SECONDS / 5)
        assert watchdog._last_beat[:3] == (0, 3, "waits for a save")
    assert exits.codes == []


def test_a_main_thread_that_stands_still_is_named_in_time_with_its_stacks(tmp_path, capfd):
    exits, began = Exits(), time.monotonic()
    watchdog = watching(tmp_path, exits).start()
    watchdog.beat(1201, "forward")
    assert exits.done.wait(10 * SECONDS)
    assert SECONDS <= time.monotonic() - began < 4 * SECONDS
    watchdog.close()
    assert exits.codes == [HUNG_EXIT_CODE]
    (account,) = exits.accounts
    assert account.startswith(f"rank 0 on host {os.uname().nodename} hangs")
    assert "in phase forward of step 1201 (timeout 0.6 s)" in account
    assert f"sft-dist: {account}" in capfd.readouterr().err
    assert "test_a_main_thread_that_stands_still" in (tmp_path / "rank-00000.stacks.txt").read_text()


def test_the_rank_that_the_others_wait_for_is_named_by_all(tmp_path):
    exits = [Exits(), Exits()]
    dogs = [watching(tmp_path, exits[rank], rank, 2).start() for rank in range(2)]
    for dog in dogs:
        dog.beat(7, "agree")
    dogs[0].beat(7, "forward")  # and rank 1 never comes so far
    assert all(each.done.wait(10 * SECONDS) for each in exits)
    for dog in dogs:
        dog.close()
    for each in exits:
        assert each.accounts[0].startswith("rank 1 on host ")
        assert "in phase agree of step 7" in each.accounts[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_account_that_cannot_be_kept_does_not_keep_the_process(tmp_path):
    def failing(account):
        raise OSError("no room for a verdict")

    exits = Exits()
    with contextlib.closing(watching(tmp_path, exits, on_hang=failing).start()):
        assert exits.done.wait(10 * SECONDS)
    assert exits.codes == [HUNG_EXIT_CODE]


PROGRAM = """
import ctypes, os, signal, sys, time
from pathlib import Path
from sft_dist.topology import Topology
from sft_dist.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[1]), Topology(1, 2, 1), float(sys.argv[2]), print, "a").start()
dog.beat(5, "forward")
print("ready", flush=True)
if sys.argv[3] == "gil":
    ctypes.PyDLL(None).sleep(60)
while True:
    dog.beat(5, "forward")
    time.sleep(0.05)
"""


def started(folder, how):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(SECONDS), how], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_process_that_is_stopped_is_named_by_another(tmp_path):
    process, exits = started(tmp_path, "beats"), Exits()
    watchdog = watching(tmp_path, exits, rank=0, world_size=2).start()
    try:
        for _ in range(3):
            watchdog.beat(5, "forward")
            time.sleep(SECONDS / 4)
        process.send_signal(signal.SIGSTOP)
        for _ in range(1000):
            watchdog.beat(5, "agree")  # ahead of the other, and waits
        assert exits.done.wait(10 * SECONDS)
    finally:
        process.kill()
        watchdog.close()
    assert exits.accounts[0].startswith("rank 1 on host ")
    assert "its whole process stands still or is gone" in exits.accounts[0]


def test_a_rank_that_keeps_the_gil_is_ended_by_the_backstop(tmp_path):
    process = started(tmp_path, "gil")
    assert process.wait(20 * SECONDS) == 1
    assert 'File "<string>", line 10 in <module>' in (tmp_path / "rank-00001.stacks.txt").read_text()


def beats(count, phase="forward", rank=0, **more):
    return Heartbeat("a", rank, f"node{rank}", 1, count, 3, phase, 60.0, **more)


def test_where_no_rank_is_behind_none_is_named():
    account = name_culprit([beats(4), beats(4, rank=1)], folder=Path("w"), timeout_seconds=60)
    assert account.startswith("all ranks wait at the same point: no progress for 60 s in phase forward of step 3")
    assert "a network fault" in account


def test_a_rank_without_a_heartbeat_is_named_first():
    account = name_culprit([beats(4), None], folder=Path("w"), timeout_seconds=60)
    assert account.startswith(
        "rank 1 hangs: it has no heartbeat (it never started, its machine is gone, or w is not shared"
    )


def test_a_heartbeat_of_another_life_is_none(tmp_path):
    (tmp_path / "rank-00001.json").write_text(
        '{"life": "old", "rank": 1, "host": "h", "pid": 1, "beats": 9, "step": 1, "phase": "p", "silent_seconds": 0}'
    )
    exits = Exits()
    with contextlib.closing(watching(tmp_path, exits, rank=0, world_size=2).start()):
        assert exits.done.wait(10 * SECONDS)
    assert exits.accounts[0].startswith("rank 1 hangs: it has no heartbeat")


def test_what_killed_lives_left_is_cleared_and_the_stacks_of_a_hang_stay(tmp_path):
    for name, text in (("rank-00000.json", "{}"), ("rank-00000.stacks.txt", ""), ("rank-00001.stacks.txt", "stacks")):
        (tmp_path / name).write_text(text)
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00001.stacks.txt"]
    clear(tmp_path / "nowhere")
