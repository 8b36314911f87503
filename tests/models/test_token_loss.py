import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from srlora_pl.models.token_loss import Head, summed_loss, token_losses
from tests.helpers.causal import Largest

ROWS, HIDDEN, VOCABULARY = 7, 5, 11
HEADS = [(1.0, None), (0.3, None), (1.0, 3.0), (0.3, 3.0)]


def operands(**options: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, W, b, and the right tokens, in fp64."""
    torch.manual_seed(0)
    hidden, W, b = torch.randn(ROWS, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY)
    return *(each.double().requires_grad_() for each in (hidden, W, b)), torch.randint(VOCABULARY, (ROWS,))


def whole(hidden: Tensor, W: Tensor, b: Tensor, target: Tensor, scale: float, cap: float | None) -> Tensor:
    """The losses (n,) by all logits at once."""
    z = scale * (hidden @ W.T + b)
    z = z if cap is None else cap * torch.tanh(z / cap)
    return F.cross_entropy(z, target, reduction="none")


@pytest.mark.parametrize(("scale", "cap"), HEADS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits_at_once(scale, cap, chunk):
    *inputs, target = operands()
    loss = summed_loss(inputs[0], target, Head(inputs[1], inputs[2], scale, cap), chunk)
    expected = whole(*inputs, target, scale, cap).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    found = torch.autograd.grad(2 * loss, inputs)
    for each, right in zip(found, torch.autograd.grad(2 * expected, inputs), strict=True):
        torch.testing.assert_close(each, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("scale", "cap"), HEADS)
def test_gradients_agree_with_finite_differences(scale, cap):
    *inputs, target = operands()
    assert torch.autograd.gradcheck(lambda h, W, b: summed_loss(h, target, Head(W, b, scale, cap), 3), inputs)


def test_a_tied_head_has_the_gradients_of_both_uses():
    hidden, W, b, target = operands()
    tokens = torch.arange(ROWS)
    tied = summed_loss(F.embedding(tokens, W) + hidden, target, Head(W, b), 3)
    expected = whole(F.embedding(tokens, W) + hidden, W, b, target, 1.0, None).sum()
    torch.testing.assert_close(*(torch.autograd.grad(each, W)[0] for each in (tied, expected)), rtol=1e-12, atol=1e-13)


def test_losses_of_tokens_and_which_are_right():
    hidden, W, b, target = operands()
    losses, right = token_losses(hidden, target, Head(W, b, 0.3, 3.0), 3)
    torch.testing.assert_close(losses, whole(hidden, W, b, target, 0.3, 3.0).detach(), rtol=1e-13, atol=0)
    assert right.tolist() == ((hidden @ W.T + b).argmax(-1) == target).tolist()


def test_no_rows_give_0_and_no_gradient():
    hidden, W, b, target = operands()
    loss = summed_loss(hidden[:0], target[:0], Head(W, b), 3)
    assert loss == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()
    assert [len(each) for each in token_losses(hidden[:0], target[:0], Head(W, b), 3)] == [0, 0]


def test_products_are_in_autocasts_type_and_sums_in_float32():
    hidden, W, b, target = (each.float() if each.is_floating_point() else each for each in operands())
    hidden = hidden.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(hidden, target, Head(W.detach(), b.detach()), 3)
    assert loss.dtype == torch.float32
    z = F.linear(hidden.bfloat16(), W.bfloat16(), b.bfloat16()).float()
    torch.testing.assert_close(loss, F.cross_entropy(z, target, reduction="sum"), rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(loss, hidden)
    assert found.dtype == torch.float32
    (right,) = torch.autograd.grad(whole(hidden, W, b, target, 1.0, None).sum(), hidden)
    torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)


def test_no_tensor_holds_more_than_a_chunk_of_logits():
    rows, hidden, vocabulary, chunk = 64, 8, 512, 16
    h, W = torch.randn(rows, hidden, requires_grad=True), torch.randn(vocabulary, hidden)
    target = torch.randint(vocabulary, (rows,))
    with Largest() as seen:
        summed_loss(h, target, Head(W), chunk).backward()
    assert seen.numel == chunk * vocabulary
    with Largest() as seen:  # and so it would be seen
        F.cross_entropy(h @ W.T, target).backward()
    assert seen.numel >= rows * vocabulary
