"""Every command that a page shows is run by a test, or says why not."""

from __future__ import annotations

import pytest

from tests.e2e.commands import ROOT, Block, blocks_of, clone, follow, page_blocks, shown

PAGES = ["README.md", "benchmarks/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
# Pages with a test of their own, and how many commands it runs: one that is added there has to be added here, and run.
OWN = {
    "README.md": ("test_readme", 10),
    "docs/tutorial.md": ("test_readme", 14),
    "docs/report.md": ("test_readme", 3),
    "docs/export.md": ("test_hand_over_pages", 7),
    "docs/chat.md": ("test_hand_over_pages", 4),
    "docs/checkpoints.md": ("test_checkpoints_page", 4),
    "docs/configuration.md": ("test_configuration_page", 12),
    "docs/data.md": ("test_data_page", 6),
    "docs/large-batches.md": ("test_large_batches_page", 4),
    "docs/lora.md": ("test_lora_page", 8),
    "docs/plan.md": ("test_plan_page", 3),
    "docs/profile.md": ("test_profile_page", 2),
}


def unaccounted(blocks: list[Block]) -> list[str]:
    """Commands that nobody runs and nothing excuses: outside `bash` blocks, without a comment that says why not."""
    return [
        f"line {block.line}: {command}"
        for block in blocks
        if block.language != "bash" and "not run" not in block.marks
        for command in block.commands
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_says_why_not(page):
    assert unaccounted(page_blocks(page)) == []
    if page in OWN:
        module, count = OWN[page]
        assert len(shown(page)) == count, f"{page} shows other commands than tests/e2e/{module}.py was written for"
        assert page in (ROOT / "tests" / "e2e" / f"{module}.py").read_text()


@pytest.mark.parametrize(
    "text",
    ["{}    sft-dist stop runs/a\n", "{}```\n$ pip install x\n```\n", "1. so:\n\n   {}       make chaos\n"],
)
def test_a_command_that_nobody_runs_is_seen(text):
    assert len(unaccounted(blocks_of(text.format("\n")))) == 1
    assert unaccounted(blocks_of(text.format("<!-- not run: it takes an hour -->\n\n"))) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OWN and shown(page)])
def test_the_commands_of_a_page_run(page, tmp_path):
    follow(page, clone(tmp_path))


def test_a_quote_that_nothing_prints_is_seen(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr("tests.e2e.commands.ROOT", tmp_path)
    page.write_text("```bash\nsft-dist --version\n```\n\n    sft-dist, version 99\n")
    with pytest.raises(AssertionError, match="line 5: nothing printed"):
        follow("page.md", tmp_path)
