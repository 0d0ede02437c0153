"""How hypothesis runs here: no deadline (the machine is shared), and the same examples every time in CI."""

import os

from hypothesis import settings

settings.register_profile("local", deadline=None, max_examples=200)
settings.register_profile("ci", deadline=None, max_examples=300, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
