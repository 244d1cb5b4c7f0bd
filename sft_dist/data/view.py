"""What prepared shards look like to a person: their numbers, and any row in colour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist.data.shards import Shards
from sft_dist.data.tokenise import Tokenizer
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = {"target": "bold green", "context": "default", "padding": "dim", "boundary": "bold magenta"}


def statistics(shards: Shards) -> dict[str, Any]:
    """Counts of a split, and how long its documents are in tokens."""
    manifest, lengths = shards.manifest, _document_lengths(shards)
    return {
        "rows": manifest.rows,
        "tokens a row": manifest.seq_len,
        "samples": manifest.documents,
        "samples a row": manifest.documents_per_row,
        "tokens": manifest.tokens,
        "fill": manifest.fill,
        "target tokens": manifest.targets,
        "target share": manifest.targets / manifest.tokens,
        **{f"sample tokens, {name}": int(np.quantile(lengths, at)) for name, at in
           (("shortest", 0), ("median", 0.5), ("95 %", 0.95), ("longest", 1))},
    }  # fmt: skip


def _document_lengths(shards: Shards) -> np.ndarray:
    lengths = []
    for first in range(0, shards.num_rows, 1024):
        documents = shards.rows(np.arange(first, min(first + 1024, shards.num_rows))).documents
        keyed = documents + np.arange(len(documents))[:, None] * (shards.seq_len + 1)
        lengths.append(np.unique(keyed[documents >= 0], return_counts=True)[1])
    return np.concatenate(lengths)


def render_row(shards: Shards, tokenizer: Tokenizer, number: int) -> Text:
    """One row decoded: what is learned, what is only read, where documents begin, what is padding.

    Raises DataError for a row that does not exist.
    """
    from rich.text import Text

    if not 0 <= number < shards.num_rows:
        raise DataError(
            f"--row {number}: there are rows 0 to {shards.num_rows - 1} in {shards.folder}; choose one of these"
        )
    batch = shards.rows(np.array([number]))
    tokens, targets, documents = batch.tokens[0], batch.targets[0], batch.documents[0]
    text = Text("row ").append(str(number)).append(": ")
    for name, style in _STYLES.items():
        text.append(name, style).append("  ")
    changes = np.flatnonzero((np.diff(documents) != 0) | (np.diff(targets.astype(int)) != 0)) + 1
    last = None
    for run in np.split(np.arange(shards.seq_len), changes):
        document = int(documents[run[0]])
        if document != last and document >= 0:
            text.append(f"\n⟦sample {document}⟧ ", _STYLES["boundary"])
        last = document
        if document < 0:
            text.append(f"\n⟦padding: {len(run)} tokens⟧", _STYLES["padding"])
        elif targets[run[0]]:
            text.append("⟪" + _spelled(tokenizer, tokens[run]) + "⟫", _STYLES["target"])
        else:
            text.append(_spelled(tokenizer, tokens[run]), _STYLES["context"])
    return text


def _spelled(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Text of a run with the end token visible; decoded together, since a character may span tokens."""
    return tokenizer.inner.decode(tokens.tolist(), skip_special_tokens=False)
