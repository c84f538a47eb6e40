"""`python -m d3llm_hf.evaluation.tables`."""

import sys

from .fill import main


sys.exit(main())
