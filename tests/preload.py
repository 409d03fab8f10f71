"""Imported once by the fork server of `tests.ranks`."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import clipsys.encoder  # noqa: E402
import clipsys.training.loop  # noqa: E402
from clipsys.training.engine import import_deepspeed  # noqa: E402

import_deepspeed()
