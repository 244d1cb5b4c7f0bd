"""What is proven of a model before its first step: documents cannot see each other, and what is computed is what the model says."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from sft_dist import fp8
from sft_dist.attention import WINDOW, choose, largest, leak
from sft_dist.comms import Comms
from sft_dist.engine import Engine
from sft_dist.errors import ConfigError, ModelError
from sft_dist.head import targets_at
from sft_dist.kernels import candidates, differentiated, knows_documents, narrowed
from sft_dist.long_rows import Shared

if TYPE_CHECKING:
    from launch.settle import Plan


def proven(plan: Plan, engine: Engine, comms: Comms) -> str:
    """Packed documents cannot see each other, on this model, kernel, precision and device, or ModelError; and the head is right.

    The ranks try the same kernels and choose alike: under ZeRO 3 they must call the model equally often.
    """

    def worst(movement: float) -> float:
        return largest(*comms.gather(movement))

    truth = engine.deepspeed.module.config._attn_implementation  # as the model was built
    everywhere = comms.gather(kernel_names(plan, truth))
    names = [name for name in everywhere[0] if all(name in there for there in everywhere)]
    vocab_size, is_16_bit = plan.shards.manifest.vocab_size, plan.config.train.precision != "fp32"
    model = engine.deepspeed.module
    is_fp8 = plan.config.train.fp8
    with narrowed(model, WINDOW), fp8.in_16_bits(model) if is_fp8 else nullcontext():
        kernel, moved, passed_over = engine.head.kept_apart(
            lambda: choose(
                names,
                engine.use_kernel,
                engine.logits,
                vocab_size,
                is_16_bit=is_16_bit,
                differentiated=lambda: differentiated(model),
                worst=worst,
            )
        )
    if is_fp8 and not (by_others := worst(leak(engine.logits, vocab_size)[0])) <= 3e-2:  # also of NaN
        raise ModelError(
            f"train.fp8: logits of a document move by {by_others:.1e} of the largest when others are packed beside it; leave it out"
        )
    if plan.config.train.attention not in ("auto", kernel):
        raise ConfigError(f"train.attention: {passed_over[0]}. Use auto, or {truth}, which this model has")
    if engine.shared is not None and not knows_documents(kernel):
        raise ConfigError(
            f"train.sequence_parallel: {passed_over[0]}, and {kernel} cannot see parts of rows; leave it out"
        )
    head = engine.head.check(engine.scores, engine.logits, vocab_size, is_16_bit=is_16_bit, worst=worst)
    if engine.shared is not None:
        off = worst(_shared_error(engine, engine.shared, vocab_size))
        if not off <= (3e-2 if is_16_bit else 1e-3):
            raise ModelError(
                f"train.sequence_parallel: log-probabilities of rows that ranks share are off by {off:.1e}: a layer of this model sees more "
                "of a row than its tokens one by one and attention; leave it out"
            )
        kernel += f", rows shared by {engine.shared.count} ranks (log-probabilities off by {off:.0e})"
    if engine.head.makes_masks and not knows_documents(kernel):
        kernel += ", its masks made here, since this model forgets where documents begin"
    told = [f"packed documents kept apart (logits move {moved:.0e})", f"attention: {kernel}; {head}"]
    if is_fp8:
        told.append(fp8.told(model))
    return "\n".join([*told, *(f"note: {line}" for line in passed_over)])


def _shared_error(engine: Engine, shared: Shared, vocab_size: int) -> float:
    """How far log-probabilities of this rank's part of shared rows are from those of rows that it has for itself."""
    length = 24 * shared.count
    tokens = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(17), torch.arange(length - 17)]).repeat(2, 1)
    count, of_rows = 2 * (length - 2), torch.zeros(2, length)
    (places, labels), targets = targets_at(tokens, positions > 0, count), positions > 0
    whole = engine.scores(tokens, positions, places, labels).log_probs.cpu()
    of_rows.view(-1)[places[:count]] = whole[:count]
    places, labels = targets_at(tokens, targets, count, shared)
    part = engine.scores(tokens, positions, places, labels, shared=shared).log_probs.cpu()
    expected = shared.part(of_rows).flatten()[places]
    return (part - expected)[labels >= 0].abs().max().item()


def kernel_names(plan: Plan, truth: str = "sdpa") -> list[str]:
    """Kernels of attention to be tried, the `truth` last; the run file's own one alone before it."""
    wanted, is_16_bit = plan.config.train.attention, plan.config.train.precision != "fp32"
    if plan.config.train.sequence_parallel > 1 and wanted == "auto":
        wanted = "varlen" if torch.cuda.is_available() and is_16_bit else "by_document"
    if wanted == "auto":
        return candidates("cuda" if torch.cuda.is_available() else "cpu", is_16_bit=is_16_bit, truth=truth)
    return [truth] if wanted == truth else [wanted, truth]
