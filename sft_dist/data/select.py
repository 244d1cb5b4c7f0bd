"""LIMA-style selection: few examples, of high quality, as different from each other as possible.

Zhou et al. 2023, "LIMA: Less Is More for Alignment". Each prompt is a TF-IDF vector, reduced by a seeded SVD; the choice is
greedy k-centre (Sener and Savarese 2018, "Active Learning for Convolutional Neural Networks: A Core-Set Approach") with the
quality of the answer as a bonus. Costs about 1 KB of memory a candidate, and time for candidates x chosen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from sft_dist.errors import ConfigError

_DIMENSIONS = 64


def quality(prompt: str, response: str) -> float:
    """0 to 1: long enough to say something, words that vary, sentences that end, not the prompt once more.

    >>> quality("Why?", "no") < quality("Why?", "Because light scatters in the air; blue light scatters most.") < 1
    True
    """
    words = response.lower().split()
    if not words:
        return 0.0
    length = min(1.0, math.log1p(len(words)) / math.log1p(200))
    variety = len(set(words)) / len(words) ** 0.9
    is_ended = response.rstrip()[-1] in ".!?\"'`)]}>:;。！？"
    echo = len(set(words) & set(prompt.lower().split())) / len(set(words))
    return 0.5 * length + 0.25 * min(1.0, variety) + 0.15 * is_ended + 0.1 * (1 - echo)


def select(prompts: Sequence[str], qualities: np.ndarray, count: int, *, weight: float, seed: int) -> np.ndarray:
    """Places of the `count` chosen examples, ascending int64; the same for the same seed.

    `weight`: 0 looks at the spread only, 1 at the quality only. Raises ConfigError without scikit-learn.

    >>> select(["a b c", "a b c d", "x y z"], np.array([0.1, 0.9, 0.5]), 2, weight=0.5, seed=0).tolist()
    [1, 2]
    """
    if count >= len(prompts):
        return np.arange(len(prompts))
    features = _features(prompts, seed)
    qualities = (qualities - qualities.min()) / max(1e-9, np.ptp(qualities))
    chosen = [int(np.argmax(qualities))]
    nearest = 1 - features @ features[chosen[0]]
    is_taken = np.zeros(len(prompts), bool)
    is_taken[chosen[0]] = True
    while len(chosen) < count:
        worth = (1 - weight) * nearest / max(1e-9, float(nearest.max())) + weight * qualities
        best = int(np.argmax(np.where(is_taken, -np.inf, worth)))
        chosen.append(best)
        is_taken[best] = True
        np.minimum(nearest, 1 - features @ features[best], out=nearest)
    return np.sort(np.array(chosen, np.int64))


def _features(prompts: Sequence[str], seed: int) -> np.ndarray:
    """Unit vectors fp64 [prompts, at most 64]."""
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ConfigError(
            "prepare.curate.select: needs scikit-learn; install it with pip install 'sft-dist[select]'"
        ) from None
    if not any(map(re.compile(r"\w").search, prompts)):
        return np.zeros((len(prompts), 1))  # nothing tells them apart
    made = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit_transform(prompts)
    size = min(_DIMENSIONS, min(made.shape) - 1)
    dense = TruncatedSVD(size, random_state=seed).fit_transform(made) if size >= 2 else made.toarray()
    return dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
