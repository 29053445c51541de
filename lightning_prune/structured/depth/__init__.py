"""Remove blocks and sub-blocks: candidates, criteria, the search, and the methods made of them."""
