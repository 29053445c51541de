"""Expert choice: each of several feed-forward parts takes the tokens it prefers, so that load is equal by construction.

    A = softmax over experts of the logits of a token
    expert e takes the C tokens with the largest A_e of each sequence, C = capacity times its real tokens / experts
    y = sum over the experts that took the token of A_e expert_e(x)

Easy tokens are taken by fewer experts, or by none; hard ones by several. The first expert is the model's own part,
the others begin as its copies. At first each expert takes all tokens: the gates of a token sum to one, so the model
computes what it did; the capacity falls over the ramp.

Source: Sun et al., EC-DIT: Scaling Diffusion Transformers with Adaptive Expert-Choice Routing, arXiv 2410.02098; the
    copies are those of sparse upcycling, arXiv 2212.05055. Ours: a group of tokens is one sequence, so that results do
    not depend on what else is in a batch; the router reads inputs of unit root mean square; in decoders each expert
    judges tokens one by one (token_router).
Defaults: capacity 2 is the paper's; it uses 8 to 64 experts, in every second block from the second on (`layers`).
Cost: `capacity` feed-forward parts per token on average, `num_experts` of them in memory, and in time at first.
Limits: dense feed-forward parts.

Shapes: B sequences, T tokens, D features, E experts.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_prune.base.bounds import at_least
from lightning_prune.conditional.block_calls import inserting, noting, register
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.conditional.routed_ffn import RoutedFFN, add_rows, ffn_parts
from lightning_prune.conditional.token_router import RoutedTokens, TokenRouter, check_share
from lightning_prune.structured.structure import Stack

__all__ = ["ExpertChoice"]


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(ConditionMethod):
    """Method for more capacity at the cost of the tokens that need it; see the module text.

    Args:
        num_experts: feed-forward parts beside each other.
        capacity: of them for each token, on average; at most `num_experts`.
        ramp: share of the training over which the capacity falls.
        layers: the blocks that change; all if it is not given.
        seed: of routers.
        rate: see `ConditionMethod`.
    """

    num_experts: int = 8
    capacity: float = 2.0
    ramp: float = 0.25
    layers: tuple[int, ...] | None = None
    seed: int = 0
    rate: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, num_experts=self.num_experts)
        check_share(ramp=self.ramp)
        if not 0 < self.capacity <= self.num_experts:
            raise ValueError(
                f"capacity is how many of the {self.num_experts} experts take a token on average, in (0, "
                f"{self.num_experts}], got {self.capacity}"
            )

    def insert(self, model: nn.Module, stack: Stack) -> RoutedTokens:
        """Insert routers and experts; see `ConditionMethod`."""
        parts, _, names = ffn_parts(model, stack, self.layers)
        with inserting(model) as undo:
            known = noting([part.block for part in parts], undo)
            routers: list[TokenRouter] = []
            added: dict[str, nn.Module] = {}
            for part in parts:
                others = (nn.Sequential(*copy.deepcopy(part.modules)) for _ in range(self.num_experts - 1))
                experts = nn.ModuleList(others)
                router = TokenRouter(
                    part.block.call.read.shape[-1],
                    num_experts=self.num_experts,
                    share=self.capacity / self.num_experts,
                    is_causal=part.is_causal,
                    like=part.like,
                    seed=self.seed + 7919 * part.block.layer,
                )
                register(part.first, "token_router", router, undo)
                register(part.first, "other_experts", experts, undo)
                _ExpertChoiceFFN(part, known, undo)
                routers.append(router)
                added |= {
                    f"{names[id(part.first)]}.{name}": m
                    for name, m in (("token_router", router), ("other_experts", experts))
                }
        return RoutedTokens(routers, added, undo, ramp=self.ramp)


class _ExpertChoiceFFN(RoutedFFN):
    """Several feed-forward parts, each for the tokens it takes."""

    def compute(self, x_BTD: Tensor, keep_BT: Tensor | None) -> Tensor:
        """Return the sum of what the experts give, by their gates."""
        first = self.module
        router: TokenRouter = first.token_router  # type: ignore[assignment]
        gates_BTE = router.scores(x_BTD).softmax(-1)
        chosen_BTE = router.choose(gates_BTE, keep_BT)
        experts: list[Callable[[Tensor], Tensor]] = [self.dense.rows, *map(_rows, first.other_experts)]  # type: ignore[arg-type]
        y_BTD = x_BTD.new_zeros(x_BTD.shape)
        for number, expert in enumerate(experts):
            y_BTD = add_rows(y_BTD, x_BTD, chosen_BTE[..., number], gates_BTE[..., number], expert)
        return y_BTD


def _rows(expert: nn.Module) -> Callable[[Tensor], Tensor]:
    def compute(x_ND: Tensor) -> Tensor:
        given: Tensor = expert(x_ND[None])[0]
        return given

    return compute
