"""AUP, accuracy under parallelism: a metric for `evaluate`."""
