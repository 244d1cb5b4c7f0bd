import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.records import Conversation, Drop, Span, Turn
from sft_dist.data.template import template_from
from sft_dist.errors import ConfigError

SPAM = "Is this message spam or ham?\n{text}\nAnswer:"
NAMES = ["plain", "alpaca", "chat", SPAM, 'braces }} {% raw %} "quoted" \\n {text}\n\n=>']
CONTENT = st.text(min_size=1).filter(lambda text: text.strip())


def talk(*contents, system=None):
    turns = [Turn("system", system)] if system else []
    for place, content in enumerate(contents):
        turns.append(Turn("assistant", content, True) if place % 2 else Turn("user", content))
    return Conversation(tuple(turns), "f:1")


def rendered(template, messages, **more):
    def refuse(text):
        raise ValueError(text)

    environment = jinja2.Environment()  # transformers uses a sandboxed one with the same syntax
    made = environment.from_string(template.chat_template(has_bos=False))
    return made.render(messages=messages, eos_token="</s>", raise_exception=refuse, **more)


def as_messages(conversation):
    return [{"role": turn.role, "content": turn.content} for turn in conversation.turns]


@pytest.mark.parametrize("name", NAMES)
@given(prompt=CONTENT, answer=CONTENT)
@settings(max_examples=30, deadline=None)
def test_the_spans_are_what_the_chat_template_renders(name, prompt, answer):
    template, conversation = template_from(name), talk(prompt, answer)
    spans = template.render(conversation, "</s>")
    assert "".join(span.text for span in spans) == rendered(template, as_messages(conversation))
    assert "".join(span.text for span in spans if span.is_target) == f"{template.lead}{answer}</s>"
    asked = rendered(template, as_messages(conversation)[:1], add_generation_prompt=True)
    assert "".join(span.text for span in template.render_prompt(conversation.prompt, "</s>")) == asked
    assert spans[0].text == asked


def test_several_turns_and_a_system_message():
    template, conversation = template_from("chat"), talk("a", "b", "c", "d", system="s")
    spans = template.render(conversation, "</s>")
    assert "".join(span.text for span in spans) == rendered(template, as_messages(conversation))
    assert [span.text for span in spans if span.is_target] == ["b", "</s>", "d", "</s>"]
    assert spans[0].text == "### System:\ns\n\n### User:\na\n\n### Assistant:\n"


def test_an_answer_without_weight_is_context():
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d", True))
    spans = template_from("chat").render(Conversation(turns, "f:1"), "</s>")
    assert [span.text for span in spans if span.is_target] == ["d", "</s>"]


def test_plain_text_is_learned_whole():
    spans = template_from("plain").render(Conversation((Turn("text", "story", True),), "f:1"), "</s>")
    assert spans == [Span("story", True), Span("</s>", True, is_control=True)]


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        ("plain", talk("a", "b", "c", "d"), "for one question, found 2"),
        (SPAM, talk("a", "b", system="s"), "no place for a system message"),
        ("chat", Conversation((Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")), "f:1"), "in turn"),
        ("chat", Conversation((Turn("assistant", "c"),), "f:1"), "in turn, found assistant"),
    ],
)
def test_a_conversation_without_a_place_is_dropped(name, conversation, message):
    drop = template_from(name).render(conversation, "</s>")
    assert isinstance(drop, Drop)
    assert drop.reason == "template_mismatch"
    assert message in drop.detail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpacca", r"\{text\} exactly once \(found none\); correct it, or use plain, alpaca, chat"),
        ("{text} {text}:", r"found \{text\}, \{text\}"),
        ("{prompt}:", r"found \{prompt\}"),
        ("Say {text}", "nothing follows"),
    ],
)
def test_a_bad_template_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        template_from(text)


def test_system_messages_are_refused_at_inference_too():
    with pytest.raises(ValueError, match="trained without system messages"):
        rendered(template_from("plain"), [{"role": "system", "content": "s"}])
