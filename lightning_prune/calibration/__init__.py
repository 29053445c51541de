"""How batches are run and what is observed while a model runs."""
