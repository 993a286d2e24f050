"""``python -m vmamba.cli``, for launchers such as torchrun that start a module."""

import sys

from vmamba.cli import main

sys.exit(main())
