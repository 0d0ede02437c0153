"""``s3queue`` on a machine whose clock is off: the first argument says by how many seconds."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import botocore.auth

from s3queue_async.cli import main

shift_s = float(sys.argv.pop(1))
right_time: Any = time.time
auth: Any = botocore.auth
right_datetime = auth.get_current_datetime
time.time = lambda: right_time() + shift_s
auth.get_current_datetime = lambda *args, **named: right_datetime(*args, **named) + timedelta(seconds=shift_s)
main()
