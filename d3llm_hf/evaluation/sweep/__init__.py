"""Curves of accuracy over tokens per forward: a grid of settings, its measured points, their file."""
