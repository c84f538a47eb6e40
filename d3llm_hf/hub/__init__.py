"""Checkpoints as folders: found, exported with their code and card, made for an engine, pushed."""
