"""What transformers and PEFT call of this package: the families, checkpoints with code of their own, adapters."""
