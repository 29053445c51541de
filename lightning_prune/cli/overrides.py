"""Sort what a command of `lightning-prune` does not know by itself: overrides of its recipe, and options to pass on."""

from collections.abc import Iterable, Sequence

from lightning_prune.base import registry

__all__ = ["OWN_SECTIONS", "RUN_SECTIONS", "refuse", "split"]

OWN_SECTIONS = ("prune", "condition", "shrink", "recover", "evaluate", "export", "report", "seed")
RUN_SECTIONS = ("trainer", "model", "data")


def split(
    rest: Iterable[str], *, own: Sequence[str] = OWN_SECTIONS, passed_on: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Sort what a command did not know into overrides of the recipe and options to pass on.

    Raises:
        ValueError: if a token belongs to neither.
    """
    overrides, others = [], []
    tokens = list(rest)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise ValueError(f"unexpected argument {token!r}; options start with --, and a program to run follows --")
        key, equals, value = token[2:].partition("=")
        section = key.partition(".")[0]
        if section not in (*own, *passed_on):
            raise ValueError(registry.unknown("option", f"--{section}", [f"--{name}" for name in (*own, *passed_on)]))
        if not equals and tokens and not tokens[0].startswith("--"):
            equals, value = "=", tokens.pop(0)
        if section in own:
            if not equals:
                raise ValueError(f"--{key} needs a value, as in --{key}=VALUE")
            overrides.append(f"{key}={value}")
        else:
            others.append(f"--{key}{equals}{value}")
    return overrides, others


def refuse(rest: Sequence[str]) -> None:
    """Refuse what a command without a recipe did not know.

    Raises:
        ValueError: naming the first token.
    """
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}")
