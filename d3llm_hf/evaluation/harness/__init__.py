"""lm-eval: our models in it, its command with recipes of published evaluations."""
