"""Eight synthetic domains that need different units: a mask per instruction beats the best single mask."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_prune.conditional.instruction import Instruction, InstructionCondition, Predictor
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.collapse import CollapseGuard
from lightning_prune.predictors.encoder import Blind, Encoder, OwnLayers
from lightning_prune.predictors.prompt import Reads
from lightning_prune.predictors.soft_top_k import SoftTopK
from lightning_prune.structured.structure import Stack

DOMAINS, SYMBOLS, NOISE = 8, 64, 0.1
LENGTH, BATCH, STEPS = 32, 32, 300
TABLE = torch.randint(0, SYMBOLS, (DOMAINS, 4, SYMBOLS), generator=torch.Generator().manual_seed(7))


def sequences(num: int, seed: int) -> dict[str, Tensor]:
    """Return sequences whose first token names the domain; the next symbol follows from it and the last two."""
    generator = torch.Generator().manual_seed(seed)
    domain = torch.randint(0, DOMAINS, (num,), generator=generator)
    rows = [SYMBOLS + domain, torch.randint(0, SYMBOLS, (num,), generator=generator)]
    rows.append(torch.randint(0, SYMBOLS, (num,), generator=generator))
    while len(rows) < LENGTH:
        drawn = torch.randint(0, SYMBOLS, (num,), generator=generator)
        is_noise = torch.rand(num, generator=generator) < NOISE
        rows.append(torch.where(is_noise, drawn, TABLE[domain, rows[-2] % 4, rows[-1]]))
    ids = torch.stack(rows, dim=1)
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trained(encoder: Encoder, *, rate: float = 1.0, spread: float = 1.0) -> tuple[float, InstructionCondition]:
    """Train a model from scratch with a predictor; return its held-out loss, and the condition."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=SYMBOLS + DOMAINS, max_position_embeddings=LENGTH, **sizes))
    options = Instruction(
        budget=Budget(num_units=32),
        predictor=Predictor(encoder=encoder, hidden=64, spread=spread),
        choice=SoftTopK(hard=True),
        reads=Reads(dropout=0.0),
        start=None,
        ramp=0.0,
    )
    condition = options.insert(model, Stack((), "", (), 4))
    condition.begin(total_steps=STEPS)
    own = [p for name, p in model.named_parameters() if not name.startswith("mask_predictor")]
    groups = [{"params": own}, {"params": list(condition.predictor.parameters()), "lr": 3e-3 * rate}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        model(**sequences(BATCH, step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        condition.after_step()
    model.eval()
    with torch.no_grad():
        return float(model(**sequences(256, 10_000)).loss), condition


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_mask_per_domain_beats_one_learned_mask_and_collapse_is_told_apart() -> None:
    guard, held_out = CollapseGuard(), sequences(16, 9_999)
    loss, condition = trained(OwnLayers())
    static, _ = trained(Blind())
    assert loss < static - 0.08
    assert not guard.has_collapsed(condition.measure(held_out))
    _, collapsed = trained(OwnLayers(), rate=0.1, spread=1e-3)
    assert guard.has_collapsed(collapsed.measure(held_out))
