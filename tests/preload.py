"""Imported once by the fork server of `tests.ranks`, so that no rank or worker has to."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import open_clip  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import torchvision  # noqa: F401

import clipsys.training.loop  # noqa: F401
from clipsys.training.distributed.process_group import import_deepspeed

import_deepspeed()
