import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, OPTConfig

from sft_dist.answers import Prompt, Sampling, answers, own_prompts, prompts
from sft_dist.attention import packed_logits
from sft_dist.data.build import prepare, read_conversations
from sft_dist.data.loader import Loader
from sft_dist.data.records import Conversation, Document, Turn
from sft_dist.data.shards import write
from sft_dist.data.template import template_from
from sft_dist.data.tokenise import Tokenizer
from sft_dist.document_losses import distribution
from sft_dist.errors import DataError, ModelError
from sft_dist.evaluate import (
    Evaluator,
    Measured,
    alone,
    forgetting,
    held_out,
    held_out_loss,
    open_shards,
    same_tokenizer,
)
from sft_dist.head import scores_of
from sft_dist.labels import LabelTask, confusion, label_metrics, label_scores
from sft_dist.metrics import Metrics
from sft_dist.model import build, model_config
from sft_dist.schema import ModelConfig, PrepareConfig, SentencePieceTraining, SourceConfig, TrainedTokenizer
from sft_dist.topology import Topology

QUESTION = "Colour of {text}?\nAnswer:"
THINGS = ("sky", "sea", "grass", "leaf", "blood", "rose", "moss")


def record(number):
    label = ("blue", "green", "red", "green")[number % 4]
    return (
        label,
        f"the {THINGS[number % 7]} of place {number}, as {THINGS[number // 7 % 7]} as it was in {1900 + number}",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared label task of three labels: its folder and tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.tsv").write_text("".join("\t".join(record(number)) + "\n" for number in range(220)))
    source = SourceConfig(path=str(folder / "a.tsv"), schema="label", delimiter="\t", text=1, label=0)
    config = PrepareConfig(
        sources=[source],
        template=QUESTION,
        tokenizer=TrainedTokenizer(sentencepiece=SentencePieceTraining(vocab_size=350)),
        seq_len=96,
        validation_fraction=0.15,
        rows_per_shard=7,
        out=str(folder / "out"),
    )
    prepare(config)
    return folder / "out"


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer.load(str(data / "tokenizer"))


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        config={"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "initializer_range": 0.3}
    )
    made = model_config(config, vocab_size=tokenizer.vocab_size, seq_len=96, eos_id=tokenizer.eos_id)
    return build(config, made, seed=0, gradient_checkpointing=False).eval()


@pytest.fixture(scope="module")
def forward(model):
    @torch.no_grad()
    def scores(tokens, positions, places, labels):
        return scores_of(packed_logits(model, tokens, positions), places, labels)

    return scores


def alone_log_probs(model, tokenizer, record, label):
    """The independent witness: one conversation at a time, unpacked, plain text in, token by token."""
    prompt = tokenizer.encode(QUESTION.format(text=record.turns[0].content))
    ids = [*tokenizer.encode(QUESTION.format(text=record.turns[0].content) + f" {label}"), tokenizer.eos_id]
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [log_probs[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))]


@pytest.fixture(scope="module", name="held_out")
def records_held_out(data):
    records = list(read_conversations(data / "validation.jsonl"))
    assert len(records) > 15
    return records


@pytest.mark.parametrize("micro_batch_rows", [1, 4, 100])
def test_validation_loss_is_the_mean_over_all_target_tokens(
    data, tokenizer, model, forward, held_out, comms, micro_batch_rows
):
    each = [value for record in held_out for value in alone_log_probs(model, tokenizer, record, record.label)]
    loader = Loader(
        open_shards(data, "validation"), Topology(), seed=0, micro_batch_rows=micro_batch_rows, shuffle=False
    )
    values = held_out_loss(forward, loader, comms).values
    assert values["validation_loss"] == pytest.approx(-sum(each) / len(each), rel=1e-5)
    assert values["validation_perplexity"] == pytest.approx(math.exp(-sum(each) / len(each)), rel=1e-4)


def test_the_order_of_rows_does_not_move_the_loss(data, forward, comms):
    shards = open_shards(data, "validation")
    losses = [
        held_out_loss(forward, Loader(shards, Topology(), seed=seed, micro_batch_rows=3), comms).values[
            "validation_loss"
        ]
        for seed in (0, 1)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_ranks_of_a_world_share_the_rows_out(data, forward, comms):
    """Two ranks, one after the other in this process: their sums add up to the whole."""
    shards = open_shards(data, "validation")
    sums = []

    class Summing:
        def sum_tensor(self, tensor):
            sums.append(tensor.clone())
            return tensor

    for rank in range(3):
        held_out_loss(
            forward, Loader(shards, Topology(rank, 3, rank), seed=0, micro_batch_rows=4, shuffle=False), Summing()
        )
    total, count = sum(sums[::2]).tolist()
    whole = held_out_loss(forward, Loader(shards, Topology(), seed=0, micro_batch_rows=4, shuffle=False), comms)
    assert count == shards.manifest.targets
    assert whole.values["validation_loss"] == pytest.approx(total / count, rel=1e-12)
    assert whole.documents == distribution(sum(sums[1::2]))


def test_a_set_without_targets_has_no_loss(tmp_path, forward, comms):
    about = {"vocab_size": 50, "eos_id": 0, "pad_id": 0, "tokenizer": "t", "template": "p"}
    write(tmp_path / "validation", [[Document([3, 4], [False, False], "f:1")]], seq_len=4, rows_per_shard=1, **about)
    loader = Loader(open_shards(tmp_path, "validation"), Topology(), seed=0, micro_batch_rows=1)
    assert held_out_loss(forward, loader, comms) == Measured()


def test_perplexity_of_a_hopeless_model_is_a_number(data, comms, tokenizer):
    def hopeless(tokens, positions, *at):
        logits = torch.zeros(*tokens.shape, tokenizer.vocab_size)
        logits[..., 0] = 1e5
        return scores_of(logits, *at)

    loader = Loader(open_shards(data, "validation"), Topology(), seed=0, micro_batch_rows=4)
    measured = held_out_loss(hopeless, loader, comms)
    values = measured.values
    assert values["validation_loss"] == pytest.approx(1e5, rel=1e-3)
    assert math.isfinite(values["validation_perplexity"])
    assert measured.documents["edges"][-1] > 64


@pytest.mark.parametrize("micro_batch_rows", [1, 5, 1000])
def test_label_scores_are_the_log_likelihood_of_each_answer(
    data, tokenizer, model, forward, held_out, comms, micro_batch_rows
):
    task = LabelTask.open(data / "labels")
    assert task.labels == ["blue", "green", "red"]
    scores = label_scores(forward, task, comms, micro_batch_rows=micro_batch_rows)
    wanted = [[sum(alone_log_probs(model, tokenizer, record, label)) for label in task.labels] for record in held_out]
    assert scores.log_likelihoods == pytest.approx(np.array(wanted), rel=1e-5)
    assert [task.labels[place] for place in task.truth] == [record.label for record in held_out]
    assert len(set(scores.predicted.tolist())) > 1


def test_a_rank_without_rows_takes_part_in_scoring(data, forward):
    task = LabelTask.open(data / "labels")
    calls = []

    def counted(tokens, *more):
        calls.append(tokens.shape)
        return forward(tokens, *more)

    class LastOfMany:
        topology = Topology(rank=60, world_size=61, local_rank=0)

        def sum_tensor(self, tensor):
            return tensor

    scores = label_scores(counted, task, LastOfMany(), micro_batch_rows=4)
    assert len(calls) == 1
    assert not scores.log_likelihoods.any()


def test_a_matrix_counts_what_was_taken_for_what():
    made = confusion(["a", "b", "c"], np.array([0, 0, 1, 2, 2]), np.array([0, 2, 1, 2, 0]))
    assert made == {"labels": ["a", "b", "c"], "counts": [[1, 0, 1], [0, 1, 0], [1, 0, 1]]}


def test_no_label_folder_is_no_task(tmp_path):
    assert LabelTask.open(tmp_path / "labels") is None
    assert open_shards(tmp_path, "validation") is None


@pytest.mark.parametrize(
    ("truth", "predicted", "num_labels", "positive", "accuracy", "f1"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 2, 1, 1.0, 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], 2, 1, 0.0, 0.0),
        ([0, 0, 0, 1], [0, 0, 0, 0], 2, 1, 0.75, 0.0),  # never the rare one: accurate and worthless
        ([0, 0, 0, 1], [0, 0, 0, 0], 2, 0, 0.75, 6 / 7),
        ([0, 0], [0, 0], 2, 1, 1.0, 0.0),  # nothing positive anywhere
        ([0, 1, 1, 0, 1], [1, 1, 0, 0, 1], 2, 1, 0.6, 2 / 3),  # precision 2/3, recall 2/3
        ([0, 1, 2, 2], [0, 1, 2, 0], 3, 0, 0.75, (2 / 3 + 1 + 2 / 3) / 3),
        ([0, 1, 2, 2], [0, 1, 2, 0], 3, 2, 0.75, (2 / 3 + 1 + 2 / 3) / 3),
    ],
)
def test_label_metrics_by_hand(truth, predicted, num_labels, positive, accuracy, f1):
    values = label_metrics(np.array(truth), np.array(predicted), num_labels=num_labels, positive=positive)
    assert values == {"validation_accuracy": pytest.approx(accuracy), "validation_f1": pytest.approx(f1)}
    assert all(type(value) is float for value in values.values())


def counting(tokens, positions, *at):
    """A model whose next token is always one more than the last; checks what it is fed."""
    assert positions.tolist() == [list(range(tokens.shape[1]))] * len(tokens)
    logits = torch.zeros(*tokens.shape, 50)
    logits.scatter_(2, (tokens + 1)[..., None], 1.0)
    return scores_of(logits, *at)


def answer(forward, ids, comms, **more):
    (made,) = answers(forward, [ids], comms, **more)
    return made


def test_an_answer_stops_at_the_end_token(comms):
    assert answer(counting, [3, 4], comms, end_ids=[8], max_new_tokens=40, context=100) == [5, 6, 7]
    assert answer(counting, [3, 7], comms, end_ids=[8], max_new_tokens=40, context=100) == []


def test_an_answer_stops_at_its_limit(comms):
    assert answer(counting, [3], comms, end_ids=[49], max_new_tokens=3, context=100) == [4, 5, 6]


@pytest.mark.parametrize(("context", "wanted"), [(5, [5, 6, 7]), (3, [5]), (2, []), (1, [])])
def test_an_answer_stops_where_the_context_ends(comms, context, wanted):
    assert answer(counting, [3, 4], comms, end_ids=[49], max_new_tokens=40, context=context) == wanted


def test_what_is_finished_leaves_the_batch(comms):
    """Four prompts of different lengths: one ends at once, one by its end token, one has no room, one by its limit."""
    sizes = []

    def counted(tokens, *more):
        sizes.append(tuple(tokens.shape))
        return counting(tokens, *more)

    asked = [[7], [1, 2, 3, 4], list(range(10, 18)), [30, 31]]
    made = answers(counted, asked, comms, end_ids=[8], max_new_tokens=5, context=8)
    assert made == [[], [5, 6, 7], [], [32, 33, 34, 35, 36]]
    assert sizes == [(3, 4), (2, 5), (2, 6), (2, 7), (1, 6)]


def test_an_answer_is_what_transformers_generates(model, tokenizer, forward, comms):
    ids = tokenizer.encode(QUESTION.format(text="the sky"))
    ours = answer(forward, ids, comms, end_ids=[tokenizer.eos_id], max_new_tokens=12, context=96)
    theirs = model.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=2
    )
    assert ours == [token for token in theirs[0, len(ids) :].tolist() if token != tokenizer.eos_id]


def test_prompts_are_the_first_records_as_inference_sees_them(tokenizer, held_out):
    made = prompts(iter(held_out), template_from(QUESTION), tokenizer, 3)
    assert [prompt.text for prompt in made] == [record.turns[0].content for record in held_out[:3]]
    assert [prompt.expected for prompt in made] == [record.label for record in held_out[:3]]
    assert tokenizer.decode(made[0].ids) == QUESTION.format(text=held_out[0].turns[0].content)
    assert prompts(held_out, template_from(QUESTION), tokenizer, 0) == []
    assert len(prompts(held_out, template_from(QUESTION), tokenizer, 10_000)) == len(held_out)


def test_a_prompt_of_several_turns_holds_what_came_before(tokenizer):
    turns = (
        Turn("user", "the sky"),
        Turn("assistant", "blue", True),
        Turn("user", "the sea"),
        Turn("assistant", "green", True),
    )
    (prompt,) = prompts([Conversation(turns, "a:1")], template_from("chat"), tokenizer, 1)
    assert (prompt.text, prompt.expected) == ("the sea", "green")
    assert prompt.ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(prompt.ids).endswith("### User:\nthe sea\n\n### Assistant:\n")


def test_plain_text_is_asked_to_go_on_after_24_tokens(tokenizer):
    text = " ".join(record(number)[1] for number in range(5))
    ids = tokenizer.encode(text)
    long = Conversation((Turn("text", text, True),), "a:1")
    short = Conversation((Turn("text", "the sky", True),), "a:2")
    first, second = prompts([long, short], template_from("plain"), tokenizer, 2)
    assert first == Prompt(tokenizer.decode(ids[:24]), ids[:24], tokenizer.decode(ids[24:64]))
    assert second == Prompt("the sky", tokenizer.encode("the sky"), "")


def test_rows_of_another_tokenizer_are_refused(data, tokenizer):
    shards = open_shards(data, "validation")
    same_tokenizer(shards, tokenizer.fingerprint, "m")
    message = (
        rf"^runs/m: its tokenizer {'0' * 12} is not the one the shards were cut with \({tokenizer.fingerprint[:12]}\)\. "
        "Prepare the data with this model's tokenizer first$"
    )
    with pytest.raises(DataError, match=message):
        same_tokenizer(shards, "0" * 32, "runs/m")


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
def test_prompts_are_answered_together_as_they_are_one_at_a_time(tokenizer, held_out, forward, comms, batch_tokens):
    asked = prompts(held_out, template_from(QUESTION), tokenizer, 7)
    asked = [replace(prompt, ids=prompt.ids[3 * number :]) for number, prompt in enumerate(asked)]
    shapes = []

    def counted(tokens, *more):
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *more)

    sampling = Sampling(asked, tokenizer.decode, tokenizer.end_ids, 96, max_new_tokens=9, batch_tokens=batch_tokens)
    limits = {"end_ids": tokenizer.end_ids, "max_new_tokens": 9, "context": 96}
    alone = [answer(forward, prompt.ids, comms, **limits) for prompt in asked]
    assert len({tuple(ids) for ids in alone}) > 1
    assert [one["answer"] for one in sampling.answers(counted, comms)] == [tokenizer.decode(ids) for ids in alone]
    assert shapes[0][0] == {1: 1, 200: 200 // (max(len(prompt.ids) for prompt in asked) + 9), 10_000: 7}[batch_tokens]


def test_prompts_of_ones_own_are_asked_as_the_model_learned_it(tokenizer):
    (asked,) = own_prompts(["the sky"], template_from(QUESTION), tokenizer, is_text=False)
    assert (asked.text, asked.expected) == ("the sky", "")
    assert tokenizer.decode(asked.ids) == QUESTION.format(text="the sky")
    (gone_on,) = own_prompts(["the sky"], template_from("plain"), tokenizer, is_text=True)
    assert gone_on.ids == [*tokenizer.bos_ids, *tokenizer.encode("the sky")]


def test_an_evaluator_measures_what_there_is(data, tokenizer, forward, held_out, comms):
    loader = Loader(open_shards(data, "validation"), Topology(), seed=0, micro_batch_rows=4, shuffle=False)
    task = LabelTask.open(data / "labels")
    asked = prompts(held_out, template_from(QUESTION), tokenizer, 2)
    sampling = Sampling(asked, tokenizer.decode, tokenizer.end_ids, context=96, max_new_tokens=4, batch_tokens=400)

    whole = Evaluator(comms, loader, task, sampling)
    loss = held_out_loss(forward, loader, comms)
    scores = label_scores(forward, task, comms, micro_batch_rows=4)
    metrics = label_metrics(task.truth, scores.predicted, num_labels=3, positive=task.positive)
    metrics["validation_exact_match"] = float(scores.is_exact.mean())
    matrix = confusion(task.labels, task.truth, scores.predicted)
    assert whole.loss(forward) == loss
    assert whole.metrics(forward) == Measured({**loss.values, **metrics}, loss.documents, matrix)
    answered = whole.samples(forward)
    assert [(a["prompt"], a["expected"]) for a in answered] == [(p.text, p.expected) for p in asked]
    ids = answer(forward, asked[1].ids, comms, end_ids=[tokenizer.eos_id], max_new_tokens=4, context=96)
    assert answered[1]["answer"] == tokenizer.decode(ids)

    assert Evaluator(comms, None, task).metrics(forward) == Measured(metrics, None, matrix)
    assert Evaluator(comms, loader, None).metrics(forward) == loss
    nothing = Evaluator(comms, None, None)
    assert (nothing.loss(forward), nothing.metrics(forward), nothing.samples(forward)) == (Measured(), Measured(), [])


def test_the_splits_of_a_mixture_are_those_of_its_sets_that_have_one(data, tmp_path):
    found = held_out(["bare", "colours"], [tmp_path, data], "validation")
    assert {name: shards.folder for name, shards in found.items()} == {"colours": data / "validation"}
    assert held_out(["colours"], [data], "general") == {}


def test_what_has_been_answered_at_a_step_is_not_answered_again_at_its_end(comms):
    told = []

    class Once(Evaluator):
        def samples(self, forward):
            told.append(forward)
            return []

    evaluator = Once(comms, None, None)
    evaluator.answer(4, "on the way", Metrics())
    evaluator.measure(4, "the end", Metrics())
    evaluator.measure(5, "another end", Metrics())
    assert told == ["on the way", "another end"]


@pytest.mark.parametrize(
    ("before", "after", "most", "told"),
    [
        (31.2, 33.0, 0.1, ["general text: perplexity 31.2 before, 33.0 after (+5.8 %)"]),
        (31.2, 30.0, 0.1, ["general text: perplexity 31.2 before, 30.0 after (-3.8 %)"]),
        (None, 33.0, 0.1, ["general text: perplexity 33.0 after; it was not measured before"]),
        (
            10.0,
            11.5,
            0.1,
            [
                "general text: perplexity 10.0 before, 11.5 after (+15.0 %)",
                "warning: the perplexity of general text rose by more than evaluate.max_forgetting 0.1: the model forgets. "
                "Lower train.learning_rate, train for fewer epochs, or mix general text in",
            ],
        ),
    ],
)
def test_forgetting_is_judged_by_how_much_the_perplexity_rose(before, after, most, told):
    assert forgetting(before, after, most) == told


def test_a_model_alone_is_measured_only_where_documents_are_kept_apart(monkeypatch):
    config = OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config).eval()  # whose mask forgets where documents begin
    monkeypatch.setattr("sft_dist.evaluate.Comms", lambda *about: None)  # of this process there is one
    forward, _ = alone(plain, torch.device("cpu"))
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = forward(tokens, positions, torch.tensor([6]), torch.tensor([3])).log_probs
    apart = forward(tokens[:, 5:], positions[:, 5:], torch.tensor([1]), torch.tensor([3])).log_probs
    torch.testing.assert_close(packed, apart)
    config_of_bamba = BambaConfig(  # recurrent layers, and a z-loss that the head here does not have
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, pad_token_id=0, z_loss_coefficient=0.1,
    )  # fmt: skip
    with pytest.raises(ModelError, match="packed documents see each other"):
        alone(AutoModelForCausalLM.from_config(config_of_bamba), torch.device("cpu"))
    monkeypatch.setattr("sft_dist.head.masks_of", lambda *about: None)
    with pytest.raises(ModelError, match="packed documents see each other with attention 'sdpa'"):
        alone(AutoModelForCausalLM.from_config(config), torch.device("cpu"))
