"""What ends a run that hangs: each rank watches its own main thread, and names the rank that the others wait for."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from sft_dist.topology import Topology, node_name

HUNG_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: started again it may well go on


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank last said of itself; `age_seconds`, how long ago that was, is known to the reader only."""

    life: str
    rank: int
    host: str
    pid: int
    beats: int
    step: int
    phase: str
    silent_seconds: float
    is_last: bool = False  # its rank has given up too: no later one will come
    is_in_collective: bool = False  # then it waits for another rank
    age_seconds: float = 0.0


def name_culprit(heartbeats: Sequence[Heartbeat | None], *, folder: Path, timeout_seconds: float) -> str:
    """One line on the rank with the fewest beats: of equals one whose process stands still, or that is in no collective.

    `heartbeats` are in rank order, None for a rank without one. Where no rank is behind, none is named.

    >>> ahead = Heartbeat("4711-0", 0, "node1", 17, beats=9, step=3, phase="step", silent_seconds=60)
    >>> behind = Heartbeat("4711-0", 1, "node2", 18, beats=8, step=3, phase="forward", silent_seconds=61)
    >>> name_culprit([ahead, behind], folder=Path("run/.watch"), timeout_seconds=60).split(";")[0]
    'rank 1 on host node2 hangs: no progress for 61 s in phase forward of step 3 (timeout 60 s)'
    """
    still = [s is None or (not s.is_last and s.age_seconds > timeout_seconds / 2) for s in heartbeats]
    order = [
        (s.beats if s else -1, not is_still, s is not None and s.is_in_collective)
        for s, is_still in zip(heartbeats, still, strict=True)
    ]
    rank = order.index(min(order))
    seen, equals = heartbeats[rank], order.count(order[rank]) - 1
    advice = f"stacks of the ranks in {folder}; look at that machine, or raise train.hang_seconds"
    if seen is None:
        why = f"it never started, its machine is gone, or {folder} is not shared by all"
        return f"rank {rank} hangs: it has no heartbeat ({why}); {advice}"
    silence = f"no progress for {seen.silent_seconds + seen.age_seconds:.0f} s"
    silence += f" in phase {seen.phase} of step {seen.step} (timeout {timeout_seconds:g} s)"
    if not still[rank] and 0 < equals == len(order) - 1:
        advice = f"stacks of the ranks in {folder}; compare them, or raise train.hang_seconds"
        return f"all ranks wait at the same point: {silence}; a network fault, or a rank that hangs in that phase? {advice}"
    more = f" (and {equals} more, as far behind)" if equals else ""
    stands = "; its whole process stands still or is gone" if still[rank] else ""
    return f"rank {rank} on host {seen.host} hangs{more}: {silence}{stands}; {advice}"


def clear(folder: Path) -> None:
    """Remove the heartbeats that killed lives left; the stacks of a hang stay. To be called before the ranks start theirs."""
    for path in folder.glob("rank-*"):
        if not path.name.endswith(".stacks.txt") or path.stat().st_size == 0:
            path.unlink()


@dataclass
class Watchdog:
    """Ends this process when its main thread has not beaten for `timeout_seconds`, after saying which rank hangs.

    `folder` is shared by all ranks, `life` the same word on all, and all beat at the same places. `on_hang` gets the
    account, on every rank that can still say it. A process stopped for longer than the time-out may end when continued.

    >>> with Watchdog(Path(".watch"), Topology(), 600, print, life="4711-0") as watchdog:  # doctest: +SKIP
    ...     watchdog.beat(1, "forward")
    """

    folder: Path
    topology: Topology
    timeout_seconds: float
    on_hang: Callable[[str], None]
    life: str
    exit: Callable[[int], Any] = os._exit

    def __post_init__(self) -> None:
        self._json, self._staged, self._stacks = (self._path(kind) for kind in ("json", "partial", "stacks.txt"))
        self._grace_seconds = 2 * min(2.0, self.timeout_seconds / 4)
        self._patience_seconds = min(10.0, self.timeout_seconds)  # with a disk or an `on_hang` that does not answer
        self._last_beat = (0, 0, "start-up", time.monotonic())
        self._has_given_up, self._waits_since = False, 0.0
        self._closing, self._writing = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=it, name=it.__name__, daemon=True) for it in (self._watch, self._show)]

    def start(self) -> Watchdog:
        """Begin to watch. Raises OSError where the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Appended to: the life that follows a hang at once must not wipe what that hang left to look at.
        self._stacks_file = self._stacks.open("a")
        self._last_beat = (0, 0, "start-up", time.monotonic())
        self._write()
        self._arm(self.timeout_seconds + 2 * self._grace_seconds)
        for thread in self._threads:
            thread.start()
        return self

    @property
    def step(self) -> int:
        """The step of the last beat."""
        return self._last_beat[1]

    def beat(self, step: int, phase: str) -> None:
        """Say that the main thread moves, at each phase and each micro-batch: neither I/O nor a lock."""
        self._last_beat = (self._last_beat[0] + 1, step, phase, time.monotonic())
        self._waits_since = 0.0

    def wait(self, step: int, phase: str) -> None:
        """Say that the main thread waits for a disk: the clock moves for three time-outs, the count does not at all."""
        now = time.monotonic()
        self._waits_since = self._waits_since or now
        if now - self._waits_since < 3 * self.timeout_seconds:
            self._last_beat = (self._last_beat[0], step, phase, now)

    def close(self, *_: object) -> None:
        """Stop watching; no file stays, but for the stacks of a hang."""
        self._closing.set()
        for thread in self._threads:
            thread.join(self._patience_seconds)
        faulthandler.cancel_dump_traceback_later()
        self._stacks_file.close()
        with contextlib.suppress(OSError):
            is_empty = self._stacks.stat().st_size == 0
            for path in (self._json, self._staged, *[self._stacks] * is_empty):
                path.unlink(missing_ok=True)
            self.folder.rmdir()  # succeeds for the rank that closes last

    __enter__, __exit__ = start, close

    def _path(self, kind: str, rank: int | None = None) -> Path:
        return self.folder / f"rank-{self.topology.rank if rank is None else rank:05d}.{kind}"

    def _arm(self, seconds: float) -> None:
        """The backstop, which needs no GIL: stacks and exit code 1, unless armed anew by then."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks_file)

    def _watch(self) -> None:
        """The thread that decides: it waits for no file, because a file system that is dead is a cause of hangs."""
        ticked = awake_since = time.monotonic()
        while not self._closing.wait(min(1.0, self.timeout_seconds / 4)):
            # Late enough for the other ranks to name this one, early enough for the SIGKILL that follows their exit.
            self._arm(self.timeout_seconds + 2 * self._grace_seconds)
            now, beat = time.monotonic(), self._last_beat
            if now - ticked > self.timeout_seconds / 2:
                awake_since = now  # the whole process was stopped: its silence says nothing of the main thread
            ticked = now
            if now - max(beat[-1], awake_since) < self.timeout_seconds:
                continue
            self._has_given_up = True
            self._arm(6 * self._patience_seconds)  # should this thread fail from here on
            self._in_time(self._dump)
            self._in_time(self._write)
            self._closing.wait(self._grace_seconds)  # the other ranks do the same
            if self._last_beat is beat and not self._closing.is_set():
                account = self._in_time(self._account) or f"{self._now()} hangs or waits: {self.folder} does not answer"
                self._in_time(partial(print, f"sft-dist: {account}", file=sys.stderr, flush=True))
                self._in_time(partial(self.on_hang, account))
                self.exit(HUNG_EXIT_CODE)
                return
            self._has_given_up = False  # it moves again

    def _in_time(self, act: Callable[[], Any]) -> Any:
        """What `act` returns; None when it raises (the traceback is on stderr) or does not end in time."""
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(act()), name="watchdog", daemon=True)
        thread.start()
        thread.join(self._patience_seconds)
        return results[0] if results else None

    def _dump(self) -> None:
        # faulthandler keeps the GIL while it writes: to a disk that answers
        with tempfile.TemporaryFile("w+") as local:
            faulthandler.dump_traceback(local)
            local.seek(0)
            print(self._now(), local.read(), sep="\n", file=self._stacks_file, flush=True)

    def _is_in_collective(self) -> bool:
        """Whether a thread stands in one; a save that is written behind the loop has its own."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, top in sys._current_frames().items():
            frame: FrameType | None = top
            while frame is not None and names.get(ident) != "checkpoint":
                if "torch/distributed" in frame.f_code.co_filename:
                    return True
                frame = frame.f_back
        return False

    def _now(self) -> Heartbeat:
        beats, step, phase, at = self._last_beat
        who = (self.life, self.topology.rank, node_name(), os.getpid())
        is_in_collective = self._has_given_up and self._is_in_collective()
        silent_seconds = round(time.monotonic() - at, 3)
        return Heartbeat(*who, beats, step, phase, silent_seconds, self._has_given_up, is_in_collective)

    def _show(self) -> None:
        while not self._closing.wait(self.timeout_seconds / 4):
            self._write()

    def _write(self) -> None:
        """Publish the heartbeat, whole; as a hint it is worth neither a wait for the disk nor an end when it fails."""
        with self._writing, contextlib.suppress(OSError):
            self._staged.write_text(json.dumps(asdict(self._now())))
            self._staged.replace(self._json)

    def _account(self) -> str:
        # By the file system's own clock: the clocks of two machines need not agree.
        now = self._json.stat().st_mtime
        seen = [self._read(rank, now) for rank in range(self.topology.world_size)]
        seen[self.topology.rank] = self._now()
        return name_culprit(seen, folder=self.folder, timeout_seconds=self.timeout_seconds)

    def _read(self, rank: int, now: float) -> Heartbeat | None:
        try:
            with self._path("json", rank).open() as file:
                seen = Heartbeat(**json.loads(file.read()))
                age = max(0.0, now - os.fstat(file.fileno()).st_mtime)
        except (OSError, ValueError, TypeError):
            return None
        return replace(seen, age_seconds=age) if seen.life == self.life else None
