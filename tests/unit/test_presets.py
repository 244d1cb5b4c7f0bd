"""Every preset fits where it says that it fits: the lines of `sft-dist plan` in it, reckoned for the shape it names."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

from launch import fit, init
from launch.plan import Options
from launch.settle import Plan
from sft_dist import memory
from sft_dist.config import load
from sft_dist.gpus import GIB, gpu
from sft_dist.model import model_config
from sft_dist.schema import ModelConfig
from sft_dist.topology import Life, Topology
from tests.unit.prepared_runs import sft_dist

ROOT = Path(__file__).parents[2]
PARAMETERS = {  # as their makers count them
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama-1b": 1_235_814_400, "llama-8b": 8_030_261_248, "llama-8b-one-gpu": 8_030_261_248,
    "llama-8b-long": 8_030_261_248, "llama-70b": 70_553_706_496,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """seq_len -> rows of that length by GPT-2's tokenizer; of which preset they are, memory does not depend on."""
    folder = tmp_path_factory.mktemp("presets")
    source = f"{{path: {ROOT}/examples/instructions/data/seed_tasks.jsonl, schema: self_instruct}}"
    made = {}
    for seq_len in (1024, 4096, 131_072):
        made[seq_len] = folder / str(seq_len)
        values = ("alpaca", f"{ROOT}/examples/tokenizers/gpt2", seq_len, made[seq_len])
        names = ("template", "tokenizer", "seq_len", "out")
        pairs = [f"prepare.{name}={value}" for name, value in zip(names, values, strict=True)]
        result = sft_dist(
            "prepare", ROOT / "examples/presets/gpt2.yaml", f"prepare.sources=[{source}]", *pairs, "--workers", 1
        )
        assert result.exit_code == 0, result.output
    return made


def lines(text):
    """(options, overrides) of the commands of a preset."""
    for words in map(shlex.split, re.findall(r"^#   sft-dist plan RUN\.yaml (.*)$", text, flags=re.MULTILINE)):
        options = dict(zip(words[::2], words[1::2], strict=False))
        yield (
            {name: value for name, value in options.items() if name.startswith("--")},
            [word for word in words if "=" in word],
        )


def without_hub(text):
    """The model of the same shape that the preset names in a remark."""
    found = re.findall(r"^# model: (\{config: .*\})$", text, flags=re.MULTILINE)
    return [f"model={found[0]}"] if found else []


def _as_pages_say(name, needed, world_size):
    """What docs/speed.md tells of the presets for long rows and for one GPU."""
    told = {
        "llama-8b-long": f"on {world_size} GPUs ({needed.total / GIB:.1f} GiB each, by",
        "llama-8b-one-gpu": f"AdamW's state on the host ({math.ceil(needed.host / 1e10) * 10} GB there)",
    }
    assert told.get(name, "") in (ROOT / "docs" / "speed.md").read_text()


def test_activations_are_as_the_page_on_speed_says():
    wanted = ModelConfig(**yaml.safe_load(without_hub(init.preset("llama-8b"))[0].removeprefix("model=")))
    made = model_config(wanted, vocab_size=128_256, seq_len=4096, eos_id=0)
    about = {"rows": 1, "seq_len": 4096, "precision": "bf16"}
    found = [
        f"{memory.trace(wanted, made, checkpointing=way, **about).forward.bytes / GIB:.1f}"
        for way in (False, "selective", True, "offload")
    ]
    told = "{} GiB without recomputation, {} with `selective`, {} with `true` and {} with `offload`".format(*found)
    assert told in (ROOT / "docs" / "speed.md").read_text()


@pytest.mark.parametrize("name", init.presets())
def test_a_preset_fits_where_it_says(shards, name):
    text = init.preset(name)
    seq_len = max(1024, yaml.safe_load(text)["prepare"]["seq_len"])
    commands = list(lines(text))
    assert len(commands) >= (1 if name == "tiny" else 2)
    model = None
    for options, overrides in commands:
        of_machines = Options(int(options.get("--nodes", 1)), int(options["--gpus-per-node"]), options["--gpu"])
        config = load(
            ROOT / f"examples/presets/{name}.yaml", [*without_hub(text), f"prepare.out={shards[seq_len]}", *overrides]
        )
        topology = Topology(world_size=of_machines.world_size, local_world_size=of_machines.gpus_per_node)
        card = gpu(of_machines.gpu)
        plan = Plan.of(config, topology, Life("test"), card=card, is_elsewhere=True)
        model = model or fit.model_of(plan)
        needed = fit.needed(plan, model)
        total = needed.total
        if not overrides:
            _as_pages_say(name, needed, of_machines.world_size)
        assert total <= card.usable_bytes, (options, overrides, total / 2**30)
        is_offloaded = "offload_optimizer" in plan.zero["zero_optimization"]  # which wants long steps
        assert plan.batch.accumulation_steps <= 8 or is_offloaded
        if name != "tiny" and not overrides:
            assert total > 0.2 * card.usable_bytes, "the GPUs are not left empty"
            too_much = fit.with_rows(plan, 8 * plan.batch.micro_batch_rows)
            assert fit.needed(too_much, model).total > card.usable_bytes, "the check can fail"
    assert name == "tiny" or model.size.parameters == PARAMETERS[name]
