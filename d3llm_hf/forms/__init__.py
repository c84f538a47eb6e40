"""Forms: text with typed holes that a model fills in, valid by construction."""
