"""`python -m d3llm_hf` is the `d3llm` command."""

from .cli import main


raise SystemExit(main())
