import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sft_dist.data.build import Task, prepare, read_conversations
from sft_dist.data.merge import Funnel
from sft_dist.data.records import Conversation, Turn
from sft_dist.data.shards import Shards
from sft_dist.data.tokenise import Tokenizer, train_sentencepiece
from sft_dist.errors import ConfigError, DataError
from sft_dist.files import hold
from sft_dist.schema import CurateConfig, PrepareConfig, SentencePieceTraining, SourceConfig, TrainedTokenizer

TRAINING = SentencePieceTraining(vocab_size=350)
ALL = CurateConfig(near_validation=None)  # the sentences below are much alike, on purpose
WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf")
SPAM = "Spam or ham?\n{text}\nAnswer:"


def sentence(number):
    return f"message {number} about {WORDS[number % 7]} and {WORDS[number // 7 % 7]}, from {WORDS[number // 49 % 7]}"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [sentence(number) for number in range(200)] + ["Spam or ham?\n\nAnswer: spam ham"] * 20
    train_sentencepiece(texts, TRAINING).save(folder, chat_template=None, model_max_length=64)
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs(path, numbers, answer="yes, {}"):
    return write_lines(path, ({"prompt": sentence(n), "response": answer.format(n)} for n in numbers))


def labelled(path, records):
    path.write_text("".join(f"{label}\t{text}\n" for label, text in records))
    return path


def config_of(path, out, tokenizer, schema="prompt_response", **more):
    source = {"path": str(path), "schema": schema}
    named = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    values = {"sources": [SourceConfig(**source)], "tokenizer": named, "seq_len": 64, "out": str(out), "curate": ALL}
    return PrepareConfig(**{**values, **more})


def label_config(path, out, tokenizer, **more):
    source = SourceConfig(path=str(path), schema="label", delimiter="\t", text=1, label=0)
    return config_of(path, out, tokenizer, sources=[source], template=SPAM, **more)


def entries(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(shards, tokenizer):
    """Text of every document of a split, in order, the end token left out."""
    batch = shards.rows(np.arange(shards.num_rows))
    texts = []
    for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
        for number in range(documents.max() + 1):
            texts.append(tokenizer.decode(tokens[documents == number].tolist()))
    return texts


def funnel_of(report):
    return {key: report.funnel[key] for key in ("read", "train", "validation", "drops")}


def test_every_record_is_accounted_for(tmp_path, tokenizer_folder):
    good = [{"prompt": sentence(n), "response": f"yes, {n}"} for n in range(40)]
    bad = [
        good[0],
        {"prompt": f"{sentence(1)} ", "response": "yes,  1"},  # the same but for white space
        {"prompt": "no answer", "response": " "},
        {"prompt": "no response at all"},
        {"prompt": " ".join(map(sentence, range(40))), "response": "long"},
    ]
    path = write_lines(tmp_path / "a.jsonl", [*good, *bad])
    with path.open("a") as file:
        file.write("{broken\n")
    more = {"validation_fraction": 0.25, "max_reject_fraction": 0.1, "long_documents": "drop"}
    config = config_of(path, tmp_path / "out", tokenizer_folder, **more)
    report = prepare(config)
    funnel = Funnel(**report.funnel)
    assert funnel.is_exact
    assert funnel.read == 46
    assert funnel.train + funnel.validation == 40
    assert funnel.validation > 0
    assert funnel.drops == {"duplicate": 2, "empty_response": 1, "missing_key": 1, "too_long": 1, "invalid_json": 1}
    assert funnel.long == {}
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert Counter(reject["reason"] for reject in rejects) == funnel.drops
    assert {reject["where"] for reject in rejects} == {f"{path}:{number}" for number in range(41, 47)}
    assert all(reject["detail"] for reject in rejects)


@pytest.mark.parametrize(
    ("funnel", "is_exact"), [(Funnel(5, 2, 1, {"x": 1, "y": 1}), True), (Funnel(5, 2, 1, {"x": 1}), False)]
)
def test_a_funnel_knows_whether_it_is_exact(funnel, is_exact):
    assert funnel.is_exact == is_exact


def test_the_folder_holds_everything_and_nothing_is_left_beside_it(tmp_path, tokenizer_folder):
    config = config_of(
        pairs(tmp_path / "a.jsonl", range(60)), tmp_path / "out", tokenizer_folder, validation_fraction=0.3
    )
    report = prepare(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"train", "validation", "tokenizer", "validation.jsonl", "rejects.jsonl", "prepare.json"}
    tokenizer = Tokenizer.load(str(tmp_path / "out" / "tokenizer"))
    assert tokenizer.fingerprint == Tokenizer.load(str(tokenizer_folder)).fingerprint
    texts = set()
    for name in ("train", "validation"):
        shards = Shards.open(tmp_path / "out" / name, verify=True)
        assert shards.manifest.tokenizer == tokenizer.fingerprint
        assert shards.num_rows == report.splits[name]["rows"]
        assert shards.manifest.documents == report.funnel[name] == report.splits[name]["documents"]
        texts |= set(decoded(shards, tokenizer))
    assert texts == {f"{sentence(n)}\nyes, {n}" for n in range(60)}


def test_a_preparation_that_fails_leaves_no_folder_and_its_remains_are_swept(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", range(5), answer=" ")
    config = config_of(path, tmp_path / "out", tokenizer_folder)
    with pytest.raises(
        DataError, match=r"no record is left to train on \(5 empty_response\); see .*rejects\.jsonl$"
    ) as e:
        prepare(config)
    rejects = tmp_path / ".out.partial" / "out" / "rejects.jsonl"
    assert str(rejects) in str(e.value)
    assert len(rejects.read_text().splitlines()) == 5
    assert not (tmp_path / "out").exists()
    pairs(path, range(5))
    assert prepare(config).funnel["train"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_the_same_sources_and_settings_are_already_prepared(tmp_path, tokenizer_folder):
    config = config_of(pairs(tmp_path / "a.jsonl", range(20)), tmp_path / "out", tokenizer_folder)
    first = prepare(config)
    before = content(tmp_path / "out")
    again = prepare(config)
    assert not first.was_already_prepared
    assert again == replace(first, was_already_prepared=True)
    assert content(tmp_path / "out") == before


def test_the_same_preparation_elsewhere_is_the_same_bytes(tmp_path):
    path = pairs(tmp_path / "a.jsonl", range(200))
    trained = TrainedTokenizer(sentencepiece=TRAINING)
    for name in ("one", "two"):
        prepare(config_of(path, tmp_path / name, trained, validation_fraction=0.2))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_what_was_prepared_otherwise_is_refused_and_named(tmp_path, tokenizer_folder):
    tokenizer = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    pairs(tmp_path / "data" / "a.jsonl", range(20))
    b = pairs(tmp_path / "data" / "b.jsonl", range(20, 40))
    config = config_of(tmp_path / "data", tmp_path / "out", tokenizer)
    prepare(config)
    before = content(tmp_path / "out")

    def refused(config, message):
        with pytest.raises(
            DataError, match=rf"out: was prepared otherwise \({message}\)\. .*prepare anew with --fresh"
        ):
            prepare(config)

    refused(config.model_copy(update={"seq_len": 32}), r"prepare\.seq_len: 64 → 32")
    refused(
        config.model_copy(update={"seed": 1, "curate": CurateConfig(duplicates=False)}),
        r"prepare\.curate\.duplicates: True → False; prepare\.curate\.near_validation: None → 0\.8; prepare\.seed: 0 → 1",
    )
    with b.open("a") as file:
        file.write("\n")
    refused(config, rf"the bytes of {b}")
    b.unlink()
    refused(config, rf"the bytes of {b}")
    pairs(b, range(20, 40))
    assert prepare(config).was_already_prepared
    other = train_sentencepiece([sentence(n).upper() for n in range(200)], TRAINING)
    other.save(tokenizer, chat_template=None, model_max_length=64)
    refused(config, "what the tokenizer makes of text")
    assert content(tmp_path / "out") == before


def test_another_model_with_another_tokenizer_of_its_own_is_another_preparation(tmp_path, tokenizer_folder):
    other = tmp_path / "other"
    train_sentencepiece([sentence(n).upper() for n in range(200)], TRAINING).save(
        other, chat_template=None, model_max_length=64
    )
    config = config_of(pairs(tmp_path / "a.jsonl", range(9)), tmp_path / "out", None)
    prepare(config, default_tokenizer=str(tokenizer_folder))
    assert prepare(config, default_tokenizer=str(tokenizer_folder)).was_already_prepared
    with pytest.raises(DataError, match="what the tokenizer makes of text"):
        prepare(config, default_tokenizer=str(other))


@pytest.mark.parametrize("about", [None, "{cut", "{}", "[]"], ids=["missing", "cut", "empty", "list"])
def test_a_folder_that_is_no_preparation_is_refused(tmp_path, tokenizer_folder, about):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    if about is not None:
        (out / "prepare.json").write_text(about)
    with pytest.raises(
        DataError, match="out: exists and is not a finished preparation; move it away, or choose another"
    ):
        prepare(config_of(pairs(tmp_path / "a.jsonl", range(9)), out, tokenizer_folder))
    assert (out / "thesis.txt").read_text() == "years of work"


def test_fresh_sets_the_old_folder_aside(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", range(20))
    config = config_of(path, tmp_path / "out", tokenizer_folder)
    prepare(config)
    first = content(tmp_path / "out")
    pairs(path, range(30))
    assert prepare(config, fresh=True).funnel["train"] == 30
    assert content(tmp_path / "out.old-1") == first
    second = content(tmp_path / "out")
    prepare(config, fresh=True)
    assert content(tmp_path / "out.old-1") == first
    assert content(tmp_path / "out.old-2") == second


def test_a_fresh_preparation_that_fails_keeps_the_old_folder(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", range(20))
    config = config_of(path, tmp_path / "out", tokenizer_folder)
    prepare(config)
    first = content(tmp_path / "out")
    path.write_text("{broken\n")
    with pytest.raises(DataError, match="cannot be read"):
        prepare(config, fresh=True)
    assert content(tmp_path / "out") == first
    assert not (tmp_path / "out.old-1").exists()
    pairs(path, range(20))
    assert prepare(config).was_already_prepared


def test_too_many_unreadable_records_stop_it_with_the_first_ones_told(tmp_path, tokenizer_folder):
    records = [{"prompt": sentence(n), "response": "yes"} for n in range(16)]
    path = write_lines(tmp_path / "a.jsonl", [*records, {"prompt": "x"}, 7, {"prompt": 1, "response": "y"}, {}])
    config = config_of(path, tmp_path / "out", tokenizer_folder, max_reject_fraction=0.15)
    with pytest.raises(
        DataError, match=r"4 of 20 records cannot be read, more than max_reject_fraction 0\.15 allows"
    ) as e:
        prepare(config)
    assert f"{path}:17: missing_key: no 'response'" in str(e.value)
    assert f"{path}:18: wrong_type" in str(e.value)
    assert "mend them, name another schema, or raise the limit" in str(e.value)
    assert len((tmp_path / ".out.partial" / "out" / "rejects.jsonl").read_text().splitlines()) == 4
    assert prepare(config.model_copy(update={"max_reject_fraction": 0.2})).funnel["train"] == 16


def test_records_that_are_read_and_left_out_are_not_unreadable(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "the same", "response": "yes"}] * 50)
    config = config_of(path, tmp_path / "out", tokenizer_folder, max_reject_fraction=0.0)
    report = prepare(config)
    assert report.funnel["drops"] == {"duplicate": 49}
    kept = config.model_copy(update={"curate": CurateConfig(duplicates=False), "out": str(tmp_path / "all")})
    assert prepare(kept).funnel["train"] == 50


def test_when_every_document_is_too_long_nothing_is_left(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", range(5), answer="yes, {}" + " and on and on" * 20)
    with pytest.raises(DataError, match=r"no record is left to train on \(5 too_long\); see .*rejects\.jsonl"):
        prepare(config_of(path, tmp_path / "out", tokenizer_folder, seq_len=16, long_documents="drop"))
    rejects = (tmp_path / ".out.partial" / "out" / "rejects.jsonl").read_text().splitlines()
    assert len(rejects) == 5
    assert "tokens, a row has 16" in rejects[0]


def test_a_long_conversation_may_be_an_error(tmp_path, tokenizer_folder):
    records = [{"prompt": "hi", "response": "yes"}, {"prompt": sentence(1) * 20, "response": "no"}]
    path = write_lines(tmp_path / "a.jsonl", records)
    config = config_of(path, tmp_path / "out", tokenizer_folder)
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: \d+ tokens, a row has 64; raise prepare\.seq_len, or choose another long_doc"
    ):
        prepare(config.model_copy(update={"long_documents": "error"}))
    assert prepare(config.model_copy(update={"long_documents": "drop"})).funnel["drops"] == {"too_long": 1}


def test_long_text_is_split_and_loses_no_target(tmp_path, tokenizer_folder):
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    texts = [" ".join(map(sentence, range(at, at + length))) for at, length in ((0, 1), (30, 40), (90, 9))]
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n")
    report = prepare(config_of(tmp_path / "a.txt", tmp_path / "out", tokenizer_folder, schema="text"))
    assert funnel_of(report) == {"read": 3, "train": 3, "validation": 0, "drops": {}}
    assert report.splits["train"]["documents"] > 3
    assert report.splits["train"]["targets"] == sum(
        len(tokenizer.encode(text)) for text in texts
    )  # the end, not the first
    assert "validation" not in report.splits
    assert (tmp_path / "out" / "validation.jsonl").read_text() == ""


def test_a_conversation_without_a_place_in_the_template_is_dropped(tmp_path, tokenizer_folder):
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": turn}, {"messages": turn * 2}])
    report = prepare(config_of(path, tmp_path / "out", tokenizer_folder, schema="messages"))
    assert funnel_of(report) == {"read": 2, "train": 1, "validation": 0, "drops": {"template_mismatch": 1}}
    chat = config_of(path, tmp_path / "chat", tokenizer_folder, schema="messages", template="chat", seq_len=256)
    assert prepare(chat).funnel["train"] == 2


def test_the_labels_split_pairs_every_validation_prompt_with_every_label(tmp_path, tokenizer_folder):
    records = [(("ham", "spam", "ham", "offer")[n % 4], sentence(n)) for n in range(120)]
    path = labelled(tmp_path / "sms", records)
    config = label_config(path, tmp_path / "out", tokenizer_folder, validation_fraction=0.3, seq_len=128)
    report = prepare(config)
    out = tmp_path / "out"
    about = json.loads((out / "labels" / "labels.json").read_text())
    held_out = list(read_conversations(out / "validation.jsonl"))
    tokenizer, shards = Tokenizer.load(str(out / "tokenizer")), Shards.open(out / "labels", verify=True)

    assert about["labels"] == ["ham", "offer", "spam"]
    assert len(held_out) == report.funnel["validation"] > 10
    assert [about["labels"][place] for place in about["truth"]] == [record.label for record in held_out]
    assert sorted(map(tuple, about["candidates"])) == [(n, label) for n in range(len(held_out)) for label in range(3)]
    wanted = [
        f"Spam or ham?\n{held_out[number].turns[0].content}\nAnswer: {about['labels'][place]}"
        for number, place in about["candidates"]
    ]
    assert decoded(shards, tokenizer) == wanted
    assert shards.manifest.documents == 3 * len(held_out)

    counts = Counter(label for label, _ in records)
    counts.subtract(record.label for record in held_out)
    assert about["positive"] == min(("ham", "offer", "spam"), key=lambda label: (counts[label], label))
    assert {record.label for record in held_out} == {"ham", "offer", "spam"}


def test_one_label_alone_is_no_label_task(tmp_path, tokenizer_folder):
    path = labelled(tmp_path / "sms", [("ham", sentence(n)) for n in range(40)])
    prepare(label_config(path, tmp_path / "out", tokenizer_folder, validation_fraction=0.3))
    assert not (tmp_path / "out" / "labels").exists()


@pytest.mark.parametrize("labels", [("ham", "spam"), ("ham",)], ids=["two labels", "one label"])
def test_a_label_that_only_validation_has_is_refused(tmp_path, tokenizer_folder, labels):
    train = labelled(tmp_path / "train.tsv", [(labels[n % len(labels)], sentence(n)) for n in range(20)])
    held_out = labelled(tmp_path / "held.tsv", [("ham", sentence(50)), ("spma", sentence(51))])
    config = label_config(train, tmp_path / "out", tokenizer_folder)
    source = config.sources[0].model_copy(update={"path": str(held_out)})
    with pytest.raises(
        DataError, match="label 'spma' is in the validation records only; correct it, or add training rec"
    ):
        prepare(config.model_copy(update={"validation_sources": [source]}))
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_does_not_fit_with_another_label_is_not_scored_and_counted(tmp_path, tokenizer_folder):
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    long = " ".join(map(sentence, range(6)))
    seq_len = len(tokenizer.encode(SPAM.format(text=long) + " ham")) + 1
    train = labelled(tmp_path / "train.tsv", [(("ham", "unsolicited message")[n % 2], sentence(n)) for n in range(20)])
    held_out = labelled(tmp_path / "held.tsv", [("ham", long), ("ham", sentence(50))])
    config = label_config(train, tmp_path / "out", tokenizer_folder, seq_len=seq_len)
    source = config.sources[0].model_copy(update={"path": str(held_out)})
    config = config.model_copy(update={"validation_sources": [source]})
    report = prepare(config)
    assert report.funnel["validation"] == 2
    assert report.funnel["long"] == {"unscored_labels": 1}
    assert "1 validation records are not scored by label" in report.describe()
    about = json.loads((tmp_path / "out" / "labels" / "labels.json").read_text())
    assert (about["truth"], sorted(about["candidates"])) == ([0], [[0, 0], [0, 1]])
    wide = config.model_copy(update={"seq_len": seq_len + 20, "out": str(tmp_path / "wide")})
    assert prepare(wide).funnel["long"] == {}


@pytest.mark.parametrize("duplicates", [True, False])
def test_a_prompt_of_the_validation_files_is_not_trained_on(tmp_path, tokenizer_folder, duplicates):
    held_out = pairs(tmp_path / "held.jsonl", range(5, 15))
    train = pairs(tmp_path / "train.jsonl", range(10), answer="otherwise {}")
    curate = CurateConfig(duplicates=duplicates, near_validation=None)
    config = config_of(train, tmp_path / "out", tokenizer_folder, curate=curate)
    source = SourceConfig(path=str(held_out), schema="prompt_response")
    report = prepare(config.model_copy(update={"validation_sources": [source]}))
    assert funnel_of(report) == {"read": 20, "train": 5, "validation": 10, "drops": {"in_validation": 5}}
    assert [r.where for r in read_conversations(tmp_path / "out" / "validation.jsonl")] == [
        f"{held_out}:{number}" for number in range(1, 11)
    ]
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["where"] for reject in rejects] == [f"{train}:{number}" for number in range(6, 11)]


def test_an_exact_repeat_of_a_validation_record_leaves_training_not_validation(tmp_path, tokenizer_folder):
    held_out, train = pairs(tmp_path / "held.jsonl", range(3)), pairs(tmp_path / "train.jsonl", range(9))
    source = SourceConfig(path=str(held_out), schema="prompt_response")
    report = prepare(config_of(train, tmp_path / "out", tokenizer_folder, validation_sources=[source]))
    assert funnel_of(report) == {"read": 12, "train": 6, "validation": 3, "drops": {"duplicate": 3}}


def test_without_a_tokenizer_it_says_what_to_name(tmp_path, tokenizer_folder):
    config = config_of(pairs(tmp_path / "a.jsonl", range(9)), tmp_path / "out", None)
    with pytest.raises(
        ConfigError, match=r"prepare\.tokenizer: missing, and the model has none of its own; name one, or"
    ):
        prepare(config)
    assert prepare(config, default_tokenizer=str(tokenizer_folder)).funnel["train"] == 9


def test_a_new_tokenizer_for_a_pre_trained_model_is_refused(tmp_path):
    trained = TrainedTokenizer(sentencepiece=TRAINING)
    config = config_of(pairs(tmp_path / "a.jsonl", range(9)), tmp_path / "out", trained)
    with pytest.raises(
        ConfigError, match=r"does not fit the pre-trained gpt2; remove prepare\.tokenizer \(prepare\.tok"
    ):
        prepare(config, default_tokenizer="gpt2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_trained_tokenizer_sees_the_training_split_only(tmp_path):
    held_out = write_lines(tmp_path / "held.jsonl", [{"prompt": "Ω", "response": "Ω"}])
    source = SourceConfig(path=str(held_out), schema="prompt_response")
    path = pairs(tmp_path / "a.jsonl", range(200))
    trained = TrainedTokenizer(sentencepiece=SentencePieceTraining(vocab_size=400))
    config = config_of(path, tmp_path / "out", trained, validation_sources=[source])
    report = prepare(config)
    tokenizer = Tokenizer.load(str(tmp_path / "out" / "tokenizer"))
    assert tokenizer.vocab_size == 400
    assert "Ω" not in tokenizer.inner.get_vocab()
    assert report.funnel["validation"] == 1
    assert decoded(Shards.open(tmp_path / "out" / "validation"), tokenizer) == ["Ω\nΩ"]
    assert prepare(config).was_already_prepared


def test_conversations_are_read_back_as_they_were(tmp_path, tokenizer_folder):
    odd = "line\none\ttab “quoted” 😀 \u2028 separator \x85 next \x0c feed"
    turns = [("system", "be brief"), ("user", odd), ("assistant", "yes"), ("user", "more"), ("assistant", odd)]
    messages = [{"role": role, "content": text, "loss": text != "yes"} for role, text in turns]
    held_out = write_lines(tmp_path / "held.jsonl", [{"messages": messages}])
    train = [[{"role": "user", "content": sentence(n)}, {"role": "assistant", "content": "ok"}] for n in range(9)]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": each} for each in train])
    source = SourceConfig(path=str(held_out), schema="messages")
    config = config_of(path, tmp_path / "out", tokenizer_folder, "messages", template="chat", seq_len=512)
    curate = CurateConfig(control_characters=False)
    prepare(config.model_copy(update={"validation_sources": [source], "curate": curate}))
    wanted = tuple(Turn(role, text, role == "assistant" and text != "yes") for role, text in turns)
    assert list(read_conversations(tmp_path / "out" / "validation.jsonl")) == [Conversation(wanted, f"{held_out}:1")]


def test_the_report_is_for_people(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", [*range(40), 0, 1])
    config = config_of(path, tmp_path / "out", tokenizer_folder, validation_fraction=0.3)
    report = prepare(config)
    first, records, train, validation = report.describe().splitlines()
    assert first == f"{tmp_path / 'out'}: prepared"
    num_train, num_validation = report.funnel["train"], report.funnel["validation"]
    assert records == (
        f"  records: 42 read → {num_train} train, {num_validation} validation; dropped: 2 duplicate "
        f"(see {tmp_path / 'out' / 'rejects.jsonl'})"
    )
    about = report.splits["train"]
    assert train == (
        f"  train: {about['rows']} rows of 64 hold {num_train} samples, {about['tokens']:,} tokens "
        f"(fill {about['fill']:.1%}), {about['targets']:,} of them targets"
    )
    assert validation.startswith("  validation: ")
    assert prepare(config).describe().splitlines()[0].endswith("out: already prepared, nothing changed")


def test_the_report_of_a_clean_set_points_to_no_rejects(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", range(10))
    records = prepare(config_of(path, tmp_path / "out", tokenizer_folder)).describe().splitlines()[1]
    assert records == "  records: 10 read → 10 train, 0 validation; dropped: none"


def test_progress_is_told_while_it_works(tmp_path, tokenizer_folder, small_slices):
    told = []
    path = pairs(tmp_path / "a.jsonl", range(60))
    prepare(config_of(path, tmp_path / "out", tokenizer_folder), progress=lambda *args: told.append(args))
    stages = [args for args in told if args[0] == "slices"]
    assert len(stages) > 3
    assert [args[1] for args in stages] == list(range(1, len(stages) + 1))
    assert all(args[2] == len(stages) for args in stages)
    assert told[-1][:3] == ("write train", 1, 1)
    assert told[-1][3] == sum(args[3] for args in stages)


@pytest.fixture
def small_slices(monkeypatch):
    """Cut these little files into many slices."""
    monkeypatch.setattr("sft_dist.data.build.SLICE_BYTES", 600)


def test_workers_and_tasks_make_the_same_bytes(tmp_path, tokenizer_folder, small_slices):
    path = pairs(tmp_path / "a.jsonl", [*range(80), *range(10)])
    more = {"validation_fraction": 0.2, "rows_per_shard": 3, "curate": CurateConfig(near_duplicates=0.7)}
    one = config_of(path, tmp_path / "one", tokenizer_folder, **more)
    prepare(one)
    prepare(one.model_copy(update={"out": str(tmp_path / "two")}), workers=3)
    tasks = one.model_copy(update={"out": str(tmp_path / "tasks")})
    for index in (2, 0, 1):
        assert prepare(tasks, task=Task(index, 3)) is None
    report = prepare(tasks, only_merge=True)
    assert report.funnel["drops"]["duplicate"] == 10
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "tasks")
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == [
        "a.jsonl",
        "one",
        "tasks",
        "two",
    ]


def test_a_merge_before_all_tasks_are_done_says_what_is_missing(tmp_path, tokenizer_folder, small_slices):
    config = config_of(pairs(tmp_path / "a.jsonl", range(40)), tmp_path / "out", tokenizer_folder)
    prepare(config, task=Task(0, 2))
    with pytest.raises(DataError, match=r"of \d+ slices are not done \(the first is number 1\); run the missing tasks"):
        prepare(config, only_merge=True)
    changed = config.model_copy(update={"seq_len": 128})
    for more in ({"task": Task(1, 2)}, {"only_merge": True}):
        with pytest.raises(DataError, match="was begun with other settings or sources; finish that one, or run"):
            prepare(changed, **more)
    said = []
    assert prepare(changed, say=said.append).splits["train"]["seq_len"] == 128
    assert any("an interrupted preparation of other settings is begun anew" in line for line in said)


def test_two_preparations_into_one_folder(tmp_path, tokenizer_folder):
    config = config_of(pairs(tmp_path / "a.jsonl", range(9)), tmp_path / "out", tokenizer_folder)
    with hold(tmp_path / ".out.lock"):
        for more in ({}, {"task": Task(0, 2)}):
            with pytest.raises(
                DataError, match=r"out is being prepared by process \d+ on .*; wait for it, stop it, or"
            ):
                prepare(config, **more)
    prepare(config, task=Task(0, 2))
    with hold(tmp_path / ".out.partial" / "task-1-of-2.lock"), pytest.raises(DataError, match="is being prepared by"):
        prepare(config, task=Task(1, 2))
    assert prepare(config).funnel["train"] == 9


def killed(config, after):
    """Prepare in a process of its own that dies by SIGKILL once so many slices are done."""

    def die(stage, done, total, tokens):
        if (stage, done) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=prepare, args=(config,), kwargs={"progress": die})
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("after", [("slices", 1), ("slices", 4), ("write train", 1), ("write train", 2)])
def test_a_killed_preparation_goes_on_and_makes_the_same_bytes(tmp_path, tokenizer_folder, small_slices, after):
    path = pairs(tmp_path / "a.jsonl", [*range(60), 3, 4])
    more = {"validation_fraction": 0.2, "rows_per_shard": 4}
    whole, all_slices = config_of(path, tmp_path / "whole", tokenizer_folder, **more), []
    prepare(whole, progress=lambda stage, done, total, _: all_slices.append(total) if stage == "slices" else None)
    config = whole.model_copy(update={"out": str(tmp_path / "out")})
    killed(config, after)
    done = {folder: folder.stat().st_ctime_ns for folder in (tmp_path / ".out.partial" / "slices").glob("[0-9]*")}
    assert len(done) >= after[1]
    said, seen = [], []
    prepare(config, say=said.append, progress=lambda *args: seen.append(args))
    assert f"going on with an interrupted preparation: {len(done)} slices are done" in said
    plan = [len(done) + args[2] for args in seen if args[:2] == ("slices", 1)]
    assert plan == ([all_slices[0]] if len(done) < all_slices[0] else [])
    assert content(tmp_path / "whole") == content(tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_a_worker_that_is_killed_is_told(tmp_path, tokenizer_folder, small_slices, monkeypatch):
    path = pairs(tmp_path / "a.jsonl", range(40))
    config = config_of(path, tmp_path / "out", tokenizer_folder)

    def dies(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    message = r"a worker process was killed \(out of memory\?\); run it again, it goes on where"
    with monkeypatch.context() as patch:
        patch.setattr("sft_dist.data.build.work", dies)
        with pytest.raises(DataError, match=message):
            prepare(config, workers=2)
    assert prepare(config, workers=2).funnel["train"] == 40


def test_a_source_that_changes_while_it_is_read(tmp_path, tokenizer_folder, small_slices):
    path = pairs(tmp_path / "a.jsonl", range(40))

    def write(stage, done, total, tokens):
        if (stage, done) == ("slices", 2):
            with path.open("a") as file:
                file.write("\n")

    config = config_of(path, tmp_path / "out", tokenizer_folder)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read; run it again when nothing writes to it"):
        prepare(config, progress=write)
    assert not (tmp_path / "out").exists()
    assert prepare(config).funnel["train"] == 40


def test_a_disk_that_fills_says_so_and_the_next_run_goes_on(tmp_path, tokenizer_folder, small_slices, monkeypatch):
    path = pairs(tmp_path / "a.jsonl", range(40))
    config = config_of(path, tmp_path / "out", tokenizer_folder)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = "No space left on device; make room; what is done is kept, and the next run"
    with monkeypatch.context() as patch:
        patch.setattr("sft_dist.data.merge.shards.write_shard", full)
        with pytest.raises(DataError, match=message):
            prepare(config)
    said = []
    prepare(config, say=said.append)
    assert any("going on with an interrupted preparation" in line for line in said)


def test_concat_is_for_plain_text(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", range(9))
    with pytest.raises(ConfigError, match="concat cuts documents anywhere, which is for plain text only"):
        prepare(config_of(path, tmp_path / "out", tokenizer_folder, packing="concat"))
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(" ".join(map(sentence, range(at, at + 9))) for at in range(0, 90, 9)) + "\n")
    config = config_of(text, tmp_path / "text", tokenizer_folder, schema="text", packing="concat")
    report = prepare(config)
    whole = prepare(config.model_copy(update={"packing": "best_fit", "out": str(tmp_path / "fit")}))
    assert report.splits["train"]["targets"] == whole.splits["train"]["targets"]
    assert report.splits["train"]["rows"] <= whole.splits["train"]["rows"]
    one_each = prepare(config.model_copy(update={"packing": "none", "out": str(tmp_path / "none")}))
    assert one_each.splits["train"]["rows"] == one_each.splits["train"]["documents"]


def test_an_empty_source_is_refused(tmp_path, tokenizer_folder):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"a\.jsonl: empty; name files with records in them"):
        prepare(config_of(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_folder))


def test_the_schema_is_found_and_said(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", range(9))
    config = config_of(path, tmp_path / "out", tokenizer_folder)
    said = []
    report = prepare(config.model_copy(update={"sources": [SourceConfig(path=str(path))]}), say=said.append)
    assert report.funnel["train"] == 9
    assert any("schema prompt_response" in line for line in said)


def test_token_files_are_sources(tmp_path, tokenizer_folder):
    tokenizer = Tokenizer.load(str(tokenizer_folder))
    documents = [[*tokenizer.encode(sentence(n)), tokenizer.eos_id] for n in range(30)]
    path = tmp_path / "train.bin"
    np.concatenate([np.array(d, np.uint16) for d in documents]).tofile(path)
    config = config_of(path, tmp_path / "out", tokenizer_folder, validation_fraction=0.2)
    source = SourceConfig(path=str(path), format="nanogpt")
    config = config.model_copy(update={"sources": [source]})
    report = prepare(config.model_copy(update={"curate": CurateConfig(near_duplicates=0.5)}))
    assert report.funnel["train"] + report.funnel["validation"] == 30
    assert (tmp_path / "out" / "validation.jsonl").read_text() == ""
    assert report.splits["train"]["tokens"] + report.splits["validation"]["tokens"] == sum(map(len, documents))
    np.array([tokenizer.vocab_size], np.uint16).tofile(path)
    np.array([5, tokenizer.vocab_size, tokenizer.eos_id], np.uint16).tofile(path)
    with pytest.raises(
        DataError, match="is outside the vocabulary of 350; these tokens were made with another tokenizer"
    ):
        prepare(config, fresh=True)


def test_the_wrong_schema_is_told_before_much_is_read(tmp_path, tokenizer_folder):
    path = pairs(tmp_path / "a.jsonl", range(1500))
    with pytest.raises(
        DataError, match=r"none of the first 1,000 records can be read \(.*a\.jsonl:1: missing_key: no 'text'"
    ):
        prepare(config_of(path, tmp_path / "out", tokenizer_folder, schema="text"))


def test_a_template_that_was_edited_is_another_preparation(tmp_path, tokenizer_folder, small_slices):
    template = tmp_path / "t.jinja"
    source = "{% for m in messages %}{{ m.role }} OLD: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    template.write_text(source + "{% if add_generation_prompt %}assistant OLD: {% endif %}")
    config = config_of(pairs(tmp_path / "a.jsonl", range(20)), tmp_path / "out", tokenizer_folder)
    config = config.model_copy(update={"template": str(template)})
    prepare(config, task=Task(0, 2))
    template.write_text(template.read_text().replace("OLD", "NEW"))
    with pytest.raises(DataError, match="was begun with other settings or sources"):
        prepare(config, task=Task(1, 2))
    prepare(config)
    tokenizer = Tokenizer.load(str(tmp_path / "out" / "tokenizer"))
    texts = decoded(Shards.open(tmp_path / "out" / "train"), tokenizer)
    assert len(texts) == 20
    assert all("NEW" in text and "OLD" not in text for text in texts)
    template.write_text(template.read_text().replace("NEW", "NEWER"))
    with pytest.raises(DataError, match="what the template makes of a conversation"):
        prepare(config)


def test_an_evaluation_file_that_changed_is_another_preparation(tmp_path, tokenizer_folder):
    evaluation = pairs(tmp_path / "eval.jsonl", [70])
    curate = CurateConfig(decontaminate=[SourceConfig(path=str(evaluation), schema="prompt_response")])
    config = config_of(pairs(tmp_path / "a.jsonl", range(20)), tmp_path / "out", tokenizer_folder, curate=curate)
    prepare(config)
    assert prepare(config).was_already_prepared
    pairs(evaluation, [3, 70])
    with pytest.raises(DataError, match=r"the bytes of .*eval\.jsonl"):
        prepare(config)


def test_fresh_tasks_are_not_swept_away_by_a_plain_prepare(tmp_path, tokenizer_folder, small_slices):
    path = pairs(tmp_path / "a.jsonl", range(20))
    config = config_of(path, tmp_path / "out", tokenizer_folder)
    prepare(config)
    pairs(path, range(30))
    for index in range(2):
        prepare(config, task=Task(index, 2), fresh=True)
    for more in ({}, {"only_merge": True}):
        with pytest.raises(DataError, match="was prepared otherwise"):
            prepare(config, **more)
    assert prepare(config, only_merge=True, fresh=True).funnel["train"] == 30


def test_later_tasks_take_the_plan_of_the_first(tmp_path, tokenizer_folder, small_slices, monkeypatch):
    config = config_of(pairs(tmp_path / "a.jsonl", range(30)), tmp_path / "out", tokenizer_folder)
    prepare(config, task=Task(0, 2))

    def never(*_):
        raise AssertionError("the sources are read once more")

    with monkeypatch.context() as patch:
        for name in ("digest", "slices"):
            patch.setattr(f"sft_dist.data.build.{name}", never)
        prepare(config, task=Task(1, 2))
        assert prepare(config, only_merge=True).funnel["train"] == 30


def test_a_shared_instruction_makes_no_near_repeats(tmp_path, tokenizer_folder):
    shared = " ".join(map(sentence, range(4)))
    records = [{"prompt": f"{shared} {sentence(n)}", "response": f"yes {n}"} for n in range(5, 205)]
    config = config_of(write_lines(tmp_path / "a.jsonl", records), tmp_path / "out", tokenizer_folder, seq_len=1024)
    curate = CurateConfig(near_duplicates=0.9)
    report = prepare(config.model_copy(update={"curate": curate, "validation_fraction": 0.1}))
    assert report.funnel["train"] + report.funnel["validation"] > 150


def test_concat_reads_no_more_of_a_book_than_a_row(tmp_path, tokenizer_folder):
    ids = np.random.default_rng(0).integers(3, 300, 400_000).astype(np.uint16)
    ids.tofile(tmp_path / "book.bin")
    source = SourceConfig(path=str(tmp_path / "book.bin"), format="nanogpt")
    config = config_of(tmp_path / "book.bin", tmp_path / "out", tokenizer_folder, packing="concat", rows_per_shard=700)
    config = config.model_copy(update={"sources": [source]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare(config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB; whole books: gigabytes
    batch = (shards := Shards.open(tmp_path / "out" / "train")).rows(np.arange(shards.num_rows))
    rows = [tokens[:length] for tokens, length in zip(batch.tokens, batch.lengths, strict=True)]
    assert np.array_equal(np.concatenate([rows[0], *(row[1:] for row in rows[1:])]), ids)
    assert batch.targets.sum() == len(ids) - 1
