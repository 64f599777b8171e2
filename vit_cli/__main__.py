"""`python -m vit_cli`: the command where its script is not on the path."""

import sys

from vit_cli.main import main

sys.exit(main())
