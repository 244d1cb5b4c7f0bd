"""Commands as a person types them, in a folder that looks like a clone but whose runs go elsewhere; and where pages show some."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tests.workers import run_workers

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

# What a line of a code block begins with when it is a command, in whatever kind of block it stands.
PROGRAMS = (
    "sft-dist", "make", "pip", "python", "torchrun", "deepspeed", "sbatch", "tensorboard", "source", "git", "docker", "apptainer", "hf", "vllm", "curl",
)  # fmt: skip


# commands of ours that import torch and start no process
_ALONE = ("plan", "eval", "verify", "checkpoints", "export", "import", "chat")

# What a comment above a block may say of it.
MARKS = r"<!-- (not run|measured|ends with)(?:: | )(.+?) -->"


@dataclass(frozen=True)
class Block:
    r"""A code block of a page: the language it names ("" of an indented one), its text, the line it begins in, and what the comment above it says.

    `marks`: "not run" -> why not; "measured" -> by what, of output that the commands above do not print again; "ends with" ->
    the exit code of its commands.

    >>> [block] = blocks_of("Ask a cluster:\n\n<!-- not run: needs one -->\n```bash\nsinfo   # its nodes\n```\n")
    >>> block.commands, block.marks
    (['sinfo'], {'not run': 'needs one'})
    """

    language: str
    text: str
    line: int
    marks: dict[str, str]

    @property
    def commands(self) -> list[str]:
        """Its commands without their comments: all lines of a `bash` block, else those that begin with a program's name."""
        lines = [re.split(r"\s\s+# ", line)[0].rstrip() for line in self.text.replace("\\\n", " ").splitlines()]
        if self.language == "bash":
            return [line for line in lines if line]
        lines = [line.removeprefix("$ ") for line in lines]
        return [line for line in lines if line.startswith(tuple(f"{program} " for program in PROGRAMS))]


def blocks_of(markdown: str) -> list[Block]:
    """The code blocks of a page, indented ones and those in lists too."""
    found: list[Block] = []
    marks: dict[str, str] = {}
    for token in MarkdownIt().enable("table").parse(markdown):
        if token.type == "html_block":
            marks = dict(re.findall(MARKS, token.content, flags=re.DOTALL))
            continue
        if token.type in ("fence", "code_block"):
            language = token.info.strip() or ("text" if token.type == "fence" else "")
            found.append(Block(language, token.content, token.map[0] + 1, marks))
        marks = {}
    return found


def page_blocks(page: str) -> list[Block]:
    """The code blocks of a page of the project, by its path."""
    return blocks_of((ROOT / page).read_text())


def shown(page: str) -> list[str]:
    """The commands of a page's `bash` blocks that are to be run, in their order.

    >>> shown("docs/large-batches.md")[0]
    'sft-dist prepare examples/large-batch/run.yaml'
    """
    blocks = [block for block in page_blocks(page) if block.language == "bash" and "not run" not in block.marks]
    return [command for block in blocks for command in block.commands]


def follow(page: str, folder: Path, changed: Callable[[str], str] = str, done: Collection[str] = ()) -> str:
    """Run what a page shows, in its order, and hold what it quotes to what was printed until then; returns all that was.

    `changed` makes a command shorter, or another one for a test; those that are `done`, by another page in that folder, are
    not run again. Quotes are indented blocks.
    """
    printed = ""
    for block in page_blocks(page):
        if block.language == "bash" and "not run" not in block.marks:
            for command in [command for command in block.commands if command not in done]:
                printed += enter(changed(command), folder, code=int(block.marks.get("ends with", 0)))
        elif not block.language and not block.commands and not block.marks:
            lines = {line.strip() for line in printed.splitlines()}
            missing = [line for line in block.text.splitlines() if line.strip() not in lines]
            assert not missing, f"{page}, line {block.line}: nothing printed {missing}"
    return printed


def clone(folder: Path) -> Path:
    """A folder with the project's own folders in it."""
    for name in ("launch", "examples", "ds_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def start(command: str, folder: Path, environment: dict[str, str] = ENVIRONMENT, **more) -> subprocess.Popen:
    """Start a command there, its output joined and readable line by line."""
    return subprocess.Popen(
        shlex.split(command),
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **more,
    )


def run(
    command: str,
    folder: Path,
    *,
    code: int = 0,
    deadline: float = 300.0,
    environment: dict[str, str] = ENVIRONMENT,
) -> str:
    """Run a command there to its end and return what it printed; fails when it ends with another code."""
    process = start(command, folder, environment)
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{command}: no end within {deadline:.0f} s") from None
    assert process.returncode == code, f"{command} ended with {process.returncode}:\n{output}"
    return output


def enter(command: str, folder: Path, *, code: int = 0) -> str:
    """The same, but in a fork of what has imported everything where the command needs torch and starts no process."""
    is_alone = command.startswith("sft-dist ") and command.split()[1] in _ALONE
    return (forked if is_alone else run)(command, folder, code=code)


def forked(
    command: str, folder: Path, *, code: int = 0, typed: str | None = None, before: Callable[[], None] | None = None
) -> str:
    """The same for a command of `sft-dist` that starts no processes, in a forked one that has imported everything.

    `typed` is its standard input, which is no terminal; `before` is called there first.
    """
    [(found, output)] = run_workers(_invoked, 1, command, folder, typed, before, deadline=300.0)
    assert found == code, f"{command} ended with {found}:\n{output}"
    return output


def _invoked(topology, command, folder, typed, before):
    from click.testing import CliRunner

    from launch.cli import main

    os.chdir(folder)
    if before is not None:
        before()
    name, *arguments = shlex.split(command)
    assert name == "sft-dist", command
    result = CliRunner().invoke(main, arguments, input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output
