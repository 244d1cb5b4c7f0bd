import torch
import torch.nn.functional as F

from sft_dist.loss import target_log_probs


def test_the_sum_equals_a_loop_over_tokens():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 6, 11), torch.randint(11, (2, 6))
    targets = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    expected = sum(
        -F.log_softmax(logits[row, at - 1], dim=0)[tokens[row, at]]
        for row in range(2)
        for at in range(1, 6)
        if targets[row, at]
    )
    torch.testing.assert_close(-target_log_probs(logits, tokens, targets).sum(), expected)
    assert target_log_probs(logits, tokens, targets).shape == (4,)


def test_no_targets_is_zero_with_a_gradient_so_that_hooks_fire():
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = -target_log_probs(logits, torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool)).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().sum() == 0


def test_sixteen_bit_logits_are_summed_in_fp32():
    logits = torch.randn(1, 9, 7).bfloat16()
    loss = -target_log_probs(logits, torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool)).sum()
    assert loss.dtype == torch.float32
