import json
import random
from collections import Counter

import numpy as np
import pytest

from sft_dist.data.build import prepare, read_conversations
from sft_dist.data.merge import Funnel
from sft_dist.data.shards import Shards
from sft_dist.data.tokenise import Tokenizer, train_sentencepiece
from sft_dist.errors import DataError
from sft_dist.schema import CurateConfig, PrepareConfig, SelectConfig, SentencePieceTraining, SourceConfig

WORDS = [f"{a}{b}" for a in ("al", "be", "cor", "du", "el", "fi") for b in ("ta", "no", "mi", "ra", "su", "ke")]


def sentence(number, count=8):
    return " ".join(random.Random(number).choices(WORDS, k=count))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [sentence(number) for number in range(150)]
    train_sentencepiece(texts, SentencePieceTraining(vocab_size=350)).save(
        folder, chat_template=None, model_max_length=64
    )
    return folder


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr("sft_dist.data.build.SLICE_BYTES", 300)


def source(path, records):
    path.write_text(
        "".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in records)
    )
    return SourceConfig(path=str(path), schema="prompt_response")


class Made:
    """A preparation of a.jsonl: its funnel, and what was dropped, by line."""

    def __init__(self, folder, tokenizer, records, curate=None, validation=(), **more):
        sources = [source(folder / "a.jsonl", records)]
        held_out = [source(folder / "held.jsonl", validation)] if validation else []
        self.out = folder / "out"
        values = {"sources": sources, "validation_sources": held_out, "tokenizer": str(tokenizer), "seq_len": 64}
        values |= {"curate": CurateConfig(**{"near_validation": None, **(curate or {})}), "out": str(self.out)}
        self.config = PrepareConfig(**values | more)
        self.funnel = Funnel(**prepare(self.config).funnel)
        rejects = [json.loads(line) for line in (self.out / "rejects.jsonl").read_text().splitlines()]
        assert self.funnel.is_exact
        assert Counter(reject["reason"] for reject in rejects) == self.funnel.drops
        self.rejects = {
            int(each["where"].removeprefix(f"{folder}/a.jsonl:")): (
                each["reason"],
                each["detail"].replace(f"{folder}/", ""),
            )
            for each in rejects
        }
        self.tokenizer = Tokenizer.load(str(self.out / "tokenizer"))

    def texts(self, split="train"):
        """Text of every document of a split, sorted."""
        batch = (shards := Shards.open(self.out / split, verify=True)).rows(np.arange(shards.num_rows))
        return sorted(
            self.tokenizer.decode(tokens[documents == number].tolist())
            for tokens, documents in zip(batch.tokens, batch.documents, strict=True)
            for number in range(documents.max() + 1)
        )


@pytest.fixture
def make(tmp_path, tokenizer_folder):
    return lambda *args, **more: Made(tmp_path, tokenizer_folder, *args, **more)


def test_of_exact_repeats_in_any_slice_the_first_stays_and_is_named(make):
    records = [(sentence(n % 12), f"yes {n % 12 // 5}") for n in range(40)]
    records[30] = (records[3][0].replace(" ", "\n\t"), f" {records[3][1]}  ")
    made = make(records, {})
    first = {}
    for line, record in enumerate(records, 1):
        first.setdefault(tuple(" ".join(text.split()) for text in record), line)
    assert made.funnel == Funnel(40, 12, 0, {"duplicate": 28}, {"outer_white_space": 1})
    assert made.rejects == {
        line: ("duplicate", f"the same as a.jsonl:{first[tuple(' '.join(text.split()) for text in record)]}")
        for line, record in enumerate(records, 1)
        if line > 12
    }
    assert made.texts() == sorted(f"{prompt}\n{response}" for prompt, response in records[:12])


def test_repeats_may_stay(make):
    assert make([(sentence(1), "yes")] * 20, {"duplicates": False}).funnel == Funnel(20, 20, 0, {})


@pytest.mark.parametrize(("policy", "kept"), [("first", 1), ("longest", 17), ("last", 33), ("keep", None)])
def test_of_one_prompts_answers_one_stays_by_the_policy(make, policy, kept):
    records = [(sentence(n), f"yes {n}") for n in range(40)]
    for line, answer in ((1, "no"), (17, "no, never, not at all"), (33, "no way")):
        records[line - 1] = (sentence(99), answer)
    made = make(records, {"same_prompt": policy})
    lines = {1, 17, 33} - {kept} if kept else set()
    assert made.rejects == dict.fromkeys(
        lines, ("same_prompt", f"another answer to this prompt is kept: a.jsonl:{kept}")
    )
    assert made.funnel == Funnel(40, 40 - len(lines), 0, {"same_prompt": len(lines)} if lines else {})


@pytest.mark.parametrize("policy", ["keep", "last"])
def test_a_prompt_of_the_validation_files_is_not_trained_on(make, policy):
    records = [(sentence(n), f"yes {n}") for n in range(20)]
    validation = [(sentence(3), "other"), records[8], (sentence(50), "no"), (sentence(50), "yes")]
    made = make(records, {"same_prompt": policy}, validation)
    assert made.rejects == {
        4: ("in_validation", "its prompt is the one of the validation record held.jsonl:1"),
        9: ("duplicate", "the same as held.jsonl:2"),
    }
    assert made.funnel == Funnel(24, 18, 4, {"in_validation": 1, "duplicate": 1})
    assert len(made.texts("validation")) == 4


def near(number, changed=1):
    """A sentence of 40 words, with the last ones changed."""
    return sentence(number, 40).rsplit(" ", changed)[0] + " otherwise" * changed


def test_a_prompt_near_to_a_validation_one_is_not_trained_on(make):
    records = [(sentence(n, 40), f"yes {n}") for n in range(10)]
    records[4] = (near(30).upper() + "!", "yes")
    records[7] = (near(31, 25), "yes")
    validation = [(sentence(30 + n, 40), "no") for n in range(2)]
    made = make(records, {"near_validation": 0.8}, validation, seq_len=512)
    assert made.rejects == {5: ("near_validation", "its prompt is nearly that of the validation record held.jsonl:1")}
    assert made.funnel == Funnel(12, 9, 2, {"near_validation": 1})


def test_of_near_repeats_the_first_stays_and_is_named(make):
    records = [(sentence(n, 40), f"yes {n}") for n in range(12)]
    records[5] = (near(2), "yes 2")
    records[9] = (near(2, 2), "yes 2")
    records[11] = (near(7), "yes 7")
    made = make(records, {"near_duplicates": 0.6}, seq_len=512)
    assert made.rejects == {
        line: ("near_duplicate", f"nearly the same as a.jsonl:{first}") for line, first in ((6, 3), (10, 3), (12, 8))
    }


def test_what_holds_an_evaluation_text_is_not_trained_on(make, tmp_path):
    records = [(sentence(n, 20), f"yes {n}") for n in range(10)]
    records[2] = (f"once {sentence(70, 20).upper()}", "yes")
    records[6] = ("say it", f"{sentence(71, 13)}, twice")
    records[8] = (" ".join(sentence(70, 20).split()[:12]), "yes")  # one word too few
    evaluation = [("short", "no"), (sentence(70, 20), "a"), ("b", sentence(71, 13))]
    files = [source(tmp_path / "eval.jsonl", evaluation), source(tmp_path / "more.jsonl", [(sentence(72), "c")])]
    files[1] = files[1].model_copy(update={"schema_": None})  # found from its records
    made = make(records, {"decontaminate": files}, seq_len=512)
    assert made.rejects == {
        3: ("contaminated", "shares a run of words with eval.jsonl:2"),
        7: ("contaminated", "shares a run of words with eval.jsonl:3"),
    }
    assert made.funnel == Funnel(10, 8, 0, {"contaminated": 2})


def test_general_text_is_a_split_of_its_own_and_what_holds_it_is_not_trained_on(make, tmp_path):
    articles = [sentence(80, 70), sentence(81, 15), " "]  # the first is longer than a row
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in articles))
    (tmp_path / "more.txt").write_text(sentence(82, 12) + "\n")
    records = [(sentence(n, 20), f"yes {n}") for n in range(6)]
    records[1] = ("say it", "and " + " ".join(articles[0].split()[40:54]).upper())
    records[4] = (f"once {sentence(82, 12)}", "yes")
    general = [
        SourceConfig(path=str(tmp_path / "wiki.jsonl"), text="body"),
        SourceConfig(path=str(tmp_path / "more.txt")),
    ]
    made = make(records, general=general, seq_len=64)
    assert made.rejects == {
        2: ("contaminated", "shares a run of words with wiki.jsonl:1"),
        5: ("contaminated", "shares a run of words with more.txt:1"),
    }
    assert not {*articles[:2], sentence(82, 12)} & {*made.texts("train")}
    shards = Shards.open(made.out / "general", verify=True)
    about = json.loads((made.out / "prepare.json").read_text())["splits"]["general"]
    assert about["rows"] == shards.num_rows > 1
    assert about["documents"] > 3
    whole = [*made.tokenizer.encode(articles[0]), made.tokenizer.eos_id]
    targets = len(whole) - 1 + sum(len(made.tokenizer.encode(text)) for text in (articles[1], sentence(82, 12)))
    assert about["targets"] == targets + (0 if not made.tokenizer.bos_ids else 3)
    parts = [text for text in made.texts("general") if text in articles[0]]
    assert len(parts) == about["documents"] - 2
    assert max(map(len, made.texts("general"))) < len(articles[0])


@pytest.mark.parametrize("long_documents", ["drop", "error"])
def test_general_text_is_whole_whatever_becomes_of_long_documents(make, tmp_path, long_documents):
    (tmp_path / "more.txt").write_text(sentence(82, 100) + "\n")
    general = [SourceConfig(path=str(tmp_path / "more.txt"))]
    records = [(sentence(n), f"yes {n}") for n in range(3)]
    made = make(records, general=general, seq_len=64, long_documents=long_documents)
    assert made.funnel == Funnel(3, 3, 0, {})
    assert Shards.open(made.out / "general").manifest.documents > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "prepare.general: .*general.jsonl: it holds no records"),
        ('{"text": 1}\n', "prepare.general: .*general.jsonl: .*general.jsonl:1 is no text"),
        ('{"text": " "}\n', "prepare.general: there is no text in it; name files with text, or leave it out"),
    ],
)
def test_general_text_that_cannot_be_read_is_refused(make, tmp_path, content, message):
    (tmp_path / "general.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        make([(sentence(0), "yes")], general=[SourceConfig(path=str(tmp_path / "general.jsonl"))])


def test_a_change_of_the_general_text_is_noticed_as_any_other(make, tmp_path):
    path, records = tmp_path / "general.txt", [(sentence(n), f"yes {n}") for n in range(3)]
    path.write_text(sentence(82, 30))
    made = make(records, general=[SourceConfig(path=str(path))])
    again = made.config
    assert prepare(again).was_already_prepared
    with pytest.raises(DataError, match=r"was prepared otherwise \(prepare\.general: \[.*→ \[\]; the bytes of"):
        prepare(again.model_copy(update={"general": []}))
    path.write_text(sentence(83, 30))
    with pytest.raises(DataError, match=r"was prepared otherwise \(the bytes of .*general\.txt\)"):
        prepare(again)


def test_what_was_prepared_before_there_was_general_text_is_still_good(make, tmp_path):
    made = make([(sentence(n), f"yes {n}") for n in range(3)])
    path = made.out / "prepare.json"
    about = json.loads(path.read_text())
    del about["settings"]["prepare"]["general"]
    path.write_text(json.dumps(about))
    assert prepare(made.config).was_already_prepared
    (tmp_path / "general.txt").write_text(sentence(82, 30))
    general = [SourceConfig(path=str(tmp_path / "general.txt"))]
    with pytest.raises(DataError, match=r"was prepared otherwise \(prepare\.general: \[\] → "):
        prepare(made.config.model_copy(update={"general": general}))


def test_a_selection_keeps_so_many_and_tells_of_the_others(make):
    records = [(sentence(n), "Yes, and that is " + sentence(n + 100, n + 1) + ".") for n in range(30)]
    made = make(records, {"select": SelectConfig(count=7, quality=1.0)}, seq_len=512)
    assert made.funnel == Funnel(30, 7, 0, {"not_selected": 23})
    assert set(made.rejects.values()) == {("not_selected", "the selection took others")}
    assert np.mean([line not in made.rejects for line in range(16, 31)]) > 0.4  # the longer ones say more


def test_validation_survives_every_rule_of_training(make, tmp_path):
    held_out = [(sentence(0, 20), "yes"), (near(0), "yes"), (sentence(0, 20), "no")]
    curate = {
        "same_prompt": "first", "near_duplicates": 0.5, "near_validation": 0.5, "select": SelectConfig(count=1),
        "decontaminate": [source(tmp_path / "eval.jsonl", held_out)],
    }  # fmt: skip
    made = make([(sentence(n), f"yes {n}") for n in range(1, 9)], curate, held_out, seq_len=512)
    assert (made.funnel.train, made.funnel.validation) == (1, 3)
    assert [record.where.rsplit(":")[-1] for record in read_conversations(made.out / "validation.jsonl")] == [
        "1",
        "2",
        "3",
    ]


def test_reasons_are_told_together_and_the_sum_is_exact(make):
    records = [(sentence(n, 40), f"yes {n}") for n in range(20)]
    records += [records[0], (near(1), "yes 1"), (sentence(2, 40), "no"), (" ", "x"), ("x", "ﬁn e\u0301")]
    made = make(records, {"near_duplicates": 0.8, "same_prompt": "first"}, validation_fraction=0.3, seq_len=512)
    reasons = {line: reason for line, (reason, _) in made.rejects.items()}
    assert reasons[21] == "duplicate"
    assert reasons[24] == "empty_prompt"
    assert made.funnel.read == 25
    assert made.funnel.validation > 0
    assert made.funnel.mended == {"outer_white_space": 1, "unicode": 1}


def test_token_files_beside_texts_that_are_compared(tmp_path, tokenizer_folder):
    ids = np.array([5, 6, 7, 1] * 3 + [9, 8, 1, 1, 4, 5, 1], np.uint16)
    ids.tofile(tmp_path / "a.bin")
    tokens = SourceConfig(path=str(tmp_path / "a.bin"), schema="tokens", format="nanogpt")
    texts = source(tmp_path / "a.jsonl", [(sentence(n), f"yes {n}") for n in range(9)])
    config = PrepareConfig(
        sources=[tokens, texts], tokenizer=str(tokenizer_folder), seq_len=64, out=str(tmp_path / "out"),
        curate=CurateConfig(near_duplicates=0.8), validation_fraction=0.3,
    )  # fmt: skip
    funnel = Funnel(**prepare(config).funnel)
    assert (funnel.is_exact, funnel.read, funnel.drops) == (True, 15, {"duplicate": 2, "no_targets": 1})
