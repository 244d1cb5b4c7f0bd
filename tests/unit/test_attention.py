import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from sft_dist.attention import _first_sentence, choose, leak, packed_logits, prove_isolation
from sft_dist.errors import ModelError

SIZES = {"vocab_size": 50}
MODELS = {
    "gpt2": GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32, **SIZES),
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        **SIZES,
    ),
}


@pytest.fixture(params=sorted(MODELS))
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[request.param], attn_implementation="sdpa").eval()


@torch.no_grad()
def test_documents_are_kept_apart(model):
    assert prove_isolation(lambda t, p: packed_logits(model, t, p), 50, is_16_bit=False, kernel="sdpa") < 1e-5


@pytest.mark.parametrize(
    "arguments", [{"use_cache": False, "attention_mask": "ones"}, {"use_cache": False, "position_ids": None}]
)
def test_a_way_that_leaks_is_refused(model, arguments):
    @torch.no_grad()
    def forward(tokens, positions):
        given = {"position_ids": positions, **arguments}
        if given.get("attention_mask") == "ones":
            given["attention_mask"] = torch.ones_like(tokens)
        return model(input_ids=tokens, **given).logits

    assert max(leak(forward, 50)) > 1e-2
    with pytest.raises(ModelError, match="packed documents see each other with attention 'sdpa'"):
        prove_isolation(forward, 50, is_16_bit=False, kernel="sdpa")


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(ModelError, match="logits move by nan"):
        prove_isolation(lambda t, p: torch.full((*t.shape, 4), torch.nan), 50, is_16_bit=False, kernel="x")


def test_a_document_alone_that_gives_no_numbers_is_refused():
    def forward(tokens, positions):
        return torch.full((*tokens.shape, 4), torch.nan if tokens.shape[1] < 10 else 1.0)

    with pytest.raises(ModelError, match="logits move by nan"):
        prove_isolation(forward, 50, is_16_bit=False, kernel="x")
    taken = []
    with pytest.raises(ModelError, match="with attention 'truth'"):
        choose(["fast", "truth"], taken.append, forward, 50, is_16_bit=False)
    assert taken == ["truth", "fast", "truth"]


def test_of_an_error_of_torch_one_sentence_is_told():
    """A kernel of another device: torch lists all its backends, a thousand characters of them."""
    taken = []

    @torch.no_grad()
    def forward(tokens, positions):
        if taken[-1] == "fast":
            torch.ops.aten._flash_attention_forward(*[torch.ones(1, 2, 1, 8)] * 3, None, None, 2, 2, 0.0, False, False)
        return torch.eye(50)[tokens]

    kernel, _, [told] = choose(["fast", "truth"], taken.append, forward, 50, is_16_bit=False)
    assert kernel == "truth"
    assert told == (
        "attention 'fast' cannot be used: Could not run 'aten::_flash_attention_forward' with arguments from the 'CPU' backend"
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("needs torch 2.11 or newer.", "needs torch 2.11 or newer"),
        ("one line\nanother", "one line"),
        ("", "RuntimeError"),
        ("x" * 300, "x" * 199 + "…"),
    ],
)
def test_what_is_told_of_an_error_is_short_and_has_no_end_of_its_own(said, told):
    assert _first_sentence(RuntimeError(said)) == told
