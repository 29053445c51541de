"""Write the files of the report page: each aside and then renamed, plots in both themes."""

import base64
from collections.abc import Callable
from pathlib import Path

from lightning_prune.base.whole_file import written_aside
from lightning_prune.report.plots import DARK, LIGHT, Theme
from lightning_prune.report.tables import escaped

__all__ = ["picture", "write_file"]


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with written_aside(path) as aside:
        aside.write_bytes(content)


def picture(path: Path, draw: Callable[[Theme], bytes | None], *, alt: str, otherwise: str) -> str:
    """Write a plot as PNG and return it for the page in both themes, or say why there is none.

    Args:
        path: of the PNG, in the light theme.
        draw: gives a PNG, or None if there is nothing to draw.
        alt: what the plot shows, in words.
        otherwise: what the page says without a plot.
    """
    light, dark = draw(LIGHT), draw(DARK)
    if light is None or dark is None:
        return f'<p class="muted">{escaped(otherwise)}</p>'
    write_file(path, light)
    light_uri, dark_uri = (f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in (light, dark))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark_uri}">'
        f'<img src="{light_uri}" alt="{escaped(alt)}"></picture>'
    )
