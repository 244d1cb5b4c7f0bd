import re
import sys
from dataclasses import replace

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft_dist.data.curate import Curator, digests, is_validation, repetition, symbols, words
from sft_dist.data.records import Conversation, Drop, Turn
from sft_dist.errors import ConfigError
from sft_dist.schema import CurateConfig


def pair(prompt, response, where="f:1"):
    return Conversation((Turn("user", prompt), Turn("assistant", response, is_target=True)), where)


def text(content):
    return Conversation((Turn("text", content, is_target=True),), "f:1")


def mend(content, **config):
    """The text as it comes out, and what was counted."""
    curator = Curator(CurateConfig(**config))
    return curator(text(f"a{content}z")).turns[0].content[1:-1], dict(curator.mended)


def reason(record, **config):
    made = Curator(CurateConfig(**config), "</s>")(record)
    return made.reason if isinstance(made, Drop) else "kept"


@pytest.mark.parametrize(
    ("before", "after", "counted"),
    [
        ("e\u0301", "é", {"unicode": 1}),
        ("ﬁ²", "ﬁ²", {}),  # compatibility characters are NFKC's
        ("\x00a\x07\x1fb\x7f", "ab", {"control_characters": 1}),
        ("é\x00\ufeff", "é", {"control_characters": 1}),
        ("one\r\ntwo\tthree", "one\ntwo\tthree", {"control_characters": 1}),
        ("é\r\n", "é\n", {"control_characters": 1}),
        ("e\x07\u0301", "é", {"control_characters": 1, "unicode": 1}),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧", {}),  # joiners are spelling
        ("schÃ¶n", "schön", {"mojibake": 1}),
        ("ÃƒÂ¶", "ö", {"mojibake": 1}),  # twice
        ("â€œquotedâ€\x9d", "“quoted”", {"mojibake": 1}),
        ("it\x92s \x93so\x94", "it’s “so”", {"mojibake": 1}),  # cp1252 read as latin-1
        (" РџСЂРёРІРµС‚", " Привет", {"mojibake": 1}),
        ("ðŸ˜€ æ—¥æœ¬èªž", "😀 日本語", {"mojibake": 1}),
        ("&amp;&lt;p&gt;", "&amp;&lt;p&gt;", {}),
    ],
)
def test_each_mend_is_made_and_counted_once_a_text(before, after, counted):
    assert mend(before) == (after, counted)


@pytest.mark.parametrize(
    ("before", "config", "after", "counted"),
    [
        ("ﬁ²é", {"normalise": "NFKC"}, "fi2é", {"unicode": 1}),
        ("e\u0301", {"normalise": None}, "e\u0301", {}),
        ("\x00\r\n", {"control_characters": False}, "\x00\r\n", {}),
        ("é\x00\x85\x92", {"control_characters": False}, "é\x00\x85\x92", {}),
        ("é\x00", {"control_characters": False}, "é\x00", {}),
        ("schÃ¶n", {"mojibake": False}, "schÃ¶n", {}),
        ("&lt;&eacute;&amp;", {"html_entities": True}, "<é&", {"html_entities": 1}),
        ("AT&T & co", {"html_entities": True}, "AT&T & co", {}),
        ("&#65279;&Atilde;&para;", {"html_entities": True}, "ö", {"html_entities": 1, "control_characters": 1, "mojibake": 1}),
    ],
)  # fmt: skip
def test_mends_are_switched_one_by_one(before, config, after, counted):
    assert mend(before, **config) == (after, counted)


@pytest.mark.parametrize(
    "good",
    [
        "Schön und gut: Größe, Äpfel, Übung, „Straße“",
        "Ça va, à bientôt ! « Où ? » À l’été, DÉJÀ, L’ÂME",
        "Привет, как дела? Съешь ещё этих мягких «булок» СССР",
        "你好，世界。今天天气很好！日本語、テスト「はい」 한국어",
        "😀 👩‍👩‍👧 ✓ — … ½ ﬁ naïve café",
        "if c == 'Ã': return 'Â'  # latin-1 Ã, Â and ¶",
        "Ação: SÃO PAULO, NÃO",
        "Dvořák Łódź Ş ı İ ğ Việt Nam Ữ العربية Ελληνικά ไทย हिन्दी",
    ],
)
def test_correct_text_is_never_touched(good):
    record = pair(good, good)
    curator = Curator(CurateConfig())
    assert curator(record) is record
    assert not curator.mended


@given(st.text(min_size=1), st.sampled_from(["latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp437", "mac-roman"]))
@example("“é” 😀", "cp1252")
@settings(deadline=None, max_examples=150)
def test_the_quick_look_for_mojibake_misses_none_that_ftfy_repairs(good, codec):
    spoiled = good.encode().decode(codec, "ignore").strip() or "x"
    wanted = re.sub("\r\n?|[\x0b\x0c\x85]", "\n", ftfy.fix_encoding(f"a{spoiled}z"))
    wanted = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", "", wanted)
    assert mend(spoiled, normalise=None, outer_white_space=False)[0] == wanted[1:-1]


@given(st.text(), st.sampled_from(["NFC", "NFKC", None]))
@settings(deadline=None)
def test_mending_twice_is_mending_once(content, form):
    curator = Curator(CurateConfig(normalise=form, mojibake=False))
    once = curator(text(content))
    assert isinstance(once, Drop) or curator(once) is once


@pytest.mark.parametrize(
    ("response", "after", "count"),
    [("yes </s>\n", "yes", 1), ("yes</s></s>", "yes</s>", 1), ("</s> no", "</s> no", 0), ("yes", "yes", 0)],
)
def test_an_end_token_spelled_out_is_taken_off_a_response_only(response, after, count):
    curator = Curator(CurateConfig(strip_end_of_text=True), "</s>")
    made = curator(pair("say </s>", response))
    assert [turn.content for turn in made.turns] == ["say </s>", after]
    assert curator.mended["end_of_text"] == count
    assert Curator(CurateConfig(), "</s>")(pair("a", "b</s>")).turns[1].content == "b</s>"
    assert Curator(CurateConfig(strip_end_of_text=True))(pair("a", "b</s>")).turns[1].content == "b</s>"


def test_empty_turns():
    call = Turn("assistant", "", True, {"tool_calls": [{}]})
    assert reason(pair(" ", "b")) == "empty_prompt"
    assert reason(pair("a", " \n\ufeff")) == "empty_response"
    assert reason(pair("a", "</s>"), strip_end_of_text=True) == "empty_response"
    assert reason(text("\x00")) == "empty_text"
    asked = pair("a", "b")
    assert Curator(CurateConfig())(replace(asked, turns=(Turn("system", " "), *asked.turns))) == asked
    assert reason(replace(asked, turns=(asked.turns[0], call))) == "kept"


FIVE = "one two three four five "


@pytest.mark.parametrize(
    ("record", "config", "wanted", "detail"),
    [
        (pair("ab", "x"), {"min_prompt_characters": 3}, "short_prompt", "2 characters, at least 3 are asked for"),
        (pair("abc", "x"), {"min_prompt_characters": 3}, None, None),
        (pair("abcd", "x"), {"max_prompt_characters": 3}, "long_prompt", "4 characters, at most 3 are asked for"),
        (pair("a", "xy"), {"min_response_characters": 3}, "short_response", "2 characters, at least 3 are asked for"),
        (text("xyzw"), {"max_response_characters": 3}, "long_response", "4 characters, at most 3 are asked for"),
        (pair("a", "xyz"), {"max_response_characters": 3}, None, None),
        (pair("a", FIVE * 4), {"max_repetition": 0.7}, "repetition", "75% of its words repeat, at most 70% may"),
        (pair("a", FIVE * 4), {"max_repetition": 0.75}, None, None),
        (pair(FIVE * 9, "b"), {"max_repetition": 0.1}, None, None),  # of a prompt nothing is asked
        (pair("a", "a#!?"), {"max_symbols": 0.7}, "symbols", "75% of its characters are symbols, at most 70% may be"),
        (pair("###", "a#!?"), {"max_symbols": 0.75}, None, None),
        (pair("What is the weather like today?", "It is raining again."), {"languages": ["de", "fr"]}, "language", "is en, asked for de, fr"),
        (pair("Wie ist das Wetter heute?", "Es regnet schon wieder."), {"languages": ["de"]}, None, None),
    ],
)  # fmt: skip
def test_each_rule_drops_with_its_reason_and_the_numbers(record, config, wanted, detail):
    made = Curator(CurateConfig(**config))(record)
    if wanted is None:
        assert isinstance(made, Conversation)
    else:
        assert made == Drop(wanted, "f:1", detail)


def test_languages_must_be_known_and_their_package_there(monkeypatch):
    with pytest.raises(ConfigError, match="languages: 'english' is not known; use ISO 639-1 codes such as en, de"):
        Curator(CurateConfig(languages=["english", "de"]))
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(
        ConfigError, match=r"languages: \['en'\] needs py3langid; install it with pip install 'sft-dist\["
    ):
        Curator(CurateConfig(languages=["en"]))


@pytest.mark.parametrize("measure", [repetition, symbols])
@given(st.text())
def test_a_measure_is_a_share(measure, content):
    assert 0 <= measure(content) <= 1


SPACES = st.sampled_from([" ", "  ", "\n", "\t\n", "\xa0", "\u3000"])


@given(st.lists(st.sampled_from(["a", "b", "Å", "你"]), min_size=1), st.lists(SPACES, min_size=30), st.data())
def test_digests_are_blind_to_white_space_and_to_nothing_else(said, spaces, data):
    spaced = "".join(f"{word}{space}" for word, space in zip(said, spaces * len(said), strict=False))
    plain = pair(" ".join(said), " ".join(said))
    assert digests(pair(spaced, spaced)) == digests(plain)
    others = [
        pair("".join(said) + "c", " ".join(said)),
        Conversation((Turn("system", plain.turns[0].content), plain.turns[1]), "f:1"),
        replace(plain, turns=(*plain.turns[:1], replace(plain.turns[1], extra={"name": "x"}))),
        Conversation((Turn("user", f"{' '.join(said)} assistant {' '.join(said)}"),), "f:1"),
    ]
    other = data.draw(st.sampled_from(others))
    assert digests(other)[0] != digests(plain)[0]
    assert digests(pair(spaced, "another"))[1] == digests(plain)[1]


@given(st.text(), st.text(), st.integers(0, 9))
def test_the_side_of_the_split_depends_on_the_prompt_alone(prompt, response, seed):
    sides = {is_validation(pair(prompt, answer, answer), 0.5, seed) for answer in (response, "other")}
    assert len(sides) == 1


def test_the_share_is_about_right_and_growing_it_moves_nothing_back():
    records = [pair(f"prompt {n}", "x") for n in range(4000)]
    small, large, other = (
        {n for n, record in enumerate(records) if is_validation(record, share, seed)}
        for share, seed in ((0.1, 0), (0.2, 0), (0.1, 1))
    )
    assert small < large
    assert 330 < len(small) < 470
    assert len(small & other) < 100  # the seed chooses
    assert not any(is_validation(record, 0.0, 0) for record in records)


def test_words_have_no_case_and_no_punctuation():
    assert words("STRASSE, Straße; 你好 — x_1!") == ["strasse", "strasse", "你", "好", "x_1"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("a\rb", "a\nb"), ("a\r\nb", "a\nb"), ("page\x0cNext", "page\nNext"), ("a\x85é", "a\né"), ("a\x00b", "ab")],
)
def test_old_line_ends_do_not_join_words(before, after):
    assert mend(before, mojibake=False)[0] == after


def test_white_space_around_a_text_goes_counted_or_stays():
    for keeps, after, counted in ((False, "  x = 1\n", {}), (True, "x = 1", {"outer_white_space": 1})):
        curator = Curator(CurateConfig(outer_white_space=keeps))
        assert curator(text("  x = 1\n")).turns[0].content == after
        assert curator.mended == counted
    blank = Conversation((Turn("user", "a"), Turn("assistant", " \n", True)), "f:1")
    assert Curator(CurateConfig(outer_white_space=False))(blank).reason == "empty_response"


def test_what_is_learned_and_the_tools_make_another_record():
    turns = (Turn("user", "a"), Turn("assistant", "b", True), Turn("user", "c"), Turn("assistant", "d", True))
    plain = Conversation(turns, "f:1")
    muted = Conversation((turns[0], Turn("assistant", "b"), *turns[2:]), "f:2")
    tools = Conversation(turns, "f:3", None, [{"type": "function", "function": {"name": "f"}}])
    assert len({digests(each)[0] for each in (plain, muted, tools)}) == 3
    assert digests(plain)[1] == digests(muted)[1] != digests(tools)[1]


def test_a_conversation_that_goes_on_is_on_the_side_of_its_beginning():
    first = (Turn("user", "a"), Turn("assistant", "b", True))
    more = (Turn("system", "s"), *first, Turn("user", "c"), Turn("assistant", "d", True))
    short, long = Conversation(first, "f:1"), Conversation(more, "f:2")
    assert digests(short)[2] == digests(long)[2]
    assert all(is_validation(short, 0.5, seed) == is_validation(long, 0.5, seed) for seed in range(20))


def test_half_a_character_in_a_tool_call_is_a_drop_and_an_empty_tool_result_is_not():
    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "\ud800"}}}]}
    curator = Curator(CurateConfig())
    asked = Turn("user", "go")
    assert curator(Conversation((asked, Turn("assistant", "", True, call)), "f:1")).reason == "invalid_unicode"
    turns = (asked, Turn("assistant", "x", True), Turn("tool", ""), Turn("assistant", "done", True))
    assert curator(Conversation(turns, "f:1")).turns == turns
