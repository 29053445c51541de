"""Door to the adapters for trainers and other libraries.

In a checkout and in an editable install the adapters lie in the top-level folder `integrations/`, which is added to
this package's path here. In a wheel they lie beside this file and nothing is added. Importing the door imports no
adapter and no trainer.
"""

from pathlib import Path

__all__: list[str] = []

_ROOT = Path(__file__).resolve().parents[2]

if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "integrations").is_dir():
    __path__.append(str(_ROOT / "integrations"))
