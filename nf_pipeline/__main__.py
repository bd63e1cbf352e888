"""`python -m nf_pipeline` is the `nf-pipeline` command."""

import sys

from nf_pipeline.cli import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
