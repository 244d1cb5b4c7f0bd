import os
import random
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.repeats import NearIndex, OverlapIndex, groups, shingles

TOP = 2**64 - 1
HALVES = st.sampled_from([0, 1, TOP, TOP - 1, 1 << 63, (1 << 63) - 1, 1 << 40])


@given(st.lists(st.tuples(HALVES, HALVES, st.booleans()), max_size=60), st.sampled_from([48, 100, 1 << 20]))
@settings(deadline=None, max_examples=60)
def test_groups_are_those_of_a_dictionary_however_many_buckets(tmp_path_factory, records, bucket_bytes):
    wanted = defaultdict(list)
    blocks, block = [], []
    for number, (high, low, ends_block) in enumerate(records):
        wanted[high, low].append(3 * number)  # numbers need not be dense
        block.append((high, low, 3 * number))
        if ends_block:
            blocks.append(block)
            block = []
    arrays = [np.array(block, np.uint64).reshape(-1, 3) for block in [*blocks, block]]
    made = defaultdict(list)
    scratch = tmp_path_factory.mktemp("groups")
    pairs = ((array[:, :2], array[:, 2].astype(np.int64)) for array in arrays)
    for numbers, firsts in groups(pairs, len(records), scratch, bucket_bytes=bucket_bytes):
        assert (numbers.dtype, len(numbers)) == (np.int64, len(firsts))
        for number, first in zip(numbers.tolist(), firsts.tolist(), strict=True):
            made[first].append(number)
    assert made == {group[0]: group for group in wanted.values() if len(group) > 1}
    assert not list(scratch.iterdir())


def test_files_stay_few_however_many_records_there_are(tmp_path):
    keys = np.array([[TOP, 1], [0, 1], [TOP, 1]], np.uint64)
    made = list(groups([(keys, np.arange(3))], 1 << 40, tmp_path))
    assert len(made) == 512
    assert [pair[0].tolist() for pair in made if len(pair[0])] == [[0, 2]]


@given(st.lists(st.text("ab", min_size=1), max_size=8))
def test_shingles_cover_every_word(words):
    made = shingles(words)
    assert len(made) == max(1, len(words) - 2)
    assert " ".join([*(each.split(" ")[0] for each in made[:-1]), made[-1]]) == " ".join(words)


def text(rng, count=120):
    return [f"w{rng.randrange(10**9)}" for _ in range(count)]


def similar(rng, words, share):
    """Another text of the same length; `share` of all their shingles, put together, are in both."""
    kept = round(2 * share / (1 + share) * len(words))
    return words[:kept] + text(rng, len(words) - kept)


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.3, 0.5, 0.69, 0.7, 0.8, 0.95])
def test_what_is_clearly_nearer_is_found_and_what_is_clearly_farther_is_not(threshold):
    rng, index = random.Random(0), NearIndex(threshold)
    texts = [text(rng) for _ in range(60)]
    for number, words in enumerate(texts):
        index.add(number, words)
    assert [index.find(words) for words in texts] == list(range(60))
    near = [index.find(similar(rng, words, threshold + 0.75 * (1 - threshold))) for words in texts]
    far = [index.find(similar(rng, words, threshold / 4)) for words in texts]
    assert sum(found == number for number, found in enumerate(near)) >= 59
    assert sum(found is not None for found in far) <= 1
    assert not any(index.find(text(rng)) is not None for _ in range(60))


def test_of_several_near_texts_the_first_is_named_in_whatever_order_they_came():
    index = NearIndex(0.5)
    for number in (9, 4, 7):
        index.add(number, ["the", "cat", "sat", "on", "the", "mat", "today"])
    assert index.find(["the", "cat", "sat", "on", "the", "mat"]) == 4


def test_texts_without_words_are_near_to_nothing():
    index = NearIndex(0.5)
    index.add(0, [])
    assert index.find([]) is None
    index.add(1, ["yes"])
    assert (index.find(["yes"]), index.find(["no"]), index.find([])) == (1, None, None)


PROGRAM = """
import random
from sft_dist.data.repeats import NearIndex
rng, index, found = random.Random(1), NearIndex(0.3), []
for number in range(150):
    words = [rng.choice("abc") for _ in range(9)]
    found.append(index.find(words))
    index.add(number, words)
print(found)
"""


def test_what_is_near_is_the_same_in_every_process():
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert len(set(runs[0].split())) > 20


SOME = st.lists(st.sampled_from("abcd"), max_size=12)


@given(st.lists(SOME, max_size=4), SOME, st.integers(3, 6))
def test_overlap_is_a_shared_run_or_a_whole_short_text(evaluation, words, length):
    index = OverlapIndex(length)
    for number, each in enumerate(evaluation):
        index.add(f"e:{number}", each)
    found = index.find(words)
    said = f" {' '.join(words)} "

    def runs(each):
        size = min(length, len(each))
        return [each[at : at + size] for at in range(len(each) - size + 1)] if size >= 3 else []

    wanted = {f"e:{n}" for n, each in enumerate(evaluation) if any(f" {' '.join(run)} " in said for run in runs(each))}
    assert (found in wanted) if wanted else found is None
