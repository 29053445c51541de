"""How the cards of methods look on the API pages: `Source: ...` and its like stand as paragraphs with a bold label."""

import re
from typing import Any

import griffe

_CARD = re.compile(r"^(Source|Cost|Limits|Default scope|Shapes): (.+(?:\n[ \t]+\S.*)*)", re.MULTILINE)


class Cards(griffe.Extension):
    """Rewrites docstrings before they are parsed, where a label with indented text would become a box."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one module, class or function."""
        if obj.docstring is not None:
            obj.docstring.value = _CARD.sub(_paragraph, obj.docstring.value)


def _paragraph(card: re.Match[str]) -> str:
    return f"\n**{card[1]}**: {' '.join(card[2].split())}\n"
