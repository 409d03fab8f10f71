"""Every error that clipsys raises on purpose.

    ClipsysError
    ├── ConfigError          a recipe, an override or an option is wrong
    ├── DataError            a source, a table or a shard cannot be used
    │   ├── ImageDecodeError   one image cannot be used: counted, skipped, listed
    │   └── SampleError        one sample of a shard cannot be used: counted, skipped, listed
    ├── ModelError           a model is missing, unknown, altered or not the one that was meant
    ├── TrainingError        a run cannot start, go on or resume
    ├── CollectionError      a collection is missing, locked, damaged or belongs to another model
    │   ├── PruningRefusedError  more has vanished than may be pruned without confirmation
    │   └── RecallError        an index does not reach the requested recall
    ├── QueryError           a search asks for something that cannot be answered
    └── ServerError          the app cannot serve

The library raises, the command line explains: one line on stderr, exit status 1, the traceback only
with ``--debug``. A message says what happened, where, which value, what was expected and what to
do.
"""

from __future__ import annotations


class ClipsysError(Exception):
    """Root of the tree: catch this to catch every deliberate clipsys error."""


class ConfigError(ClipsysError):
    """A recipe, an override or an option is wrong."""


class DataError(ClipsysError):
    """A source, a table or a shard cannot be used."""


class ImageDecodeError(DataError):
    """One image cannot be used.

    Attributes:
        uri: where the bytes came from.
        reason: a short category, fit for counting: ``empty``, ``not an image``, ``corrupt``,
            ``truncated``, ``too large``, ``not a file`` or ``unreadable``.
    """

    def __init__(self, message: str, *, uri: str, reason: str) -> None:
        super().__init__(message)
        self.uri = uri
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        # Decode workers raise it in other processes; the default pickling would drop the keywords.
        return (_rebuild_decode_error, (str(self), self.uri, self.reason))


def _rebuild_decode_error(message: str, uri: str, reason: str) -> ImageDecodeError:
    return ImageDecodeError(message, uri=uri, reason=reason)


class SampleError(DataError):
    """One sample of a shard cannot be used.

    Attributes:
        reason: a short category, fit for counting, such as ``no image`` or ``text is not UTF-8``.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_sample_error, (str(self), self.reason))


def _rebuild_sample_error(message: str, reason: str) -> SampleError:
    return SampleError(message, reason=reason)


class ModelError(ClipsysError):
    """A model is missing, unknown, altered or not the one that was meant."""


class TrainingError(ClipsysError):
    """A run cannot start, go on or resume."""


class CollectionError(ClipsysError):
    """A collection is missing, locked, damaged or belongs to another model."""


class PruningRefusedError(CollectionError):
    """More has vanished from a source than may be pruned without confirmation."""


class RecallError(CollectionError):
    """An index does not reach the requested recall, whatever its effort."""


class QueryError(ClipsysError):
    """A search asks for something that cannot be answered."""


class ServerError(ClipsysError):
    """The app cannot serve."""
