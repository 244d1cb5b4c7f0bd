from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.curate import curate, is_validation
from sft_dist.data.records import Conversation, Drop, Turn


def pair(prompt, response, where="f:1"):
    return Conversation((Turn("user", prompt), Turn("assistant", response, is_target=True)), where)


def test_empty_and_repeated_records_go_with_a_reason():
    items = [
        pair(" a ", "b", "f:1"),
        pair("a", "b ", "f:2"),
        pair("a", "other", "f:3"),
        pair("a", " \n", "f:4"),
        pair("", "b", "f:5"),
        Conversation((Turn("text", " ", True),), "f:6"),
        Drop("invalid_json", "f:7", "x"),
    ]
    made = list(curate(items, deduplicate=True))
    assert [getattr(item, "reason", "kept") for item in made] == [
        "kept", "duplicate", "kept", "empty_response", "empty_prompt", "empty_text", "invalid_json",
    ]  # fmt: skip
    assert made[0].turns[0].content == "a"
    assert made[1].detail == "the same as f:1"
    assert len([item for item in curate(items, deduplicate=False) if isinstance(item, Conversation)]) == 3


@given(st.text(), st.text(), st.integers(0, 9))
def test_the_side_of_the_split_depends_on_the_prompt_alone(prompt, response, seed):
    sides = {is_validation(pair(prompt, answer), 0.5, seed) for answer in (response, "other")}
    assert len(sides) == 1


def test_the_share_is_about_right_and_growing_it_moves_nothing_back():
    records = [pair(f"prompt {n}", "x") for n in range(4000)]
    small = {n for n, record in enumerate(records) if is_validation(record, 0.1, 0)}
    large = {n for n, record in enumerate(records) if is_validation(record, 0.2, 0)}
    assert small < large
    assert 330 < len(small) < 470
    assert not any(is_validation(record, 0.0, 0) for record in records)
