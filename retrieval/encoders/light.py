"""Text queries without torch: when `numpy_text_tower` may run a collection's model.

``text_tower.json`` beside a collection's database says that numpy's outputs were compared with
torch's and agreed, for which files: fingerprint of the model, path, size and modification time of
weights and vocabulary. As long as all of that still holds, a text is encoded without importing
torch and without hashing the weights. The file is derived: if deleted, it is written
again by the next search that loads the model. Nothing but speed depends on it.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipsys.errors import ClipsysError
from clipsys.inference.bpe import vocabulary_path
from clipsys.inference.numpy_bert_tower import (
    TOKENIZER_NAME,
    BertShape,
    LightBertTower,
    bert_shape_of,
)
from clipsys.inference.numpy_text_tower import (
    TOLERANCE,
    LightTextTower,
    LightTower,
    TowerShape,
    shape_of,
    verify,
)
from clipsys.retrieval.storage import durable
from clipsys.retrieval.storage.manifest import EncoderPin

FILE_NAME = "text_tower.json"
#: Raised when `clipsys.inference.numpy_text_tower` changes its arithmetic: what was verified
#: before does not count.
_VERSION = 1
_WEIGHTS = "open_clip_model.safetensors"
#: A batch of more texts than this is encoded faster with torch, its start included.
MAX_TEXTS = 64

_logger = logging.getLogger(__name__)


#: Kinds of towers, by what a record calls them: the tower, and what describes one.
_KINDS: dict[str, tuple[Any, Any]] = {
    "clip": (LightTextTower, TowerShape),
    "bert": (LightBertTower, BertShape),
}


@dataclass(frozen=True)
class _Stamp:
    """A file as it was when it was verified."""

    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> _Stamp:
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def open_light(folder: Path, pin: EncoderPin) -> LightTower | None:
    """The tower in numpy, where it was verified for exactly these files; else None."""
    try:
        record = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        stamps = [_Stamp(**record[name]) for name in ("weights", "vocabulary")]
        known = (_VERSION, pin.fingerprint, pin.model)
        if (record["version"], record["fingerprint"], record["model"]) != known:
            return None
        if any(_Stamp.of(Path(stamp.path)) != stamp for stamp in stamps):
            return None
        weights, vocabulary = (Path(stamp.path) for stamp in stamps)
        make, shape = _KINDS[record.get("kind", "clip")]
        tower: LightTower = make(weights, shape(**record["shape"]), vocabulary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.debug("%s: no light text tower (%r)", folder, error)
        return None
    _logger.debug("%s: texts are encoded without torch", folder)
    return tower


def remember(folder: Path, pin: EncoderPin, encoder: Any) -> bool:
    """Compares numpy with torch for a loaded encoder, and writes down that they agree.

    Returns whether they do. An encoder that is not `clipsys.Encoder`, weights in another format, a
    tower of another kind or a folder that cannot be written to are no errors: searches then load
    the model.
    """
    loaded = sys.modules.get("clipsys.models.encoder")  # imported wherever an Encoder exists
    if loaded is None or not isinstance(encoder, loaded.Encoder):
        return False
    weights = _weights_of(pin.model)
    if weights is None:
        return False
    shape: TowerShape | BertShape | None = shape_of(encoder.model)
    kind, vocabulary = "clip", vocabulary_path()
    if shape is None:
        kind, shape = "bert", bert_shape_of(encoder.model, encoder.tokenizer)
        vocabulary = weights.with_name(TOKENIZER_NAME)
    if shape is None or vocabulary is None:
        return False
    try:
        # Taken before the comparison: whatever changes the files later also changes these.
        stamps = {"weights": _Stamp.of(weights), "vocabulary": _Stamp.of(vocabulary)}
        tower = _KINDS[kind][0](weights, shape, vocabulary)
        difference = verify(tower, encoder.model, encoder.tokenizer)
    except (OSError, ValueError, KeyError, IndexError, ClipsysError) as error:
        _logger.debug("%s: this text tower needs torch (%r)", folder, error)
        return False
    if difference is None or not difference <= TOLERANCE:
        _logger.debug("%s: this text tower needs torch (difference %s)", folder, difference)
        return False
    record = {
        "version": _VERSION,
        "fingerprint": pin.fingerprint,
        "model": pin.model,
        "kind": kind,
        "shape": asdict(shape),
        "largest_difference": difference,
        **{name: asdict(stamp) for name, stamp in stamps.items()},
    }
    try:
        text = json.dumps(record, indent=2) + "\n"
        durable.replace(folder / FILE_NAME, text.encode("utf-8"))
    except OSError as error:
        _logger.debug("%s: %s cannot be written (%s)", folder, FILE_NAME, error)
        return False
    return True


def _weights_of(model: str) -> Path | None:
    """The safetensors file of a model folder, a run folder or a downloaded model of the hub."""
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    for place in (folder / _WEIGHTS, folder / "model" / _WEIGHTS):
        if place.is_file():
            return place.absolute()
    repository = _repository_of(model)
    if repository is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, _WEIGHTS)
    # Links are resolved: the cache stores each revision under a name of its own.
    return Path(found).resolve() if isinstance(found, str) else None


def _repository_of(model: str) -> str | None:
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:")
    name, _, tag = model.partition("/")
    import open_clip

    config = open_clip.get_pretrained_cfg(name, tag) if tag else None
    repository = (config or {}).get("hf_hub", "")
    return repository.strip("/") or None
