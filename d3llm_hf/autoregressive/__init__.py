"""Causal models of transformers as baselines: plain and speculative decoding, counted as diffusion models are."""
