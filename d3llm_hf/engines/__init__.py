"""d3LLM's decoding inside serving engines: the part that no engine is needed for, and a folder for each engine."""
