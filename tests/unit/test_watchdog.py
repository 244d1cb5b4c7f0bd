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


def test_waiting_for_a_disk_is_no_hang_until_three_time_outs_have_passed(tmp_path):
    exits = Exits()
    with watching(tmp_path, exits) as watchdog:
        began = time.monotonic()
        while time.monotonic() - began < 2 * SECONDS:
            watchdog.wait(3, "waits for a save")
            time.sleep(SECONDS / 5)
        assert watchdog._last_beat[:3] == (0, 3, "waits for a save")
        assert exits.codes == []
        while not exits.done.wait(SECONDS / 5) and time.monotonic() - began < 60:
            watchdog.wait(3, "waits for a save")
    assert exits.codes == [HUNG_EXIT_CODE]
    assert time.monotonic() - began > 3 * SECONDS
    assert "in phase waits for a save of step 3" in exits.accounts[0]


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


def hung(exits, watchdog):
    """The account of a watchdog whose main thread never beats."""
    with contextlib.closing(watchdog.start()):
        assert exits.done.wait(10 * SECONDS)
    return exits.accounts[0]


def stacks_of(folder):
    end = time.monotonic() + 10 * SECONDS
    while not (folder / "rank-00000.stacks.txt").stat().st_size:
        assert time.monotonic() < end
        time.sleep(SECONDS / 60)


def test_a_main_thread_that_moves_again_while_the_others_are_waited_for_goes_on(tmp_path):
    exits = Exits()
    with contextlib.closing(watching(tmp_path, exits).start()) as watchdog:
        stacks_of(tmp_path)
        beat_for(watchdog, SECONDS)
    assert exits.codes == []


def test_an_orderly_end_while_the_others_are_waited_for_wins(tmp_path):
    exits = Exits()
    with contextlib.closing(watching(tmp_path, exits).start()):
        stacks_of(tmp_path)
    assert exits.codes == []


def test_the_last_word_of_a_rank_is_on_the_disk_and_the_stacks_of_an_earlier_hang_stay(tmp_path):
    (tmp_path / "rank-00000.stacks.txt").write_text("of an earlier life\n")
    exits, last = Exits(), []
    watchdog = watching(tmp_path, exits, on_hang=lambda _: last.append((tmp_path / "rank-00000.json").read_text()))
    watchdog._threads = watchdog._threads[:1]  # without the one that writes every so often
    with contextlib.closing(watchdog.start()):
        assert exits.done.wait(10 * SECONDS)
    assert '"is_last": true' in last[0]
    assert (tmp_path / "rank-00000.stacks.txt").read_text().startswith("of an earlier life\n")


def test_a_file_system_that_does_not_answer_does_not_keep_the_process(tmp_path):
    os.mkfifo(tmp_path / "rank-00001.json")  # to open it is to wait for ever
    exits = Exits()
    assert f"{tmp_path} does not answer" in hung(exits, watching(tmp_path, exits, world_size=2))
    assert exits.codes == [HUNG_EXIT_CODE]


def test_the_silence_of_a_process_that_was_stopped_is_not_held_against_it(tmp_path):
    program = PROGRAM[: PROGRAM.index("if sys.argv")] + "sys.stdin.readline()\ndog.close()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), str(SECONDS)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.25 * SECONDS)  # longer than the time-out, shorter than the backstop
    process.send_signal(signal.SIGCONT)
    time.sleep(0.75 * SECONDS)
    process.communicate("go on\n", timeout=20)
    assert process.returncode == 0


@pytest.mark.parametrize(("is_last", "named"), [(False, 1), (True, 0)])
def test_of_equals_the_one_that_stands_still_is_named_unless_it_has_said_its_last_word(is_last, named):
    old = beats(4, rank=1, age_seconds=31, is_last=is_last)
    account = name_culprit([beats(4), old, beats(5, rank=2)], folder=Path("w"), timeout_seconds=60)
    assert account.startswith(f"rank {named} on host node{named} hangs")
    assert ("stands still" in account) == (not is_last)
    assert ("(and 1 more, as far behind)" in account) == is_last


def test_of_equals_the_one_that_is_in_no_collective_is_named():
    waits = beats(4, is_last=True, is_in_collective=True)
    account = name_culprit([waits, beats(4, rank=1, is_last=True), waits], folder=Path("w"), timeout_seconds=60)
    assert account.startswith("rank 1 on host node1 hangs: no progress for 60 s")


def test_a_thread_in_a_collective_is_seen_and_the_writer_of_saves_is_not(tmp_path):
    code = compile("entered.set()\nover.wait(10)\n", "/site-packages/torch/distributed/collectives.py", "exec")
    watchdog = watching(tmp_path, Exits())
    for name, is_seen in (("checkpoint", False), ("main", True)):
        entered, over = threading.Event(), threading.Event()
        thread = threading.Thread(target=exec, args=(code, {"entered": entered, "over": over}), name=name)
        thread.start()
        entered.wait(10)
        assert watchdog._is_in_collective() == is_seen
        over.set()
        thread.join()
