"""Speed and memory of a step of training."""
