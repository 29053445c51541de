"""Remove units inside of blocks: scores, budgets, repair, and the methods made of them."""
