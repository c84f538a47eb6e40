"""Distillation from pseudo-trajectories (d3LLM)."""
