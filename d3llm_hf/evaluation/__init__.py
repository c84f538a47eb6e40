"""Evaluation: synthetic word problems, exact match, accuracy-parallelism sweeps."""
