import torch

from lightning_prune.conditional.agreement import MIN_SEEN, NUM_BINS, count, threshold


def test_those_that_left_do_not_come_to_later_exits() -> None:
    confidence = torch.tensor([[0.9, 0.5, 0.1, 1.0], [0.9, 0.75, 0.8, 0.2]])
    agrees = torch.tensor([[True, False, True, False], [True, True, False, True]])
    counts, (left, agreed, total) = count(confidence, agrees, [torch.tensor(0.6), torch.tensor(0.8)])
    assert counts[0, 0].nonzero().flatten().tolist() == [25, 128, 230, 255]
    assert counts[0, 1].nonzero().flatten().tolist() == [25, 230]
    assert counts[1, 0].nonzero().flatten().tolist() == [192, 204]
    assert counts[1, 1].nonzero().flatten().tolist() == [192]
    assert (int(left), int(agreed), int(total)) == (3, 1, 4)


def test_the_threshold_is_the_lowest_that_keeps_the_agreement() -> None:
    seen, agreed = torch.zeros(NUM_BINS), torch.zeros(NUM_BINS)
    seen[[200, 150, 100, 50]] = torch.tensor([100.0, 100.0, 100.0, 100.0])
    agreed[[200, 150, 100, 50]] = torch.tensor([99.0, 95.0, 70.0, 0.0])
    assert threshold(seen, agreed, 0.985) == 151 / NUM_BINS
    assert threshold(seen, agreed, 0.97) == 101 / NUM_BINS
    assert threshold(seen, agreed, 0.88) == 51 / NUM_BINS
    assert threshold(seen, agreed, 0.5) == 0.0
    assert threshold(seen, agreed, 1.0) == float("inf")


def test_few_tokens_say_nothing() -> None:
    seen = torch.zeros(NUM_BINS)
    seen[255] = MIN_SEEN - 1
    assert threshold(seen, seen, 0.5) == float("inf")
    seen[10] = 1
    assert threshold(seen, seen, 0.5) == 0.0
