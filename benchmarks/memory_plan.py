"""Memory of a GPU: what `sft-dist plan` says beforehand, beside what torch counts when the real engine runs.

`predict` writes what is foretold, to be committed first; `measure` reads that file and runs each case: DeepSpeed and the engine
on fake tensors, counted by torch's MemTracker (any size, any machine), or with `--on-gpu` for real, on one GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pack import machine

from tests.fake_engine import Case

GPT2 = {"model_type": "gpt2", "n_head": 16}
LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
}  # fmt: skip

# The formulas were written while looking at GPT-2 of 6 to 48 layers; nothing of the other families was looked at.
CASES = {
    "gpt2-355m": ({**GPT2, "n_layer": 24, "n_embd": 1024}, 50_257, 1024, "0", "fp32", 8, 2, False),
    "gpt2-0.8b": ({**GPT2, "n_layer": 24, "n_embd": 1600}, 50_257, 1024, "2_offload", "bf16", 2, 4, True),
    "llama-1.2b": (LLAMA, 128_256, 4096, "1", "bf16", 8, 1, True),
    "llama-1.2b offloaded": (LLAMA, 128_256, 2048, "3_offload", "bf16", 2, 1, False),
    "qwen2-0.5b": (QWEN2, 151_936, 2048, "2", "bf16", 16, 2, False),
    "qwen2-0.5b fp16": (QWEN2, 151_936, 1024, "1", "fp16", 2, 4, True),
    "neox-410m": (NEOX, 50_304, 2048, "3", "bf16", 4, 4, False),
    "mistral-2b": (MISTRAL, 32_000, 4096, "3", "bf16", 64, 1, True),
    "mistral-2b fp32": (MISTRAL, 32_000, 1024, "2", "fp32", 8, 1, False),
}


def case(name: str, on_gpu: bool) -> Case:
    """A case by name; on a GPU alone in the world."""
    made = Case(*CASES[name])
    return replace(made, world_size=1) if on_gpu else made


def predicted(about: Case) -> dict[str, float]:
    """Bytes of the GPU and of the host."""
    found = about.foretold()
    return {"device": found.total, "host": found.host}


def measured(about: Case, on_gpu: bool) -> dict[str, float]:
    """The same, by torch, in a process of its own."""
    module = "tests.gpu_engine" if on_gpu else "tests.fake_engine"
    done = subprocess.run([sys.executable, "-m", module, json.dumps(asdict(about))], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{about}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"device": found["peak"] - found["host"], "host": found["host"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["predict", "measure"])
    parser.add_argument("--predictions", type=Path, default=Path("benchmarks/results/memory_plan_predicted.json"))
    parser.add_argument("--json", type=Path, help="where `measure` writes what it found")
    parser.add_argument("--on-gpu", action="store_true", help="for real, on this machine's first GPU")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    options = parser.parse_args()
    if options.what == "predict":
        foretold = {name: predicted(case(name, options.on_gpu)) for name in options.only}
        options.predictions.write_text(json.dumps(foretold, indent=1) + "\n")
        return
    foretold = json.loads(options.predictions.read_text())
    results = {}
    print(
        f"{'case':24}{'stage':>10}{'ranks':>6}{'predicted GiB':>15}{'counted GiB':>13}{'error':>8}{'host GiB':>10}{'error':>8}"
    )
    for name in options.only:
        about = case(name, options.on_gpu)
        seen = measured(about, options.on_gpu)
        told = foretold[name]
        errors = {key: told[key] / seen[key] - 1 for key in ("device", "host") if seen[key]}
        results[name] = {**asdict(about), "predicted": told, "measured": seen, "error": errors}
        host = f"{seen['host'] / 2**30:>10.2f}{errors['host']:>+8.1%}" if seen["host"] else ""
        print(
            f"{name:24}{about.stage:>10}{about.world_size:>6}{told['device'] / 2**30:>15.2f}{seen['device'] / 2**30:>13.2f}"
            f"{errors['device']:>+8.1%}{host}",
            flush=True,
        )
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "cases": results,
                    "machine": machine(),
                    "versions": {n: version(n) for n in ("torch", "transformers", "deepspeed")},
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
