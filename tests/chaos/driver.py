"""Violence against real runs: seeded, counted, compared with runs that nobody disturbed.

python -m tests.chaos.driver --lives 220 --seed 0 --json benchmarks/results/chaos.json

A campaign is one training run over many lives. Each life is `sft-dist train` as a person starts it, and something happens to
it: a kill -9 of one rank, of all, of torchrun or of the launcher; a signal, one or two, at start-up, in a step, an evaluation or
a save; a full disk; a rank that hangs; or, between two lives, flipped bytes and cut files. In a steady campaign every life has
the same number of ranks and ZeRO stage, and the end must be bit-identical to the undisturbed run; in an elastic one both
change, and losses, final weights and logits must lie within the envelope that docs/checkpoints.md states.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft_dist.manifest import read_state, verify
from sft_dist.retention import list_folders
from tests.e2e.commands import clone, run, start
from tests.invariants import runs

STEPS, SAVE_EVERY, EVALUATE_EVERY, HANG_SECONDS = 60, 4, 10, 12
STEADY = (2, 2)
LAYOUTS = [(1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]
ENVELOPE = {"loss": 1e-5, "weights": 1e-4, "logits": 1e-4}  # absolute, over 60 steps at 3e-3: docs/checkpoints.md
ALLOWED_CODES = {0, 1, 75, 130, 138, 143, 137, -signal.SIGKILL}  # 137: torchrun was killed
_FILES = re.compile(
    r"run\.yaml|environment\.json|\.watch/rank-\d{5}\.stacks\.txt|(metrics|usage|bad_rows)\.jsonl|\.lock|model/.*|(tensorboard|services)/.*|verdicts/[^/]+\.json|"
    r"checkpoints/latest|checkpoints/step-\d{8}(\.damaged-\d+)?/.*"
)


@dataclass
class Life:
    """What was done to one life, and how it ended."""

    number: int
    world_size: int
    stage: int
    violence: str
    from_step: int = 0
    code: int | None = None
    to_step: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        told = "; ".join(self.notes)
        return (
            f"life {self.number:3}  {self.world_size} x ZeRO {self.stage}  from step {self.from_step:2}  "
            f"{self.violence:34} code {self.code!s:4} whole to step {self.to_step:2}  {told}"
        )


class Watched:
    """A life as a process: what it says, its ranks, and ways to hurt it."""

    def __init__(self, command: str, folder: Path) -> None:
        self.process = start(command, folder)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float) -> int:
        """The exit code; a life that does not end is a failure of its own."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(tree(self.process.pid))
            raise AssertionError(f"no end within {seconds:.0f} s:\n{self.output}") from None
        self._reader.join(10)
        return code

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in no order."""
        return [
            pid
            for pid in tree(self.process.pid)
            if "launch/train.py" in command_of(pid) and "torch.distributed" not in command_of(pid)
        ]

    def torchrun(self) -> list[int]:
        return [pid for pid in tree(self.process.pid) if "torch.distributed.run" in command_of(pid)]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def tree(pid: int) -> list[int]:
    """A process and everything below it, the leaves last."""
    found = [pid]
    for above in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{above}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def until(is_so: Callable[[], bool], life: Watched, seconds: float = 40.0) -> bool:
    """Wait until it is so; False when the life ended first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not life.is_over():
        if is_so():
            return True
        time.sleep(0.002)
    return False


def command(world_size: int, stage: int, run_dir: str) -> str:
    return (
        f"sft-dist train run.yaml --nproc {world_size} zero=ds_configs/zero{stage}.json run_dir={run_dir} "
        f"train.max_steps={STEPS} train.hang_seconds={HANG_SECONDS} evaluate.samples=0 evaluate.every_steps={EVALUATE_EVERY} "
        f"checkpoint.every_steps={SAVE_EVERY} checkpoint.keep_last=3 model.dropout=0.1"
    )


def prepared(folder: Path) -> Path:
    """A folder with the shards and the undisturbed run, which is the same for every campaign."""
    clone(folder)
    runs.run_file(folder, micro_batch_rows=1, global_batch_rows=12)
    run("sft-dist prepare run.yaml", folder)
    run(command(*STEADY, run_dir="undisturbed"), folder)
    return folder


class Campaign:
    """One run over many lives, beside its undisturbed twin."""

    def __init__(self, folder: Path, draw: random.Random, *, elastic: bool, on_small_disk: bool) -> None:
        self.folder, self.draw, self.elastic, self.on_small_disk = folder, draw, elastic, on_small_disk
        self.run_dir = folder / "disk" / "run"
        self.lives: list[Life] = []
        self.damaged = 0
        self.changes = 0

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def command(self, world_size: int, stage: int) -> str:
        return command(world_size, stage, "disk/run")

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """A disk of its own, and a small one where it may be mounted."""
        disk = self.folder / "disk"
        disk.mkdir()
        size = sum(
            file.stat().st_size
            for file in next(iter(list_folders(self.folder / "undisturbed" / "checkpoints"))).rglob("*")
        )
        if self.on_small_disk:
            options = f"size={14 * size}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)
        try:
            yield
        finally:
            if self.on_small_disk:
                subprocess.run(["umount", "-l", str(disk)], check=True)
            shutil.rmtree(disk)

    def one_life(self, number: int, planned: str | None = None) -> Life:
        """Start it, hurt it, as `planned` or drawn, see how it ended."""
        layout = STEADY
        if self.elastic:
            layout = self.draw.choice([each for each in LAYOUTS if not self.lives or each != self.layout_before])
            self.changes += bool(self.lives)
        kinds = [*AT_ONCE, *BETWEEN] if len(list_folders(self.checkpoints)) > 1 else list(AT_ONCE)
        if not self.on_small_disk:
            kinds.remove("the disk is full for a while")
        name = self.draw.choices(kinds, weights=[WEIGHTS.get(kind, 1.0) for kind in kinds])[0]
        name = planned if planned in kinds else name
        life = Life(number, *layout, name, from_step=self.newest())
        if name in BETWEEN:
            BETWEEN[name](self, life)
        watched = Watched(self.command(*layout), self.folder)
        if name in AT_ONCE:
            AT_ONCE[name](self, life, watched)
        else:
            self.moment(life, watched)
            kill(watched.ranks())
        life.code = watched.wait(120)
        self._look(life, watched)
        self.lives.append(life)
        return life

    @property
    def layout_before(self) -> tuple[int, int]:
        return self.lives[-1].world_size, self.lives[-1].stage

    def newest(self) -> int:
        """The step of the newest checkpoint that is whole, every byte of it read."""
        for path in reversed(list_folders(self.checkpoints)):
            if verify(path) is None:
                return read_state(path).step
        return 0

    def _look(self, life: Life, watched: Watched) -> None:
        """What must be true after any violence."""
        output = watched.output
        is_deaf = not output.strip() or "completed: " in output  # before the launcher listens, and while it ends
        assert life.code in ALLOWED_CODES or (is_deaf and life.code < 0), (life.line, output)
        life.to_step = self.newest()
        assert life.to_step >= life.from_step, (life.line, output)  # what was whole stays
        told = re.search(r"resuming from step (\d+) of|starting at step (0)", output)
        if told:
            began = int(told[1] or told[2])
            assert began == life.from_step, (life.line, output)
        else:
            life.notes.append("before it had begun")
        if life.violence.startswith("SIG") and told and life.code not in (0, 137):
            assert life.code in (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGUSR1, 1), (
                life.line,
                output,
            )

    def moment(self, life: Life, watched: Watched) -> None:
        """Wait for a random one: start-up, a step, an evaluation, a save."""
        kind = self.draw.choice(["start-up", "step", "evaluation", "save", "save"])
        goal = min(STEPS - 2, life.from_step + self.draw.randint(1, 14))
        if kind == "start-up":
            time.sleep(self.draw.uniform(0.0, 6.0))
        elif kind == "step":
            until(lambda: f"step {goal}/" in watched.output, watched)
        elif kind == "evaluation":
            until(
                lambda: f"step {min(STEPS - 1, -(-goal // EVALUATE_EVERY) * EVALUATE_EVERY)}/" in watched.output,
                watched,
            )
        else:
            before = self.draw.randint(0, 2)  # saves that may pass
            seen: set[str] = set()

            def is_saving() -> bool:
                seen.update(path.name for path in self.checkpoints.glob(".step-*.partial"))
                return len(seen) > before

            until(is_saving, watched)
            time.sleep(self.draw.uniform(0.0, 0.02))
        life.violence += f" ({kind})"

    def finish(self) -> dict[str, Any]:
        """One last life that nobody disturbs, and the comparison."""
        output = run(self.command(*STEADY), self.folder, deadline=300)
        assert "completed: " in output or f"{STEPS} of {STEPS} steps" in output, output
        certificate = run("sft-dist verify disk/run", self.folder)
        assert "VERIFIED: all that could be checked is right" in certificate, certificate
        strays = [
            name for path in sorted(self.run_dir.rglob("*")) if path.is_file() or path.is_symlink()
            if not _FILES.fullmatch(name := path.relative_to(self.run_dir).as_posix())
        ]  # fmt: skip
        assert not strays, strays
        runs.check_charts(self.run_dir)
        newest = (list_folders(path / "checkpoints")[-1] for path in (self.run_dir, self.folder / "undisturbed"))
        mine, theirs = map(runs.tensors, newest)
        assert mine.keys() == theirs.keys()
        weights = max(float((mine[key] - theirs[key]).abs().max()) for key in mine if key.startswith("master/"))
        answers = logits(self.run_dir, mine), logits(self.run_dir, theirs)
        difference = float((answers[0] - answers[1]).abs().max())
        curves = [dict(enumerate(runs.numbers(path))) for path in (self.run_dir, self.folder / "undisturbed")]
        assert len(curves[0]) == len(curves[1]) == STEPS, [len(curve) for curve in curves]
        loss = max(abs(curves[0][step][0] - curves[1][step][0]) for step in range(STEPS))
        if self.elastic:
            assert loss <= ENVELOPE["loss"], loss
            assert weights <= ENVELOPE["weights"], weights
            assert difference <= ENVELOPE["logits"], difference
        else:
            assert curves[0] == curves[1]
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        return {
            "elastic": self.elastic,
            "small_disk": self.on_small_disk,
            "lives": len(self.lives),
            "layout_changes": self.changes,
            "largest_difference": {"loss": loss, "weights": weights, "logits": difference},
            "is_bit_identical": all(torch.equal(mine[key], theirs[key]) for key in mine),
        }


def logits(run_dir: Path, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model of a run says with these masters to a fixed row of tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.from_pretrained(run_dir / "model", trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[f"master/{name}"].view_as(parameter))
        return model(torch.arange(32)[None] % made.vocab_size).logits


def kill_one_rank(campaign: Campaign, life: Life, watched: Watched) -> None:
    campaign.moment(life, watched)
    kill(campaign.draw.sample(watched.ranks(), 1) if watched.ranks() else [])


def kill_all(campaign: Campaign, life: Life, watched: Watched) -> None:
    campaign.moment(life, watched)
    kill(tree(watched.process.pid))


def kill_torchrun(campaign: Campaign, life: Life, watched: Watched) -> None:
    campaign.moment(life, watched)
    ranks = watched.ranks()
    kill(watched.torchrun())
    time.sleep(0.2)
    kill(ranks)


def kill_launcher(campaign: Campaign, life: Life, watched: Watched) -> None:
    """Its ranks live on without it: another start must be refused as long as they hold the folder."""
    campaign.moment(life, watched)
    below = tree(watched.process.pid)[1:]
    has_begun = "step " in watched.output
    kill([watched.process.pid])
    if has_begun and all(command_of(pid) for pid in below):
        refused = start(campaign.command(life.world_size, life.stage), campaign.folder)
        output, _ = refused.communicate(timeout=60)
        if refused.returncode == 2:
            assert "is in use by process" in output, output
            life.notes.append("a second start was refused")
        else:  # they had just come to their end
            life.notes.append(f"a second start ended with {refused.returncode}")
    kill(below)


def one_signal(number: signal.Signals) -> Callable[[Campaign, Life, Watched], None]:
    def act(campaign: Campaign, life: Life, watched: Watched) -> None:
        campaign.moment(life, watched)
        kill([watched.process.pid], number)

    return act


def two_signals(campaign: Campaign, life: Life, watched: Watched) -> None:
    campaign.moment(life, watched)
    for _ in range(2):
        kill([watched.process.pid], campaign.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
        time.sleep(campaign.draw.uniform(0.0, 0.5))


def fill_the_disk(campaign: Campaign, life: Life, watched: Watched) -> None:
    """Nothing more can be written for some seconds; the run must go on, and save again."""
    until(lambda: f"step {life.from_step + 1}/" in watched.output, watched)
    filler = campaign.folder / "disk" / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65_536)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 64)
    until(lambda: "could NOT be saved" in watched.output, watched, seconds=15)
    filler.unlink()
    if "could NOT be saved" in watched.output:
        life.notes.append("a save failed, the run went on")
        saved = campaign.newest()
        until(lambda: campaign.newest() > saved, watched, seconds=20)
    kill(tree(watched.process.pid))


def hang_a_rank(campaign: Campaign, life: Life, watched: Watched) -> None:
    """A rank stands still; the others must name it and end the job."""
    if not until(lambda: f"step {life.from_step + 2}/" in watched.output, watched) or len(watched.ranks()) < 2:
        kill(tree(watched.process.pid))
        return
    chosen = campaign.draw.choice(watched.ranks())
    kill([chosen], signal.SIGSTOP)
    began = time.monotonic()
    if not until(lambda: "hangs" in watched.output, watched, seconds=HANG_SECONDS * 3):
        assert watched.is_over(), watched.output
    life.notes.append(f"named after {time.monotonic() - began:.0f} s")
    until(lambda: False, watched, seconds=15)
    kill([chosen])
    code = watched.wait(60)
    assert re.search(r"rank \d+ on host \S+ hangs: .* phase ", watched.output), watched.output
    assert code == 75, (code, watched.output)


def flip_newest(campaign: Campaign, life: Life) -> None:
    """A flipped byte anywhere in the newest checkpoint: it is passed over, named and set aside."""
    path = list_folders(campaign.checkpoints)[-1]
    file = campaign.draw.choice([file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size])
    content = bytearray(file.read_bytes())
    content[campaign.draw.randrange(len(content))] ^= campaign.draw.randint(1, 255)
    file.write_bytes(content)
    life.from_step = campaign.newest()
    campaign.damaged += 1
    life.notes.append(f"a byte of {file.relative_to(path)}")


def cut_newest(campaign: Campaign, life: Life) -> None:
    path = list_folders(campaign.checkpoints)[-1]
    file = campaign.draw.choice([file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size])
    os.truncate(file, campaign.draw.randrange(file.stat().st_size))
    life.from_step = campaign.newest()
    campaign.damaged += 1
    life.notes.append(f"{file.relative_to(path)}")


def damage_shards(campaign: Campaign, life: Life) -> None:
    """A damaged row ends the run with what is wrong, before a step has used it; mended, the run goes on."""
    (file,) = (campaign.folder / "shards" / "train").glob("*.rows")
    content = file.read_bytes()
    damaged = bytearray(content)
    size = len(content) // max(1, json.loads((file.parent / "manifest.json").read_text())["rows"])
    for at in range(0, len(content), size):  # every row: whichever comes next is one
        damaged[at + campaign.draw.randrange(size)] ^= campaign.draw.randint(1, 255)
    file.write_bytes(damaged)
    before = campaign.newest()
    output = start(campaign.command(life.world_size, life.stage), campaign.folder).communicate(timeout=120)[0]
    file.write_bytes(content)
    assert "its bytes are not the ones that were written; prepare again" in output, output
    assert campaign.newest() == before
    life.notes.append("refused, then mended")


def cut_shards(campaign: Campaign, life: Life) -> None:
    """A file of rows that was cut is refused before anything starts."""
    file = campaign.draw.choice(sorted((campaign.folder / "shards").rglob("*.rows")))
    content = file.read_bytes()
    file.write_bytes(content[: campaign.draw.randrange(len(content))])
    before = campaign.newest()
    output = start(campaign.command(life.world_size, life.stage), campaign.folder).communicate(timeout=120)[0]
    file.write_bytes(content)
    assert "prepare again" in output, output
    assert campaign.newest() == before
    life.notes.append(f"{file.relative_to(campaign.folder)} refused, then mended")


AT_ONCE: dict[str, Callable[[Campaign, Life, Watched], None]] = {
    "kill -9 one rank": kill_one_rank,
    "kill -9 all": kill_all,
    "kill -9 torchrun": kill_torchrun,
    "kill -9 the launcher": kill_launcher,
    "SIGTERM": one_signal(signal.SIGTERM),
    "SIGINT": one_signal(signal.SIGINT),
    "SIGUSR1": one_signal(signal.SIGUSR1),
    "SIG twice": two_signals,
    "the disk is full for a while": fill_the_disk,
    "a rank hangs": hang_a_rank,
}
BETWEEN: dict[str, Callable[[Campaign, Life], None]] = {
    "a flipped byte in the newest": flip_newest,
    "a cut file in the newest": cut_newest,
    "damaged shards": damage_shards,
    "cut shards": cut_shards,
}
WEIGHTS = {
    "kill -9 one rank": 3.0, "kill -9 all": 2.0, "a rank hangs": 0.4, "damaged shards": 0.4, "cut shards": 0.3,
}  # fmt: skip


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def campaigns(
    lives: int, seed: int, say: Callable[[str], None], per_campaign: int = 12, planned: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """So many lives in campaigns of `per_campaign`, every second one elastic; the summary.

    `planned`: violence by the number of the life from which on it is done, once there is something to do it to.
    """
    waiting = dict(planned or {})
    draw, done, kinds = random.Random(seed), [], Counter()
    has_disk, number = may_mount(), 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as made:
        folder = prepared(Path(made))
        while number < lives:
            campaign = Campaign(folder, draw, elastic=len(done) % 2 == 1, on_small_disk=has_disk)
            with campaign.ready():
                for _ in range(min(per_campaign, lives - number)):
                    number += 1
                    due = next((first for first in sorted(waiting) if first <= number), number)
                    life = campaign.one_life(number, waiting.get(due))
                    if life.violence.startswith(waiting.get(due, "nothing")):
                        del waiting[due]
                    kinds[re.sub(r" \(.*\)", "", life.violence)] += 1
                    say(life.line)
                    if life.to_step >= STEPS:
                        break
                done.append(campaign.finish())
                say(f"campaign {len(done)}: {json.dumps(done[-1])}")
    return {
        "lives": number,
        "layout_changes": sum(each["layout_changes"] for each in done),
        "seed": seed,
        "violence": dict(sorted(kinds.items())),
        "full_disk": "a tmpfs" if has_disk else "not tried: nothing may be mounted here",
        "campaigns": done,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    summary = campaigns(options.lives, options.seed, lambda line: print(line, flush=True))
    summary["seconds"] = round(time.monotonic() - began)
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
