"""Imported once by the fork server of `tests.ranks`."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from clipsys.training.engine import import_deepspeed

import_deepspeed()
