"""A sample of the captions of the training data, for the model folder; see `clipsys.background`."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from clipsys.background.captions import TrainingCaptions, sample_captions
from clipsys.errors import DataError
from clipsys.shards.random_access import ShardReader
from clipsys.shards.remote import is_remote
from clipsys.shards.samples import parse_sample
from clipsys.training.data.config import DataConfig
from clipsys.training.data.shard_set import ShardSet

#: Images whose captions are read: a word in one of 10,000 captions is as good as unknown.
NUM_IMAGES = 10_000
#: Remote shards that they are taken from: each may have to be fetched again.
_REMOTE_SHARDS = 4

_logger = logging.getLogger(__name__)


def sample_training_captions(config: DataConfig, shard_set: ShardSet) -> TrainingCaptions | None:
    """Reads the captions of images spread evenly over the shards; None where there are none.

    Samples that cannot be read are left out: they were counted in training.

    Args:
        config: the recipe's section.
        shard_set: the training data.
    """
    found = sample_captions(_captions(config, shard_set))
    return found if found.captions else None


def _captions(config: DataConfig, shard_set: ShardSet) -> Iterator[tuple[str, ...]]:
    reader = ShardReader(shard_set.shards, shard_set.counts, cache=config.shard_cache)
    shards = np.arange(len(shard_set.shards))
    if any(map(is_remote, shard_set.shards)) and len(shards) > _REMOTE_SHARDS:
        shards = np.linspace(0, len(shards) - 1, _REMOTE_SHARDS).astype(np.int64)
    ends = np.cumsum([shard_set.counts[shard] for shard in shards])
    count = min(NUM_IMAGES, int(ends[-1]))
    try:
        for number in np.linspace(0, ends[-1] - 1, count).astype(np.int64):
            place = int(np.searchsorted(ends, number, side="right"))
            shard = int(shards[place])
            try:
                raw = reader.read(shard, int(number - ends[place] + shard_set.counts[shard]))
                sample = parse_sample(raw, caption_key=config.caption_key, needs_image=False)
            except DataError as error:
                _logger.debug("no captions for the model folder from this sample: %s", error)
                continue
            yield sample.captions
    finally:
        reader.close()
