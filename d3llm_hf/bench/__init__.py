"""Speed and memory of decoding, beside the plain loops that the published code runs."""
