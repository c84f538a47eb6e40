"""EAGLE-3 (arXiv:2503.01840): a head of one layer drafts a tree of tokens, one forward of the target verifies it."""
