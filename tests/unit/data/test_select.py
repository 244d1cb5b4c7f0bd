import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.select import quality, select
from sft_dist.errors import ConfigError

COOKING = [f"how do I bake {thing} bread in the oven" for thing in ("rye", "corn", "white", "brown", "sweet")]
ASTRONOMY = [f"which planet has {thing} moons orbiting it" for thing in ("two", "many", "icy", "no", "small")]
PROMPTS = COOKING + ASTRONOMY
FLAT = np.full(len(PROMPTS), 0.5)


@pytest.mark.parametrize("count", [1, 2, 5, 9, 10, 11])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_count_is_exact_the_places_ascend_and_the_seed_decides(count, weight):
    qualities = np.linspace(0, 1, len(PROMPTS))
    made, again = (select(PROMPTS, qualities, count, weight=weight, seed=3) for _ in range(2))
    assert made.dtype == np.int64
    assert len(made) == min(count, len(PROMPTS))
    assert (np.diff(made) > 0).all()
    assert made.tolist() == again.tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_of_two_kinds_are_one_of_each(seed):
    made = select(PROMPTS, FLAT, 2, weight=0.0, seed=seed)
    assert [place >= len(COOKING) for place in made] == [False, True]


def test_quality_alone_takes_the_best():
    qualities = np.array([0.3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.0, 0.4, 0.6, 0.5])
    assert select(PROMPTS, qualities, 4, weight=1.0, seed=0).tolist() == [1, 3, 5, 8]


@pytest.mark.parametrize("prompts", [["?!", "😀", ""], ["same", "same", "same"], ["a", "a b", ""]])
def test_prompts_that_hardly_say_anything_can_be_chosen_from(prompts):
    assert select(prompts, np.array([0.1, 0.9, 0.5]), 2, weight=0.9, seed=0).tolist() == [1, 2]


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(
        ConfigError, match=r"select: needs scikit-learn; install it with pip install 'sft-dist\[select\]'"
    ):
        select(PROMPTS, FLAT, 2, weight=0.5, seed=0)


GOOD = "Because blue light scatters more than red light does, the sky looks blue when the sun stands high."


@pytest.mark.parametrize(
    "worse",
    ["", "because", GOOD[:40], GOOD[:-1], "blue " * 18 + "blue.", "Why is the sky blue?"],
    ids=["empty", "one word", "short", "cut off", "repeats", "echo"],
)
def test_a_worse_answer_has_a_lower_quality(worse):
    prompt = "Why is the sky blue?"
    assert 0 <= quality(prompt, worse) < quality(prompt, GOOD) < 1


@given(st.text(), st.text())
def test_quality_is_between_0_and_1(prompt, response):
    assert 0 <= quality(prompt, response) <= 1
