"""Imported once by the fork server of `tests.ranks`."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from clipsys.training.processes import import_deepspeed

import_deepspeed()
