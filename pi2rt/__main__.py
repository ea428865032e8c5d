"""``python -m pi2rt``: the command line where its script is not on the path."""

import sys

from pi2rt.cli.main import main

sys.exit(main())
