import functools
import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from launch.settle import find_compiler
from sft_dist import kernels
from sft_dist.attention import WINDOW, choose, packed_logits
from sft_dist.errors import ModelError
from sft_dist.head import Head
from sft_dist.kernels import candidates, documents_of, draws_dropout, use
from sft_dist.model import build, model_config, without_attention_dropout
from sft_dist.schema import ModelConfig

VOCAB = 50
WIDE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "attn_pdrop": 0.0},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "llama": WIDE,
    "qwen2": WIDE,
    "mistral": WIDE | {"sliding_window": 4},
}


def made(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return model, Head(model)


def put(model, head, name):
    use(model, name)
    head.wants_documents = kernels.knows_documents(name)


def varlen_by_hand(query, key, value, bounds, bounds_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch's kernel is documented to compute, one document at a time; it runs on GPUs only."""
    assert torch.equal(bounds, bounds_k)
    assert (bounds.dtype, query.ndim) == (torch.int32, 3)
    left, right = window_size
    assert right == 0, "causal"
    out, groups = torch.empty_like(query), query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    for begin, end in itertools.pairwise(bounds):
        assert end - begin <= max_q == max_k
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        scores = q @ k.repeat_interleave(groups, 0).mT * scale
        behind = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (behind < 0) | ((behind > left) if left >= 0 else False)
        out[begin:end] = (
            scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 0)
        ).transpose(0, 1)
    return out


def flex_not_compiled(monkeypatch):
    """torch's own dense reading of masks and scores in place of its kernels, which have no backward pass on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *states: None)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *states, training, **more: flex_attention(*states, **more),
    )
    mask_not_compiled(monkeypatch)


def mask_not_compiled(monkeypatch):
    own = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **about: own(**about | {"_compile": False}))


def flash_by_hand(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, window_size=(-1, -1)
):  # fmt: skip
    """What flash attention's wheels are documented to compute, of which transformers uses this function."""
    assert causal
    more = {"scale": softmax_scale, "window_size": (window_size[0], 0), "enable_gqa": query.shape[1] != key.shape[1]}
    return varlen_by_hand(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **more)


def flash_installed(monkeypatch):
    """As if its wheels were; a call that does not tell where documents begin would fail."""
    loader = "transformers.modeling_flash_attention_utils"
    monkeypatch.setattr(f"{loader}._lazy_imports", lambda *names, **more: (None, flash_by_hand, None, None, None))
    monkeypatch.setattr(f"{loader}._loaded_implementation", None)
    # which it asks in fp32, that the wheels do not have
    monkeypatch.setattr("transformers.integrations.flash_attention.get_target_dtype", lambda *states: None)
    monkeypatch.setattr(
        "transformers.modeling_utils.PreTrainedModel._flash_attn_can_dispatch", lambda self, *about, **more: True
    )


@pytest.fixture(params=["by_document", "varlen", "flex_attention", "flash_attention_2", "flash_attention_3"])
def kernel(request, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    flex_not_compiled(monkeypatch)
    flash_installed(monkeypatch)
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_documents_in_rows_are_as_documents_alone(family, kernel, checkpointing):
    model, head = made(family)
    if (family, kernel) == ("gpt2", "flex_attention"):  # transformers has it not
        with pytest.raises(ValueError, match="does not support"):
            put(model, head, kernel)
        return
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    lengths = [[7, 1, 8], [16]]
    positions = torch.stack([torch.cat([torch.arange(one) for one in row]) for row in lengths])
    whole = packed_logits(model, tokens, positions)  # by sdpa, with a mask
    (whole.square().sum()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    put(model, head, kernel)
    made_of_rows = packed_logits(model, tokens, positions)
    made_of_rows.square().sum().backward()
    torch.testing.assert_close(made_of_rows, whole)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    for row, ends in enumerate(lengths):
        begin = 0
        for length in ends:
            alone = packed_logits(model, tokens[row : row + 1, begin : begin + length], torch.arange(length)[None])
            torch.testing.assert_close(made_of_rows[row, begin : begin + length], alone[0])
            begin += length


def test_the_number_of_documents_need_not_be_asked_for():
    positions = torch.tensor([[0, 1, 2, 0], [0, 1, 0, 0]])
    assert torch.equal(documents_of(positions, 5)["cu_seq_lens_q"], documents_of(positions)["cu_seq_lens_q"])


def test_a_kernel_does_not_forget_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    config = AutoConfig.for_model("gemma2", vocab_size=VOCAB, head_dim=8, **WIDE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    head = Head(model)
    put(model, head, "varlen")
    with pytest.raises(ValueError, match="the layers of this model want softcap, which 'varlen' does not compute"):
        packed_logits(model, torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None])


@torch.no_grad()
def test_the_first_kernel_that_is_proven_is_taken(monkeypatch):
    model, head = made("mistral")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    pick = functools.partial(
        choose, use=lambda name: put(model, head, name), forward=lambda *rows: packed_logits(model, *rows), vocab_size=VOCAB,
        is_16_bit=False,
    )  # fmt: skip
    name, moved, passed_over = pick(["varlen", "sdpa"])
    assert (name, moved < 1e-5, passed_over) == ("varlen", True, [])

    name, _, passed_over = pick(["flash_attention_2", "by_document", "sdpa"])
    assert name == "by_document"
    assert len(passed_over) == 1
    assert passed_over[0].startswith("attention 'flash_attention_2' cannot be used")

    def forgets_the_window(*args, window_size, **more):
        return varlen_by_hand(*args, window_size=(-1, 0), **more)

    def forgets_the_documents(query, key, value, bounds, *args, **more):
        one = torch.tensor([0, len(query)], dtype=torch.int32)
        return varlen_by_hand(query, key, value, one, one, len(query), len(query), **more)

    for wrong in (forgets_the_window, forgets_the_documents):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
        name, _, passed_over = pick(["varlen", "sdpa"])
        assert (name, len(passed_over)) == ("sdpa", 1)
        assert "attention 'varlen' is wrong for this model" in passed_over[0]
        assert model.config._attn_implementation == "sdpa"


def pick(model, head, names):
    """As a run picks its kernel."""
    put(model, head, names[-1])
    with kernels.narrowed(model, WINDOW), torch.no_grad():
        return choose(
            names, lambda name: put(model, head, name), lambda *rows: packed_logits(model, *rows), VOCAB, is_16_bit=False,
            differentiated=lambda: kernels.differentiated(model),
        )  # fmt: skip


# wider than the rows of the proof, as windows are; "layer_types" where only some layers have one
_WINDOWED = {
    "mistral": WIDE | {"sliding_window": 4096},
    "qwen3": WIDE | {"head_dim": 8, "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": WIDE | {"head_dim": 8, "sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
_IN_THE_MASK_ALONE = {
    "qwen2_moe": WIDE | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2,
                         "num_experts_per_tok": 1, "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1},
    "phimoe": WIDE | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4096},
    "llama4_text": WIDE | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8192},
}  # fmt: skip


@pytest.mark.parametrize("family", [*_WINDOWED, *_IN_THE_MASK_ALONE])
def test_a_window_that_is_in_the_mask_alone_is_not_lost(family):
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **(_WINDOWED | _IN_THE_MASK_ALONE)[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    before = [getattr(config, name, None) for name in kernels._WINDOWS]
    name, moved, passed_over = pick(model, Head(model), ["by_document", "sdpa"])
    assert [getattr(config, name, None) for name in kernels._WINDOWS] == before
    assert moved < 1e-4
    if family in _WINDOWED:
        assert (name, passed_over) == ("by_document", [])
        assert {module.sliding_window for module in model.modules() if hasattr(module, "sliding_window")} <= {
            4096,
            None,
        }
    else:
        assert name == "sdpa"
        assert "attention 'by_document' is wrong for this model: logits move by" in passed_over[0]


def test_a_kernel_whose_gradient_is_wrong_is_passed_over(monkeypatch):
    model, head = made("llama")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    assert pick(model, head, ["varlen", "sdpa"])[0] == "varlen"

    def wrong(query, key, value, *args, **more):
        return varlen_by_hand(query, key.detach() + 0.9 * (key - key.detach()), value, *args, **more)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
    name, _, passed_over = pick(model, head, ["varlen", "sdpa"])
    assert (name, len(passed_over)) == ("sdpa", 1)
    assert "attention 'varlen' is wrong for this model: gradients are off by" in passed_over[0]
    assert all(parameter.grad is None for parameter in model.parameters())


# whose attention sdpa does not compute: a soft cap of scores, sinks
_ODD = {
    "gemma2": WIDE | {"head_dim": 8, "sliding_window": 4},
    "gpt_oss": WIDE | {"head_dim": 8, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip
# which forget, on the way to the mask, where documents begin
_FORGETFUL = {"gpt_oss": _ODD["gpt_oss"], "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}}  # fmt: skip


def built(family, sizes):
    wanted = ModelConfig(config={"model_type": family, **sizes}, dropout=0.0)
    plain = model_config(wanted, vocab_size=VOCAB, seq_len=32, eos_id=0)
    return build(wanted, plain, seed=0, gradient_checkpointing=False).eval()


def test_a_model_that_sdpa_cannot_compute_has_its_own_way_and_flex(monkeypatch):
    flex_not_compiled(monkeypatch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    model = built("gemma2", _ODD["gemma2"])
    assert model.config._attn_implementation == "eager"
    name, moved, passed_over = pick(model, Head(model), ["sdpa", "varlen", "flex_attention", "eager"])
    assert (name, moved < 1e-5) == ("flex_attention", True)
    assert [line.split(":")[0] for line in passed_over] == [
        "attention 'sdpa' cannot be used",
        "attention 'varlen' cannot be used",
    ]
    monkeypatch.setattr(  # a kernel that forgets the cap
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda *states, training, score_mod, **more: flex_attention(*states, **more),
    )
    model.config.attn_logit_softcapping = 0.01
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.01
    name, _, passed_over = pick(model, Head(model), ["flex_attention", "eager"])
    assert name == "eager"
    assert "is wrong for this model" in passed_over[0]


@pytest.mark.parametrize("family", _ODD | _FORGETFUL)
def test_documents_are_as_documents_alone_whatever_a_family_forgets(family):
    model = built(family, (_ODD | _FORGETFUL)[family])
    head, truth = Head(model), model.config._attn_implementation
    assert head.kept_apart(lambda: pick(model, head, [truth]))[0] == truth
    assert head.makes_masks == (family in _FORGETFUL)
    tokens = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(one) for one in row]) for row in ([7, 1, 8], [16])])
    whole = packed_logits(model, tokens, positions)
    for row, begin, end in ((0, 0, 7), (0, 8, 16), (1, 0, 16)):
        document = tokens[row : row + 1, begin:end]
        head.makes_masks = False
        alone = model(input_ids=document, use_cache=False).logits  # by the model's own mask
        torch.testing.assert_close(whole[row, begin:end], alone[0])


def test_a_model_that_takes_no_masks_either_is_refused():
    model = built("llama", WIDE)
    head = Head(model)
    tries = []

    def leaks():
        tries.append(head.makes_masks)
        if head.makes_masks:
            raise TypeError("no masks, please")
        raise ModelError("packed documents see each other")

    with pytest.raises(ModelError, match="packed documents see each other"):
        head.kept_apart(leaks)
    assert (tries, head.makes_masks) == ([False, True], False)


@torch.no_grad()
# torch compiles flex attention; where it cannot, the uncompiled one above holds masks and gradients, if not the kernel
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")
def test_flex_as_torch_compiles_it(monkeypatch):
    """Its forward pass on a CPU; rows of several blocks of 128 tokens."""
    mask_not_compiled(monkeypatch)  # which takes longer
    config = AutoConfig.for_model("gemma2", vocab_size=VOCAB, head_dim=16, **WIDE | {"num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(VOCAB, (1, 300), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(one) for one in (70, 1, 229)])[None]
    expected = packed_logits(model, tokens, positions)
    use(model, "flex_attention")
    torch.testing.assert_close(packed_logits(model, tokens, positions), expected)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        packed_logits(model, tokens, positions)


@torch.no_grad()
def test_where_not_even_the_truth_keeps_documents_apart_the_model_is_refused():
    model, _ = made("llama")
    with pytest.raises(ModelError, match="packed documents see each other"):
        choose(
            ["sdpa"],
            lambda name: None,
            lambda tokens, positions: model(input_ids=tokens).logits,
            VOCAB,
            is_16_bit=False,
        )


def test_which_kernels_there_are(monkeypatch):
    assert candidates("cpu", is_16_bit=True) == ["sdpa"]
    assert candidates("cuda", is_16_bit=False) == ["sdpa"]
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name == "flash_attn")
    assert candidates("cuda", is_16_bit=True, truth="eager") == [
        "flash_attention_2",
        "varlen",
        "flex_attention",
        "eager",
    ]
    every = ("sdpa", "eager", "by_document", "varlen", "flex_attention", *kernels._FLASH)
    assert [name for name in every if draws_dropout(name)] == ["sdpa", "eager", "by_document", "flash_attention_2"]


def test_dropout_that_a_kernel_cannot_draw_is_told(caplog):
    config = AutoConfig.for_model("gpt2")
    without_attention_dropout(config)
    assert (config.attn_pdrop, config.resid_pdrop) == (0.0, 0.1)
    assert "model.attn_pdrop 0.1 becomes 0" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("name", ["varlen", "flash_attention_3", "flex_attention"])
def test_a_kernel_without_dropout_is_not_taken_for_a_model_with_it(name, monkeypatch):
    model, head = made("gpt2")
    model.config.attn_pdrop = 0.1
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    taken, _, passed_over = choose(
        [name, "sdpa"], lambda name: put(model, head, name), lambda *rows: packed_logits(model, *rows), VOCAB, is_16_bit=False
    )  # fmt: skip
    assert (taken, model.config._attn_implementation) == ("sdpa", "sdpa")
    assert passed_over == [
        f"attention {name!r} cannot be used: it draws no dropout, and the model has {{'attn_pdrop': 0.1}}"
    ]


def test_a_model_whose_kernel_cannot_be_set_is_not_said_to_use_it(monkeypatch):
    model, _ = made("llama")
    monkeypatch.setattr(model, "_can_set_attn_implementation", lambda: False)
    with pytest.raises(ValueError, match="do not let their kernel be set"):
        use(model, "by_document")
    use(model, "sdpa")


def test_dropout_of_one_document_after_another_is_drawn():
    model, head = made("gpt2")
    put(model, head, "by_document")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.transformer.h[0].attn.attn_dropout.p = 0.5
    tokens, positions = torch.ones(1, 8, dtype=torch.long), torch.arange(8)[None]
    learned = [packed_logits(model.train(), tokens, positions) for _ in range(2)]
    assert not torch.equal(*learned)
    asked = [packed_logits(model.eval(), tokens, positions) for _ in range(2)]
    assert torch.equal(*asked)
