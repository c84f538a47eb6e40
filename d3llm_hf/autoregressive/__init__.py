"""Decoding from left to right, plain and speculative: what diffusion decoding is compared with."""
