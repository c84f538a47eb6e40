"""Supervised fine-tuning of masked diffusion language models."""
