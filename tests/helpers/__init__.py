"""What the tests, and the tools that are run by hand, share."""

import os
import sys

# Compiled files are kept, whatever the environment says: hundreds of processes start povfarm.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
