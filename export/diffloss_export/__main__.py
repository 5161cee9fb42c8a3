"""`python -m diffloss_export` is `diffloss-export`."""

import sys

from diffloss_export.cli import main

sys.exit(main())
