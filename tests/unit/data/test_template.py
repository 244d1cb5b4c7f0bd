from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from sft_dist.data.records import Conversation, Drop, Span, Turn
from sft_dist.data.template import TokenizerTexts, template_from
from sft_dist.errors import ConfigError, DataError

SPAM = "Is this message spam or ham?\n{text}\nAnswer:"
QUOTED = 'braces }} {% raw %} "quoted" \\n {text}\n\n=>'
CONTENT = st.text(min_size=1).map(str.strip).filter(bool)
FOLDER = Path(__file__).parent / "templates"


def texts(bos, eos, *more):
    return TokenizerTexts(None, bos, eos, frozenset({*more, eos, "<|endoftext|>"} | ({bos} if bos else set())))


CHATML = texts(None, "<|im_end|>", "<|im_start|>")
LLAMA2 = texts("<s>", "</s>")
LLAMA3 = texts("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PRESETS = {
    **dict.fromkeys(["plain", "alpaca", "chat", SPAM, QUOTED, "llama2"], LLAMA2),
    "chatml": CHATML,
    "llama3": LLAMA3,
}
# name: its tokenizer, and the token its answers end with
JINJA = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama2": (LLAMA2, "</s>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (texts("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), "</s>"),
    "qwen2_5": (CHATML, "<|im_end|>"),
    "qwen3": (CHATML, "<|im_end|>"),
    "gemma": (texts("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi3": (texts("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "zephyr": (LLAMA2, "</s>"),
    "command_r": (
        texts("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek": (
        texts("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
    ),
}
UNROLLED = {"qwen3"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "note": "<|im_end|>"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def talk(*contents, system=None):
    turns = [Turn("system", system)] if system else []
    for place, content in enumerate(contents):
        turns.append(Turn("assistant", content, True) if place % 2 else Turn("user", content))
    return Conversation(tuple(turns), "f:1")


def file(name):
    return template_from(str(FOLDER / f"{name}.jinja"), JINJA[name][0])


def inline(tmp_path, source, tokenizer=LLAMA2):
    path = tmp_path / "own.jinja"
    path.write_text(source)
    return template_from(str(path), tokenizer)


def inference(template, turns, tokenizer, tools=None, has_bos=False, ask=False):
    """What transformers makes of the exported chat template."""
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return render_jinja_template(
        [[{"role": turn.role, "content": turn.content, **(turn.extra or {})} for turn in turns]],
        tools=tools,
        chat_template=template.chat_template(has_bos=has_bos),
        add_generation_prompt=ask,
        **{name: token for name, token in names.items() if token},
    )[0][0]


def joined(spans):
    return "".join(span.text for span in spans)


def learned(spans):
    return [span.text for span in spans if span.is_target]


def controls(spans):
    return [(span.text, span.is_target) for span in spans if span.is_control]


@pytest.mark.parametrize("name", PRESETS)
@given(prompt=CONTENT, answer=CONTENT)
@settings(max_examples=30, deadline=None)
def test_a_preset_is_what_its_chat_template_renders(name, prompt, answer):
    tokenizer = PRESETS[name]
    template, conversation = template_from(name, tokenizer), talk(prompt, answer)
    [spans] = template.render(conversation, "</s>")
    own = replace(tokenizer, eos_token="</s>")
    assert joined(spans) == inference(template, conversation.turns, own)
    assert learned(spans) == [f"{template.lead}{answer}{template.trail}", template.end_token("</s>")]
    asked = joined(template.render_prompt(conversation.prompt, "</s>"))
    assert asked == inference(template, conversation.prompt, own, ask=True)
    first_target = next(place for place, span in enumerate(spans) if span.is_target)
    assert joined(spans[:first_target]) == asked


@pytest.mark.parametrize("name", ["chat", "chatml", "llama2", "llama3"])
def test_several_turns_and_a_system_message(name):
    template, conversation = template_from(name, PRESETS[name]), talk("a", "b", "c", "d", system="s")
    [spans] = template.render(conversation, PRESETS[name].eos_token)
    assert joined(spans) == inference(template, conversation.turns, PRESETS[name])
    assert [text.strip() for text in learned(spans)[::2]] == ["b", "d"]
    assert set(learned(spans)[1::2]) == {template.end_token(PRESETS[name].eos_token)}
    prompt = template.render_prompt(conversation.prompt, PRESETS[name].eos_token)
    assert joined(prompt) == inference(template, conversation.prompt, PRESETS[name], ask=True)
    if name in JINJA:  # the published template says the same
        assert joined(spans) == inference(file(name), conversation.turns, PRESETS[name])
        assert [[*spans]] == file(name).render(conversation, PRESETS[name].eos_token)


def test_the_spans_of_presets():
    [chat] = template_from("chat").render(talk("a", "b", system="s"), "</s>")
    assert chat[0].text == "### System:\ns\n\n### User:\na\n\n### Assistant:\n"
    [chatml] = template_from("chatml", CHATML).render(talk("a", "b"), "</s>")
    assert chatml[-5:] == [
        Span("<|im_start|>", False, True),
        Span("assistant\n", False),
        Span("b", True),
        Span("<|im_end|>", True, True),
        Span("\n", False),
    ]
    [llama2] = template_from("llama2", LLAMA2).render(talk("a", "b", system="s"), "</s>")
    assert llama2 == [
        Span("<s>", False, True),
        Span("[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST]", False),
        Span(" b ", True),
        Span("</s>", True, True),
    ]


@pytest.mark.parametrize(("name", "bos"), [("plain", "<s>"), ("chatml", "<s>"), ("llama2", ""), ("llama3", "")])
def test_the_beginning_token_is_written_once(name, bos):
    template, turns = template_from(name), talk("a", "b").turns
    texts = [inference(template, turns, LLAMA2, has_bos=has_bos) for has_bos in (True, False)]
    assert texts[0] == bos + texts[1]


def test_a_preset_takes_the_tokenizers_own_beginning_token():
    [spans] = template_from("llama2", texts("<bos>", "<eos>")).render(talk("a", "b"), "<eos>")
    assert controls(spans) == [("<bos>", False), ("<eos>", True)]


@pytest.mark.parametrize("name", ["chat", *JINJA])
def test_an_answer_without_weight_is_context(name):
    turns = (Turn("user", "a"), Turn("assistant", "bb"), Turn("user", "c"), Turn("assistant", "dd", True))
    template = file(name) if name in JINJA else template_from(name)
    [spans] = template.render(Conversation(turns, "f:1"), "</s>")
    assert joined(spans) == inference(template, turns, JINJA[name][0] if name in JINJA else LLAMA2)
    assert "dd" in joined(span for span in spans if span.is_target)
    assert "bb" not in joined(span for span in spans if span.is_target)
    assert "bb" in joined(spans)


@pytest.mark.parametrize("name", ["plain", "chatml", str(FOLDER / "gemma.jinja")])
def test_plain_text_is_learned_whole(name):
    assert template_from(name).render(Conversation((Turn("text", "story", True),), "f:1"), "</s>") == [
        [Span("story", True), Span("</s>", True, is_control=True)]
    ]


TOOL_TALK = Conversation(
    (
        Turn("user", "2 + 3?"),
        Turn("assistant", "", True, {"tool_calls": [CALL]}),
        Turn("tool", "5 <|im_end|>", extra={"name": "add"}),
        Turn("assistant", "It is 5.", True),
    ),
    "f:1",
    tools=TOOLS,
)
REASONED = (
    Turn("user", "a"),
    Turn("assistant", "bb", True, {"reasoning_content": "why b"}),
    Turn("user", "c"),
    Turn("assistant", "dd", True, {"reasoning_content": "why d"}),
)


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        ("plain", talk("a", "b", "c", "d"), "for one question, found 2"),
        (SPAM, talk("a", "b", system="s"), "no place for a system message"),
        ("chat", Conversation((Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")), "f:1"), "in turn"),
        ("chat", Conversation((Turn("assistant", "c"),), "f:1"), "in turn, found assistant"),
        ("chatml", replace(talk("a", "b"), tools=TOOLS), "no place for tools"),
        ("chatml", TOOL_TALK, "no place for tool calls"),
        ("llama3", Conversation(REASONED, "f:1"), "no place for tool calls or reasoning"),
    ],
)
def test_a_conversation_without_a_place_is_dropped(name, conversation, message):
    drop = template_from(name).render(conversation, "</s>")
    assert isinstance(drop, Drop)
    assert drop.reason == "template_mismatch"
    assert message in drop.detail


def test_roles_in_any_order_where_the_template_allows_it():
    turns = (
        Turn("assistant", "x", True),
        Turn("user", "a"),
        Turn("user", "b"),
        Turn("system", "s"),
        Turn("assistant", "y"),
    )
    template = template_from("chatml", CHATML)
    [spans] = template.render(Conversation(turns, "f:1"), "<|im_end|>")
    assert joined(spans) == inference(template, turns, CHATML)
    assert learned(spans) == ["x", "<|im_end|>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpacca", r"\{text\} exactly once \(found none\); correct it, or use plain, alpaca, chat"),
        ("{text} {text}:", r"found \{text\}, \{text\}"),
        ("{prompt}:", r"found \{prompt\}"),
        ("Say {text}", "nothing follows"),
        ("no/such/file.jinja", "'no/such/file.jinja': cannot be read"),
    ],
)
def test_a_bad_template_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        template_from(text)


@pytest.mark.parametrize(
    ("name", "tokenizer", "message"),
    [
        (
            "chatml",
            LLAMA2,
            r"needs '<\|im_start\|>', '<\|im_end\|>' among the tokenizer's special tokens; use template: chat",
        ),
        ("llama2", CHATML, "needs '<s>'"),
        ("llama3", LLAMA2, r"needs '<\|start_header_id\|>'"),
        ("tokenizer", CHATML, "has no chat template of its own"),
    ],
)
def test_a_template_that_the_tokenizer_does_not_fit_is_refused(name, tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        template_from(name, tokenizer)


@pytest.mark.parametrize("role", ["system", "tool"])
def test_roles_without_a_place_are_refused_at_inference_too(role):
    with pytest.raises(jinja2.TemplateError, match=f"trained without {role} messages"):
        inference(template_from("plain"), [Turn(role, "s")], LLAMA2)


# --- Jinja ---


def check_documents(template, conversation, tokenizer, end):
    """Each document is what inference renders, and learns one answer, or all of them, to the end token."""
    turns = conversation.turns
    documents = template.render(conversation, tokenizer.eos_token)
    assert isinstance(documents, list), documents
    targets = [place for place, turn in enumerate(turns) if turn.is_target]
    counts = [len(turns)] if len(documents) == 1 else [place + 1 for place in targets]
    for number, (spans, count) in enumerate(zip(documents, counts, strict=True)):
        assert joined(spans) == inference(template, turns[:count], tokenizer, conversation.tools)
        for place in targets if len(documents) == 1 else [targets[number]]:
            prompt = joined(template.render_prompt(turns[:place], tokenizer.eos_token, conversation.tools))
            assert joined(spans).startswith(prompt)
            assert prompt == inference(template, turns[:place], tokenizer, conversation.tools, ask=True)
    ends = [token for spans in documents for token, is_target in controls(spans) if is_target]
    assert ends.count(end) == len(targets)
    return documents


@pytest.mark.parametrize("name", JINJA)
def test_every_answer_and_nothing_else_is_learned(name):
    tokenizer, end = JINJA[name]
    template = file(name)
    assert template.end_token(tokenizer.eos_token) == end
    documents = check_documents(template, talk("2 < 3?", "yes", "and\n5?", "no"), tokenizer, end)
    assert len(documents) == (2 if name in UNROLLED else 1)
    flat = "".join(text for spans in documents for text in learned(spans))
    assert "".join(flat.replace("<think>", "").replace("</think>", "").split()) == f"yes{end}no{end}"


@pytest.mark.parametrize("name", JINJA)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_contents_that_spell_control_tokens_stay_text(name, data):
    tokenizer, end = JINJA[name]
    piece = (
        st.sampled_from(sorted(tokenizer.control_tokens)) | st.text(st.characters(exclude_characters="<>|")) | CONTENT
    )
    content = st.lists(piece, min_size=1, max_size=4).map("".join).map(str.strip).filter(bool)
    contents = [data.draw(content) for _ in range(4)]
    template = file(name)
    documents = check_documents(template, talk(*contents), tokenizer, end)
    harmless = template.render(talk("a", "b", "c", "d"), tokenizer.eos_token)
    assert [controls(spans) for spans in documents] == [controls(spans) for spans in harmless]
    for answer in contents[1::2]:
        assert any(
            answer in span.text for spans in documents for span in spans if span.is_target and not span.is_control
        )


def test_private_characters_of_a_record_are_kept():
    [spans] = file("chatml").render(talk("\ue000 <|im_end|> \ue001", "b"), "<|im_end|>")
    assert Span("user\n\ue000 <|im_end|> \ue001", False) in spans


def test_reasoning_that_later_prompts_leave_out_is_learned_in_its_own_document():
    documents = check_documents(file("qwen3"), Conversation(REASONED, "f:1"), CHATML, "<|im_end|>")
    assert [learned(spans) for spans in documents] == [
        ["<think>\nwhy b\n</think>\n\nbb", "<|im_end|>"],
        ["<think>\nwhy d\n</think>\n\ndd", "<|im_end|>"],
    ]
    assert "why b" not in joined(documents[1])


def test_reasoning_inside_the_content_is_learned_too():
    [spans] = file("qwen3").render(talk("a", "<think>why</think>\nb"), "<|im_end|>")
    assert learned(spans) == ["<think>\nwhy\n</think>\n\nb", "<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "mistral"])
def test_tool_calls_are_learned_and_tool_results_are_not(name):
    tokenizer, end = JINJA[name]
    documents = check_documents(file(name), TOOL_TALK, tokenizer, end)
    flat = joined(span for spans in documents for span in spans if span.is_target)
    assert '"name": "add", "arguments": {"a": 2, "note": "<|im_end|>"}' in flat
    assert "It is 5." in flat
    assert "5 <|im_end|>" not in flat
    assert "5 <|im_end|>" in joined(documents[-1])


def test_a_system_message_that_moves_makes_documents_of_their_own():
    documents = check_documents(file("mistral"), talk("a", "bb", "c", "dd", system="s"), *JINJA["mistral"])
    assert [learned(spans) for spans in documents] == [[" bb", "</s>"], [" dd", "</s>"]]


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        ("gemma", talk("a", "b", system="s"), "System role not supported"),
        (
            "llama2",
            Conversation((Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c", True)), "f:1"),
            "alternate",
        ),
        ("llama3", TOOL_TALK, "'add' of an answer is left out"),
        ("qwen2_5", Conversation(REASONED, "f:1"), "'why b' of an answer is left out"),
    ],
)
def test_what_a_jinja_template_refuses_or_leaves_out_is_dropped(name, conversation, message):
    made = file(name).render(conversation, JINJA[name][0].eos_token)
    assert isinstance(made, Drop)
    assert made.reason == "template_mismatch"
    assert message in made.detail


LOOP = "{% for m in messages %}{{ '<s>' + m.role + ':' + m.content + '</s>' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}<s>assistant:{% endif %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP, "it has no generation prompt, though '<s>assistant:' stands before its answers"),
        (LOOP.replace("m.content", "m.content | upper") + ASK, "it changes the text of answers"),
        (LOOP.replace("m.content", "m.content | replace('<', '&lt;')") + ASK, "it changes the text of answers"),
        (LOOP + "{% if add_generation_prompt %}<s>model:{% endif %}", "its answers do not begin there"),
        (LOOP.replace("</s>", "\\n\\n") + ASK, "no control token of the tokenizer follows an answer"),
        (
            LOOP + ASK + "{{ ''.__class__.__mro__ }}",
            "SecurityError: access to attribute '__class__' of 'str' object is unsafe",
        ),
        ("{% set n = namespace(_x=1) %}", "SecurityError: a namespace cannot hold '_x'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "SecurityError: a namespace cannot hold '_x'"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('never') }}", "TemplateError: never"),
        (LOOP + ASK + "\n{% if %}", "line 2: Expected an expression"),
        (LOOP + ASK + "\n\n{% generation %}", "line 3"),
    ],
)
def test_a_jinja_template_that_cannot_be_learned_with_is_refused(tmp_path, source, message):
    with pytest.raises(ConfigError, match=r"prepare\.template: .*own\.jinja'") as error:
        inline(tmp_path, source)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "conversation", "message"),
    [
        (LOOP.replace("m.content", "m.content | replace('x', 'y')") + ASK, talk("a", "xx"), "'xx' of an answer"),
        (
            LOOP + ASK.replace("assistant", "{{ 'model' if messages[0].content == 'a' else 'assistant' }}"),
            talk("a", "b"),
            "is not what",
        ),
        (
            LOOP.replace("'</s>'", "('' if m.content == 'b' else '</s>')") + ASK,
            talk("a", "b"),
            "no control token ends answer 2",
        ),
        (LOOP + ASK + "{{ ''.__class__.__mro__ if messages[0].content == 'a' }}", talk("a", "b"), "SecurityError"),
        (
            LOOP.replace("m.content", "m.content.split('</s>')[-1]") + ASK,
            talk("no</s>yes", "b"),
            "the record spells '</s>'",
        ),
    ],
)
def test_a_record_whose_answers_cannot_be_found_is_dropped(tmp_path, source, conversation, message):
    drop = inline(tmp_path, source).render(conversation, "</s>")
    assert isinstance(drop, Drop)
    assert drop.reason == "template_mismatch"
    assert message in drop.detail


def test_what_transformers_gives_templates_is_there(tmp_path):
    source = (
        "{% set n = namespace(x=dict.fromkeys('k', 2)) %}{% set n.y = '<é>' %}\n"
        "{{ (dict(a=1), n.x) | tojson(indent=1) + (n.y | tojson) + strftime_now('%Y')[:2] }}\n"
        "    {% for m in messages %}\n{% if m.role == 'skipped' %}{% continue %}{% endif %}\n"
        "{{- '<s>' + m.role + ':' }}{% generation %}{{ m.content + m.thinking | default('') + '</s>' }}{% endgeneration %}\n"
        "    {% endfor %}\n" + ASK + "\n"
    )
    turns = (Turn("user", "a"), Turn("assistant", "b", True, {"reasoning_content": "why"}))
    template = inline(tmp_path, source)
    [spans] = template.render(Conversation(turns, "f:1"), "</s>")
    assert joined(spans) == inference(template, turns, LLAMA2)
    assert learned(spans) == ["bwhy", "</s>"]


def test_turns_after_the_last_answer_are_context():
    documents = check_documents(file("chatml"), talk("a", "b", "c"), *JINJA["chatml"])
    assert [learned(spans) for spans in documents] == [["b", "<|im_end|>"]]


def test_the_end_is_that_of_the_turn_and_not_of_the_conversation(tmp_path):
    tokenizer = replace(LLAMA2, control_tokens=LLAMA2.control_tokens | {"<end>", "<over>"})
    source = LOOP.replace("'</s>'", "'<end><over>'") + "{% if not add_generation_prompt %}</s>{% endif %}" + ASK
    template = inline(tmp_path, source, tokenizer)
    assert template.end_token("</s>") == "<over>"
    [spans] = template.render(talk("a", "b"), "</s>")
    assert learned(spans) == ["b", "<end>", "<over>"]
    assert spans[-1] == Span("</s>", False, True)


def test_a_jinja_template_for_one_question(tmp_path):
    template = inline(
        tmp_path, LOOP + ASK + "{% if messages | length > 2 %}{{ raise_exception('one only') }}{% endif %}"
    )
    assert template.end_token("</s>") == "</s>"
    assert [learned(spans) for spans in template.render(talk("a", "b"), "</s>")] == [["b", "</s>"]]
    assert "one only" in template.render(talk("a", "b", "c", "d"), "</s>").detail


def test_a_prompt_that_is_refused_is_an_error():
    with pytest.raises(DataError, match="System role not supported"):
        file("gemma").render_prompt((Turn("system", "s"), Turn("user", "a")), "<eos>")


def test_the_tokenizers_own_template_and_a_file_are_the_same():
    source = (FOLDER / "chatml.jinja").read_text()
    own = template_from("tokenizer", replace(CHATML, chat_template=source))
    assert own.render(talk("a", "b"), "x") == file("chatml").render(talk("a", "b"), "x")
    assert own.chat_template(has_bos=True) == source
    assert own.words() == ""
    assert template_from("tokenizer").words() == ""  # only the name is checked


def test_the_fingerprint_is_of_what_decides_the_rendering(tmp_path):
    source = (FOLDER / "chatml.jinja").read_text()
    same = [
        inline(tmp_path, source, CHATML),
        file("chatml"),
        template_from("tokenizer", replace(CHATML, chat_template=source)),
    ]
    others = [
        inline(tmp_path, source + "{# x #}", CHATML),
        inline(tmp_path, source, replace(CHATML, control_tokens=CHATML.control_tokens | {"<x>"})),
        template_from(str(tmp_path / "own.jinja")),
        *(template_from(name) for name in PRESETS),
        template_from("llama2", texts("<bos>", "</s>")),
    ]
    assert len({template.fingerprint for template in same}) == 1
    assert len({template.fingerprint for template in [same[0], *others]}) == 1 + len(others)
    assert all(len(template.fingerprint) == 32 for template in others)


@pytest.mark.parametrize(
    ("name", "words"),
    [("chat", "### User:\n\n\n### Assistant:\n"), ("chatml", "user\n\nassistant\n"), ("llama2", "[INST]  [/INST]")],
)
def test_words_have_no_control_tokens(name, words):
    assert template_from(name).words() == words


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "x.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"x\.jinja': cannot be read \(.*utf-8.*\); name a Jinja file in UTF-8"):
        template_from(str(tmp_path / "x.jinja"))
