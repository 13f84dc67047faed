"""Starts povfarm as ``python povfarm.py`` does, and as if that had been typed.

What is run is compiled at each start, which takes half a second; what is imported, once.
"""

import sys
from pathlib import Path

PROGRAM = str(Path(__file__).resolve().parents[2] / "povfarm.py")

if __name__ == "__main__":
    sys.path[0] = str(Path(PROGRAM).parent)
    sys.argv[0] = PROGRAM
    if hasattr(sys, "orig_argv"):
        sys.orig_argv[1] = PROGRAM
    import povfarm

    sys.exit(povfarm.main())
