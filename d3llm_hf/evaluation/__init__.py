"""Evaluation: tasks, sweeps over settings, leaderboard, lm-eval, and the tables of the documents."""
