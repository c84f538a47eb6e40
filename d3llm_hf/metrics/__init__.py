"""Metrics in the form of Hugging Face's `evaluate`: each subfolder is a complete Space."""
