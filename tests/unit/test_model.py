import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_dist.attention import packed_logits
from sft_dist.errors import ModelError
from sft_dist.model import build, has_dropout, model_config
from sft_dist.schema import ModelConfig

SHARDS = {"vocab_size": 64, "seq_len": 16, "eos_id": 1}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
KINDS = pytest.mark.parametrize("values", [GPT2, LLAMA], ids=["gpt2", "llama"])


def made(values, *, dropout=None, **shards):
    return model_config(ModelConfig(config=values, dropout=dropout), **{**SHARDS, **shards})


def scratch(values, *, seed=0, gradient_checkpointing=False, **more):
    config = ModelConfig(config=values, **more)
    return build(config, model_config(config, **SHARDS), seed=seed, gradient_checkpointing=gradient_checkpointing)


def folder_of(path, values=GPT2, seed=3, **changes):
    """A pre-trained folder, as save_pretrained leaves it."""
    model = scratch({**values, **changes}, seed=seed)
    model.save_pretrained(path)
    return model


def equal(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@KINDS
def test_a_model_from_scratch_is_a_function_of_the_seed(values):
    torch.rand(7)  # whatever was drawn before
    first = scratch(values, seed=5)
    torch.rand(3)
    assert equal(first, scratch(values, seed=5))
    assert not equal(first, scratch(values, seed=6))
    assert {p.dtype for p in first.parameters()} == {torch.float32}


@KINDS
def test_a_configuration_is_completed_from_the_shards(values):
    config = made(values)
    assert (config.vocab_size, config.max_position_embeddings) == (64, 16)
    assert (config.bos_token_id, config.eos_token_id) == (1, 1)
    assert (config.use_cache, config.pad_token_id) == (False, None)
    model = scratch(values)
    tokens = torch.arange(16)[None]
    assert packed_logits(model, tokens, tokens).shape == (1, 16, 64)
    assert model.config._attn_implementation == "sdpa"


def test_what_the_run_file_says_of_the_model_stays():
    config = made({**GPT2, "vocab_size": 128, "n_positions": 32, "eos_token_id": 7})
    assert (config.vocab_size, config.n_positions, config.eos_token_id) == (128, 32, 7)
    assert made({**LLAMA, "max_position_embeddings": 32}).max_position_embeddings == 32
    assert made({**GPT2, "max_position_embeddings": 32}).n_positions == 32


@pytest.mark.parametrize(("dropout", "wanted"), [(None, 0.0), (0.0, 0.0), (0.25, 0.25)])
def test_dropout_from_scratch_is_none_unless_it_is_set(dropout, wanted):
    gpt2, llama = made(GPT2, dropout=dropout), made(LLAMA, dropout=dropout)
    assert (gpt2.attn_pdrop, gpt2.embd_pdrop, gpt2.resid_pdrop, llama.attention_dropout) == (wanted,) * 4
    assert has_dropout(gpt2) == has_dropout(llama) == (wanted > 0)
    model = scratch(GPT2, dropout=dropout)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {wanted}


def test_a_dropout_that_the_models_own_configuration_names_is_kept():
    config = made({**GPT2, "attn_pdrop": 0.3})
    assert config.attn_pdrop == 0.3


@pytest.mark.parametrize(("dropout", "wanted"), [(None, 0.1), (0.0, 0.0), (0.25, 0.25)])
def test_dropout_of_a_pre_trained_model_is_its_own_unless_it_is_set(tmp_path, dropout, wanted):
    folder_of(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about |= {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(about))
    config = ModelConfig(name_or_path=str(tmp_path), dropout=dropout)
    loaded = build(config, model_config(config, **SHARDS), seed=0, gradient_checkpointing=False)
    assert {m.p for m in loaded.modules() if isinstance(m, torch.nn.Dropout)} == {wanted}


def test_a_vocabulary_that_the_shards_exceed_is_refused(tmp_path):
    message = (
        r"model\.config: vocab_size 63 is smaller than the shards' vocabulary of 64; prepare with the model's own tokenizer "
        r"\(leave prepare\.tokenizer out\), or enlarge the model"
    )
    with pytest.raises(ModelError, match=message):
        made({**GPT2, "vocab_size": 63})
    folder_of(tmp_path)
    with pytest.raises(ModelError, match="vocab_size 64 is smaller than the shards' vocabulary of 65"):
        model_config(ModelConfig(name_or_path=str(tmp_path)), **{**SHARDS, "vocab_size": 65})


@pytest.mark.parametrize("values", [{**GPT2, "n_positions": 15}, {**LLAMA, "max_position_embeddings": 15}])
def test_a_context_that_a_row_exceeds_is_refused(values):
    message = (
        r"model\.config: a context of 15 tokens is shorter than prepare\.seq_len 16; lower seq_len and prepare again, or take "
        "a model with a longer context"
    )
    with pytest.raises(ModelError, match=message):
        made(values)


def test_a_context_of_a_pre_trained_model_is_checked_too(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(ModelError, match=r"a context of 16 tokens is shorter than prepare.seq_len 17"):
        model_config(ModelConfig(name_or_path=str(tmp_path)), **{**SHARDS, "seq_len": 17})


@pytest.mark.parametrize("values", [{"model_type": "gpt3"}, {**GPT2, "n_embd": "wide"}, {"model_type": 7}])
def test_a_configuration_that_makes_no_model_is_refused(values):
    with pytest.raises(
        ModelError, match=r"^model: cannot load model_type .*Check the name; only safetensors"
    ) as raised:
        made(values)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_a_number_of_heads_that_does_not_divide_is_refused():
    with pytest.raises(ModelError, match=r"^model: cannot load"):
        scratch({**GPT2, "n_head": 3})


@pytest.mark.parametrize("what", ["missing", "empty", "broken"])
def test_a_folder_that_holds_no_model_is_refused(tmp_path, monkeypatch, what):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "model"
    if what != "missing":
        path.mkdir()
    if what == "broken":
        (path / "config.json").write_text("{cut")
    with pytest.raises(
        ModelError, match=rf"^model: cannot load {path}: .+\. Check the name; .*must be a local folder$"
    ):
        model_config(ModelConfig(name_or_path=str(path)), **SHARDS)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    model = folder_of(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = ModelConfig(name_or_path=str(tmp_path))
    for _ in ("no weights at all", "pickled weights only"):
        with pytest.raises(ModelError, match=rf"^model: cannot load {tmp_path}: .*only safetensors weights are read"):
            build(config, model_config(config, **SHARDS), seed=0, gradient_checkpointing=False)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")


def test_safetensors_that_are_cut_are_refused(tmp_path):
    folder_of(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    config = ModelConfig(name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match=rf"^model: cannot load {tmp_path}"):
        build(config, model_config(config, **SHARDS), seed=0, gradient_checkpointing=False)


@KINDS
def test_a_saved_folder_loads_whatever_the_seed(tmp_path, values):
    saved = folder_of(tmp_path, values)
    config = ModelConfig(name_or_path=str(tmp_path))
    loaded = build(config, model_config(config, **SHARDS), seed=9, gradient_checkpointing=False)
    assert equal(saved, loaded)
    assert loaded.config._attn_implementation == "sdpa"


def test_weights_saved_in_16_bit_are_trained_in_fp32(tmp_path):
    saved = folder_of(tmp_path).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path))
    loaded = build(config, model_config(config, **SHARDS), seed=0, gradient_checkpointing=False)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert equal(saved.float(), loaded)


def test_a_named_model_may_start_from_scratch(tmp_path):
    saved = folder_of(tmp_path, seed=3)
    config = ModelConfig(name_or_path=str(tmp_path), init="scratch")
    fresh = build(config, model_config(config, **SHARDS), seed=4, gradient_checkpointing=False)
    assert not equal(saved, fresh)
    assert equal(fresh, scratch(GPT2, seed=4))


def test_what_is_saved_opens_with_plain_transformers(tmp_path):
    saved = folder_of(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "gpt2"
    assert equal(saved, AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True))


def test_code_beside_the_weights_is_never_run(tmp_path):
    """`auto_map` names Python files of a folder; whoever wrote the folder would decide what runs here."""
    folder_of(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    values = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": "evil", "auto_map": names}))
    with pytest.raises(ModelError, match="cannot load"):
        model_config(ModelConfig(name_or_path=str(tmp_path)), **SHARDS)
    assert not ran.exists()
