"""Second moments of inputs: by hand, in parts, in low precision, merged by adding."""

import numpy as np
import torch

from lightning_prune.statistics.gram import Gram


def test_by_hand() -> None:
    gram = Gram(torch.ones(3, 2), 2)
    gram.update(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    gram.update(torch.tensor([[0.0, 1.0]]))
    # x x^T: [1 2; 2 4] + [9 -3; -3 1] + [0 0; 0 1]; sums 4 and 2; 3 tokens
    assert gram.compute().tolist() == [[10.0, -1.0, 4.0], [-1.0, 6.0, 2.0], [4.0, 2.0, 3.0]]
    assert gram.compute().dtype == torch.float64
    assert gram.source == "input"


def test_one_input_feature_keeps_its_matrix() -> None:
    gram = Gram(torch.ones(1, 1), 1)
    gram.update(torch.tensor([[2.0]]))
    assert gram.compute().tolist() == [[4.0, 2.0], [2.0, 1.0]]


def test_parts_add_up_to_numpy() -> None:
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    gram = Gram(torch.ones(1, 6), 6)
    for part in inputs.split(7):
        gram.update(part)
    extended = np.concatenate([inputs.double().numpy(), np.ones((40, 1))], 1)
    np.testing.assert_allclose(gram.compute().numpy(), extended.T @ extended, rtol=1e-12)


def test_products_are_taken_in_float64() -> None:
    gram = Gram(torch.ones(1, 2), 2)
    gram.update(torch.full((1, 2), 4096.0, dtype=torch.float16))  # the square is above the largest float16
    gram.update(torch.ones(1, 2, dtype=torch.bfloat16))
    assert gram.compute()[0, 1].item() == 4096.0**2 + 1


def test_ranks_are_merged_by_adding_and_a_restart_forgets() -> None:
    gram = Gram(torch.ones(1, 2), 2)
    parts = torch.stack([torch.eye(2), torch.ones(2, 2)])
    assert set(gram._reductions) == {"sum_of_products", "sum_of_inputs", "num_tokens"}
    assert gram._reductions["sum_of_products"](parts).tolist() == [[2.0, 1.0], [1.0, 2.0]]
    gram.update(torch.ones(3, 2))
    gram.reset()
    assert not gram.update_called
    assert gram.sum_of_products.tolist() == [[0.0, 0.0], [0.0, 0.0]]
