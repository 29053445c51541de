"""One YAML file that states one job."""

from lightning_prune.recipe.recipe import Recipe

__all__ = ["Recipe"]
