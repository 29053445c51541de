import torch
from torch import nn
from torch.nn import functional

from lightning_prune.conditional.imitation import imitate


def test_loss_and_gradient_are_those_of_autograd_and_reach_no_weight() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 11)).double()
    final = torch.randn(70, 8, dtype=torch.float64, requires_grad=True)
    streams = [torch.randn(70, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    kl_E, agrees_EN, entropy_EN, num_answers = imitate(head, final, streams)
    (kl_E * torch.tensor([1.0, 3.0])).sum().backward()
    assert num_answers == 11
    assert final.grad is None
    assert all(parameter.grad is None for parameter in head.parameters())
    for index, stream in enumerate(streams):
        twin = stream.detach().clone().requires_grad_()
        log_p, log_q = head(final.detach()).log_softmax(-1), head(twin).log_softmax(-1)
        expected = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        torch.testing.assert_close(kl_E[index].double(), expected, rtol=1e-5, atol=1e-6)
        (expected * (1, 3)[index]).backward()
        torch.testing.assert_close(stream.grad, twin.grad, rtol=1e-5, atol=1e-8)
        assert torch.equal(agrees_EN[index], log_p.argmax(-1) == log_q.argmax(-1))
        expected_entropy = torch.distributions.Categorical(logits=log_q).entropy()
        torch.testing.assert_close(entropy_EN[index].double(), expected_entropy, rtol=1e-4, atol=1e-5)


def test_no_tokens_give_no_loss() -> None:
    stream = torch.zeros(0, 4, requires_grad=True)
    kl_E, *_ = imitate(nn.Linear(4, 3), torch.zeros(0, 4), [stream])
    kl_E.sum().backward()
    assert kl_E.tolist() == [0.0]
