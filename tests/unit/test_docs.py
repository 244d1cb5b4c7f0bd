"""What the pages of docs/ say of the code is so: examples, messages, links, and numbers that were measured."""

from __future__ import annotations

import ast
import doctest
import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import docs_hooks

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CONCEPTS = sorted((ROOT / "docs" / "concepts").glob("*.md"))
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_the_examples_of_a_page_are_true(page):
    blocks = [
        token for token in MarkdownIt().parse(page.read_text()) if token.type == "fence" and token.info == "pycon"
    ]
    text = "\n".join(block.content for block in blocks)
    case = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    told: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(case, out=told.append).failed == 0, "".join(told)
    assert text or page.stem == "words"


def texts_of_the_code() -> list[str]:
    """Every text in the code, what is filled in at run time written as `…`."""
    found = []
    for path in [*(ROOT / "sft_dist").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "…", node.value))
    return [text.replace("`", "…") for text in found]  # a heading cannot quote a backtick


def quoted() -> list[str]:
    """The messages that docs/troubleshooting.md heads its answers with, but for those of other programs."""
    others = ("torch.", "ModuleNotFoundError", "You are using ZeRO", "EADDRINUSE", "[Errno", "Watchdog", "CUDA", "The NVIDIA", "Bus", "CANCELLED", "slurmstepd")  # fmt: skip
    headings = re.findall(
        r"^#### `(.*?)`(?:$| )", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE
    )
    return [heading for heading in headings if not heading.startswith(others)]


def test_the_messages_in_troubleshooting_are_those_of_the_code():
    texts = texts_of_the_code()
    messages = quoted()
    assert [message for message in messages if not any(message in text for text in texts)] == []
    assert len(messages) >= 35
    assert not any(messages[0].replace("unknown key", "unknown name") in text for text in texts)  # the check can fail


def test_the_errors_that_ranks_end_with_have_their_exit_codes_on_the_page():
    from sft_dist import errors

    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    table = (ROOT / "docs" / "troubleshooting.md").read_text().split("## Exit codes")[1].split("\n## ")[0]
    told = {
        int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", table, flags=re.MULTILINE) for code in cell.split(",")
    }
    assert told == codes - {0} | {0, 130, 143, 138}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_links_to_files_that_are_there(page):
    for target in docs_hooks.LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_links_out_of_docs_lead_to_pages_of_the_files():
    text = "[a](../launch/cli.py) [b](plan.md#x) [c](https://example.org/x.md) [d](concepts/zero.md) [e](#here)"
    led = "[a](source/launch/cli.py.md) [b](plan.md#x) [c](https://example.org/x.md) [d](concepts/zero.md) [e](#here)"
    assert docs_hooks.rewrite("docs/slurm.md", text, "slurm.md") == led
    assert docs_hooks.rewrite("docs/concepts/zero.md", "[a](../../launch/cli.py)", "concepts/zero.md") == (
        "[a](../source/launch/cli.py.md)"
    )
    assert docs_hooks.rewrite("benchmarks/README.md", "[a](../docs/plan.md#x)", "source/benchmarks/README.md") == (
        "[a](../../plan.md#x)"
    )
    assert docs_hooks.links("docs/slurm.md", text) == {"launch/cli.py"}
    with pytest.raises(docs_hooks.PluginError, match=r"docs/a\.md links to launch/none\.py, which is not in"):
        docs_hooks.links("docs/a.md", "[a](../launch/none.py)")


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def number(value: float) -> str:
    """As the pages write it: 5,120,889 and 0.388."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def test_the_numbers_of_the_comparison_are_those_measured():
    page = (ROOT / "docs" / "comparison.md").read_text()
    tools = {tool["tool"]: tool for tool in result("prepare")["compare"]["results"]}
    rows = []
    for name, told in (("sft-dist, 1 worker", "**sft-dist**"), ("datasets.map + group_texts", "`datasets.map` + `group_texts`"),
                       ("TRL bfd", "TRL `bfd`, its default"), ("TRL bfd_split", "TRL `bfd_split`")):  # fmt: skip
        tool = tools[name]
        cells = [number(tool["tokens_per_cpu_second"]), f"{tool['peak_mib']:.0f}", f"{100 * tool['fill']:.2f}", f"{tool['lost_targets']:,}"]  # fmt: skip
        rows.append(f"| {told} | {' | '.join(cells)} |")
    packers = {
        entry["packer"]: entry for entry in result("pack")["results"]["lognormal, median 180, sigma 1.1, cut at 1024"]
    }
    for name, told in (("sft-dist", "**sft-dist**"), ("best-fit decreasing", "best-fit decreasing, as published"), ("SPFHP", "SPFHP"), ("TRL bfd", "TRL `bfd`")):  # fmt: skip
        entry = packers[name]
        rows.append(f"| {told} | {number(entry['documents_per_cpu_second'])} | {100 * entry['fill']:.3f} | {entry['extra_mib']:,.0f} |")  # fmt: skip
    speeds = result("loader")["rows_per_second"]
    for name, told in (("this loader, stored dtypes, order included", "**sft-dist**, each row's digest compared"), ("Megatron IndexedDataset, tokens only", "Megatron's IndexedDataset, unchecked"), ("np.memmap, tokens only, 64 rows", "`np.memmap`, unchecked")):  # fmt: skip
        rows.append(f"| {told} | {number(speeds[name]['random'])} |")
    stages = result("checkpoint")["stages"]
    rows.append("| **sft-dist** | " + " | ".join(number(stages[s]["stall_seconds"]) for s in "23") + " |")
    rows.append(
        "| DeepSpeed `save_checkpoint` | "
        + " | ".join(number(stages[s]["deepspeed_stall_seconds"]) for s in "23")
        + " |"
    )
    sums = result("accumulation")
    at = sums["counts"].index(3840)
    rows.append(f"| **sft-dist** | {sums['errors']['ours'][at]:.0e} |")
    rows.append(f"| DeepSpeed's default | {100 * sums['errors']['default'][at]:.2g} % |")
    assert [row for row in rows if row not in page] == []
    versions = tools["TRL bfd"]["versions"]
    assert f"TRL {versions['trl']}" in page


def test_the_numbers_of_the_first_page_are_those_measured():
    page = (ROOT / "docs" / "index.md").read_text()
    sums, chaos = result("accumulation"), result("chaos")
    at = sums["counts"].index(3840)
    off, ours = 100 * sums["errors"]["default"][at], sums["errors"]["ours"][at]
    assert f"at 3,840 micro-batches in bf16 DeepSpeed's default is {off:.2g} % off, this is off by {ours:.0e}" in page
    assert f"{chaos['lives']} lives killed, starved, damaged" in page
    [tool] = [tool for tool in result("prepare")["compare"]["results"] if tool["tool"] == "sft-dist, 1 worker"]
    assert f"{tool['tokens_per_cpu_second'] / 1e6:.2f} M tokens a CPU-second" in page


def test_the_numbers_of_the_page_on_packing_are_those_measured():
    page = (ROOT / "docs" / "concepts" / "packing.md").read_text()
    results = result("packing_pays")["results"]
    sms, instructions = (next(r for n, r in results.items() if n.startswith(k)) for k in ("SMS", "instr"))
    assert (
        f"{100 * sms['saved']:.0f} % less on the SMS example, {100 * instructions['saved']:.0f} % on instructions"
        in page
    )
    assert f"leaves {100 - 100 * sms['runs']['padded']['fill']:.0f} % of the arithmetic to padding" in page


def test_the_numbers_on_speed_are_those_measured():
    page, names = (
        (ROOT / "docs" / "speed.md").read_text(),
        {"trl": "TRL `SFTTrainer`, packing", "bare": "its head and kernel, no DeepSpeed"},
    )
    names |= {"plain": "plain PyTorch loop", "fsdp2": "the same under FSDP2", "trainer": "HF Trainer"}
    names |= {f"zero{stage}": f"**sft-dist, ZeRO {stage}**" for stage in range(3)}
    rows = []
    for name, of in result("train_step")["shapes"]["text"]["results"].items():
        rows.append(
            f"| {names[name]} | {of['tokens_per_second']:,.0f} | {of['cpu_seconds']:.1f} | {of['peak_mib']:,.0f} |"
        )
    for name, of in result("train_step_h100")["shapes"]["text"]["results"].items():
        cells = f"{of['tokens_per_second']:,.0f} | {100 * of['mfu']:.1f} % | {of['peak_mib']:,.0f} | {of['attention']}"
        rows.append(f"| {names[name]} | {cells} |")
    of_runs = [of["validation_loss"] for of in result("fp8")["runs"].values()]
    rows += [f"| {step} | {' | '.join(f'{of[step]:.3f}' for of in of_runs)} |" for step in ("0", "150")]
    heads = {
        "full": "all logits",
        "recomputed": "a part at a time, recomputed",
        "torch": "torch's `linear_cross_entropy`",
    }
    heads |= {"torch_parts": "the same, in parts of our size", "ours": "**sft-dist**"}
    for name, of in result("head")["results"].items():
        rows.append(f"| {heads[name]} | {of['min_cpu_seconds']:.2f} | {of['extra_mib']:,.0f} |")
    loop, foreach, fused, deepspeed = (of["min_cpu_seconds"] for of in result("optimizer")["results"].values())
    rows.append(
        f"{fused:.3f} s for 50 million parameters on two CPU cores, where DeepSpeed's takes {deepspeed:.3f} and torch's"
    )
    rows.append(f"others {foreach:.2f} and {loop:.2f}")
    assert [row for row in rows if row not in page] == []
    errors = [case["error"] for case in result("scaling")["cases"]]
    told = f"{-100 * max(errors):.0f} to {-100 * min(errors):.0f} % shorter than real ones"
    assert told in " ".join((ROOT / "docs" / "plan.md").read_text().split())
