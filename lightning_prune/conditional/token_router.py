"""Choose some tokens of each sequence by what they are, and what of it a decoder may know.

The k best of a sequence are known only at its end. A model that reads in both directions takes them, k a share of its
real tokens. In a causal model each token is judged alone, in training and afterwards: it is chosen if its score reaches
that of the k-th best of late training batches, a running estimate that the router keeps in buffers. So a later token
never changes an earlier choice, and decoding with a cache chooses as a pass over the whole text does; the number of
chosen tokens then meets the share on average, not in every sequence.

The scale is the relaxed choice, min(1, exp((s + a) / epsilon)), in both cases: a is that of the sequence, or the
running estimate. The gradient is the same up to that: what all scores have in common gets none.

At first all tokens are chosen with the scale 1; the share falls linearly over the ramp. Scores are those of inputs with
the root mean square 1 and of a vector drawn with the length 1, so that they begin with a spread of one.

Shapes: B sequences, T tokens, D features, E experts (1 where one branch chooses).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least
from lightning_prune.calibration.calls import in_backward
from lightning_prune.conditional.method import Condition
from lightning_prune.predictors.soft_top_k import kept, soft_top_k

__all__ = ["NEXT_TO_NOTHING", "RoutedTokens", "TokenRouter", "check_share"]

# What weights start from that are to add nothing at first: exact zeros would be held as those of a pruned model.
NEXT_TO_NOTHING = 2.0**-24
MOMENTUM = 0.9  # of the running estimates, per optimizer step


def check_share(*, epsilon: float | None = None, ramp: float) -> None:
    """Check the options that all routers have.

    Raises:
        ValueError: naming the option.
    """
    at_least(0, ramp=ramp)
    if ramp > 1:
        raise ValueError(f"ramp is the share of the training over which the choice narrows, in 0 to 1, got {ramp}")
    if epsilon is not None and not (0 < epsilon < math.inf):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")


class TokenRouter(nn.Module):
    """Scores tokens and chooses some.

    Args:
        width: features of a token.
        num_experts: that choose, each by a vector of its own.
        share: of the real tokens that each chooses at the end of the ramp, in (0, 1].
        is_causal: whether tokens are judged alone, by the running estimates.
        epsilon: temperature of the scale, in units of the scores.
        wider: in training, so many times the share may pass; 9 / 8 in CoLT5.
        seed: of the vectors.
        like: a weight that the router works beside; its device and dtype.
    """

    share: Tensor
    estimates: Tensor
    num_steps: Tensor

    def __init__(
        self,
        width: int,
        *,
        share: float,
        is_causal: bool,
        like: Tensor,
        num_experts: int = 1,
        epsilon: float = 1.0,
        wider: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn_ED = functional.normalize(torch.randn(num_experts, width, generator=generator), dim=1)
        self.weight = nn.Parameter(drawn_ED.to(like.device, like.dtype))
        self.target, self.is_causal, self.epsilon, self.wider = share, is_causal, epsilon, wider
        open_2E = torch.tensor([[-math.inf], [math.inf]], device=like.device).expand(2, num_experts)
        self.register_buffer("share", torch.ones((), device=like.device))
        self.register_buffer("estimates", open_2E.clone())  # the k-th best score, and the shift a
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long, device=like.device))
        self.seen: Tensor | None = None  # the sum of what training batches since the last step show, and their number
        self.last_share = torch.ones(())

    def scores(self, x_BTD: Tensor) -> Tensor:
        """Return s_BTE, float32 and never under autocast."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            size_free_BTD = functional.rms_norm(x_BTD.float(), (x_BTD.shape[-1],))
            return size_free_BTD @ self.weight.float().T

    def choose(self, s_BTE: Tensor, keep_BT: Tensor | None) -> Tensor:
        """Return which tokens are chosen, bool (B, T, E); never padding.

        Args:
            s_BTE: what tokens are judged by.
            keep_BT: which tokens are real; None if all are.
        """
        judged_BTE = s_BTE.detach()
        if keep_BT is None:
            keep_BT = torch.ones(s_BTE.shape[:2], dtype=torch.bool, device=s_BTE.device)
        if self.is_causal:
            self._look(judged_BTE[keep_BT])
            chosen_BTE = judged_BTE >= self.estimates[0]
        else:
            k_B1 = self.numbers(keep_BT, self.wider if self.training else 1.0)[:, None]
            hidden_BET = judged_BTE.transpose(1, 2).masked_fill(~keep_BT[:, None], -math.inf)
            chosen_BTE = kept(hidden_BET, k_B1.expand(hidden_BET.shape[:2])).transpose(1, 2)
        chosen_BTE = chosen_BTE & keep_BT[:, :, None]
        if self._is_learning():
            self.last_share = chosen_BTE.sum() / (keep_BT.sum() * s_BTE.shape[-1]).clamp(min=1)
        return chosen_BTE

    def forward(self, x_BTD: Tensor, keep_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return which tokens are chosen and their scale, bool (B, T) and float32 (B, T), zero where not chosen."""
        s_BTE = self.scores(x_BTD)
        chosen_BT = self.choose(s_BTE, keep_BT)[..., 0]
        s_BT = s_BTE[..., 0]
        if self.is_causal:
            common = (s_BT * chosen_BT).sum() / chosen_BT.sum().clamp(min=1)
            s_BT = s_BT - (common - common.detach())
            scale_BT = ((s_BT + self.estimates[1]) / self.epsilon).clamp(max=0).exp()
        else:
            keep_BT = torch.ones_like(chosen_BT) if keep_BT is None else keep_BT
            is_some_B1 = keep_BT.any(1, keepdim=True)
            hidden_BT = s_BT.masked_fill(~keep_BT & is_some_B1, -math.inf)
            scale_BT = soft_top_k(hidden_BT, self.numbers(keep_BT), epsilon=self.epsilon)
        return chosen_BT, scale_BT * chosen_BT

    def numbers(self, keep_BT: Tensor, times: float = 1.0) -> Tensor:
        """Return k_B: the share of the real tokens of each sequence, rounded up, at least one."""
        real_B = keep_BT.sum(1)
        k_B = (real_B * (self.share.double() * times) - 1e-6).ceil().long()
        return torch.minimum(k_B, real_B).clamp(min=1)

    def _is_learning(self) -> bool:
        """Return whether a batch is one of the training; a model may be trained in evaluation mode."""
        return (self.training or torch.is_grad_enabled()) and not in_backward()

    def _look(self, s_NE: Tensor) -> None:
        """Note where the share of the tokens of a training batch ends."""
        if not self._is_learning() or len(s_NE) == 0 or float(self.share) >= 1:
            return
        k = min(len(s_NE), max(1, math.ceil(len(s_NE) * float(self.share) - 1e-6)))
        s_EN = s_NE.T.contiguous()
        last_E1 = s_EN.sort(dim=1, descending=True, stable=True).indices[:, k - 1 : k]
        scale_E1 = soft_top_k(s_EN, k, epsilon=self.epsilon).gather(1, last_E1)
        bound_E1 = s_EN.gather(1, last_E1)
        shift_E1 = self.epsilon * scale_E1.clamp(min=torch.finfo(scale_E1.dtype).tiny).log() - bound_E1
        found = torch.cat((bound_E1.flatten(), shift_E1.flatten(), torch.ones_like(bound_E1[0])))
        self.seen = found if self.seen is None else self.seen + found

    def taken(self) -> Tensor:
        """Return the sum of what training batches showed since the last step and their number, flat; forget them."""
        nothing = torch.zeros(self.estimates.numel() + 1, device=self.estimates.device)
        seen, self.seen = self.seen, None
        return nothing if seen is None else seen

    def advance(self, seen: Tensor, num_ramp_steps: float) -> None:
        """Move the estimates and the share by one optimizer step."""
        number = float(seen[-1])
        if number > 0:
            new_2E = seen[:-1].reshape(self.estimates.shape) / number
            moved_2E = MOMENTUM * self.estimates + (1 - MOMENTUM) * new_2E
            self.estimates.copy_(torch.where(self.estimates.isfinite(), moved_2E, new_2E))
        self.num_steps += 1
        done = 1.0 if num_ramp_steps <= 0 else min(1.0, int(self.num_steps) / num_ramp_steps)
        self.share.fill_(1 + done * (self.target - 1))


class RoutedTokens(Condition):
    """Routers at work in a model.

    Args:
        routers: by their names in the model.
        added: all that was added, by its names in the model; the routers are among it.
        undo: gives the model back when it is closed.
        ramp: share of the training over which the choice narrows.
    """

    def __init__(
        self, routers: Sequence[TokenRouter], added: Mapping[str, nn.Module], undo: ExitStack, *, ramp: float
    ) -> None:
        self._routers, self._added, self._undo, self._ramp = tuple(routers), dict(added), undo, ramp
        self._num_ramp_steps = 0.0

    def added(self) -> Mapping[str, nn.Module]:
        """Return routers, and the branches that were not in the model."""
        return self._added

    def begin(self, *, total_steps: int) -> None:
        """Take in the length of the training, in optimizer steps."""
        self._num_ramp_steps = self._ramp * total_steps

    def after_step(self) -> None:
        """Narrow the choice by one step, and move what causal routers go by; collective where processes train."""
        seen = [router.taken() for router in self._routers]
        parts = distributed.sum_everywhere(torch.cat(seen)).split([len(part) for part in seen])
        for router, part in zip(self._routers, parts, strict=True):
            router.advance(part, self._num_ramp_steps)

    def metrics(self) -> dict[str, float]:
        """Return the share of tokens that the last training batch chose, the mean over routers and its target."""
        chosen = [float(router.last_share) for router in self._routers]
        return {"chosen": sum(chosen) / len(chosen), "share": float(self._routers[0].share)}

    def remove(self) -> None:
        """Take the routers and what they route to off again."""
        self._undo.close()
