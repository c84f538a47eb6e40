"""Methods that came after the committed figures were measured: the next regeneration brings their rows.

Of `d3llm_hf/evaluation/results/methods.json` and of `docs/leaderboard`; then this set is empty again.
"""

AWAITED = {"klass", "wino"}
