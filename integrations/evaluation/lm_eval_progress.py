"""lm-eval's Hugging Face model with one progress bar for rolling log-likelihoods, where lm-eval draws one per batch."""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm

__all__ = ["OneBarHFLM"]


class OneBarHFLM(HFLM):
    """Score as HFLM does; only the bars differ."""

    _bar: Any = None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text.

        Args:
            requests: one text each.
            disable_tqdm: whether to draw no bar.
        """
        with tqdm(desc="Scoring whole texts", unit=" windows", disable=disable_tqdm) as self._bar:
            values: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._bar = None
        return values

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if self._bar is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        scores = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        self._bar.update(len(requests))
        return scores
