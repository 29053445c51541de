import pytest
import torch

from lightning_prune.conditional.expert_choice import ExpertChoice
from lightning_prune.conditional.token_router import TokenRouter
from tests.conditional.routed_models import METHODS, inserted, trained
from tests.tiny_models import tiny_family

METHOD = METHODS["expert_choice"]


def test_golden_values() -> None:
    made = TokenRouter(8, num_experts=2, share=0.5, is_causal=False, like=torch.zeros(1)).eval()
    made.advance(torch.zeros(5), 0)
    gates = torch.tensor([[[2.0, 0], [1, 1], [0, 3], [3, 2.5]]]).softmax(-1)
    chosen = made.choose(gates, None)[0]
    assert chosen[:, 0].nonzero().flatten().tolist() == [0, 3]
    assert chosen[:, 1].nonzero().flatten().tolist() == [1, 2]
    expected = torch.tensor([[0.880797, 0], [0, 0.5], [0, 0.952574], [0.622459, 0]])
    torch.testing.assert_close(gates[0] * chosen, expected, rtol=0, atol=1e-6)


def test_each_expert_computes_exactly_its_share_of_every_sequence() -> None:
    model, counted = trained("bert", METHOD), list[int]()
    first = model.bert.encoder.layer[0].intermediate
    for dense in (first.dense, *(expert[0].dense for expert in first.other_experts)):
        dense.register_forward_hook(lambda _, args, output: counted.append(args[0].shape[:-1].numel()))
    x = torch.randn(3, 10, 32)
    chosen = first.token_router.choose(first.token_router.scores(x).softmax(-1), None)
    assert chosen.sum(1).tolist() == [[4, 4, 4]] * 3  # 1.2 * 10 / 3
    first(x)
    assert counted == [12, 12, 12]


def test_permuted_tokens_give_permuted_outputs_and_another_sequence_changes_nothing() -> None:
    first = trained("bert", METHOD).bert.encoder.layer[0].intermediate
    x, order = torch.randn(2, 10, 32), torch.randperm(10)
    with torch.no_grad():
        found = first(x)
        torch.testing.assert_close(first(x[:, order]), found[:, order], rtol=0, atol=1e-5)
        torch.testing.assert_close(first(x[:1]), found[:1], rtol=0, atol=1e-5)


def test_the_output_is_the_sum_of_experts_by_their_gates() -> None:
    part = trained("llama", METHOD).model.layers[0].mlp
    x = torch.randn(2, 10, 32)
    with torch.no_grad():
        gates = part.token_router.scores(x).softmax(-1)
        chosen = part.token_router.choose(gates, None)
        dense = [type(part).forward(part, x), *(expert(x) for expert in part.other_experts)]
        expected = sum((gates * chosen)[..., e, None] * given for e, given in enumerate(dense))
        torch.testing.assert_close(part(x), expected, rtol=0, atol=1e-5)
    assert not torch.equal(dense[0], dense[1])


def test_one_expert_is_the_dense_part_whatever_happens() -> None:
    model, condition = inserted("bert", ExpertChoice(num_experts=1, capacity=1.0))
    plain, x = tiny_family("bert").eval().bert.encoder.layer[0], torch.randn(2, 10, 32)
    condition.begin(total_steps=1)
    condition.after_step()
    with torch.no_grad():
        expected = plain.output.dense(plain.intermediate(x))
        torch.testing.assert_close(model.bert.encoder.layer[0].intermediate(x), expected, rtol=0, atol=1e-6)


def test_the_gradient_reaches_the_router_and_every_expert() -> None:
    model = trained("llama", METHOD).train()
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    part = model.model.layers[0].mlp
    assert float(part.token_router.weight.grad.norm()) > 0
    for expert in part.other_experts:
        assert float(expert[0].up_proj.weight.grad.norm()) > 0


@pytest.mark.parametrize("capacity", [0.0, 4.5])
def test_a_capacity_that_experts_cannot_have_is_refused(capacity: float) -> None:
    with pytest.raises(ValueError, match=r"capacity is how many of the 4 experts.*in \(0, 4\], got"):
        ExpertChoice(num_experts=4, capacity=capacity)


def test_without_an_expert_there_is_nothing_to_choose() -> None:
    with pytest.raises(ValueError, match="num_experts must be 1 or more, got 0"):
        ExpertChoice(num_experts=0)
