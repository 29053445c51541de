"""What was pruned: counts, tables, pictures and the page."""
