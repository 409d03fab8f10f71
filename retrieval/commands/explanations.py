"""Pictures of which parts of images speak for their labels: ``clipsys classify --explain``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipsys.corpora.records import Record
from clipsys.errors import DataError
from clipsys.images.decoding import decode_image

if TYPE_CHECKING:
    from clipsys.models.encoder import Encoder
    from clipsys.zeroshot.classifier import ZeroShotClassifier


class Drawings:
    """Draws images, each into a file of its name.

    Args:
        place: a file that ends with ``.png``, for one image; else a folder, made if it is missing.
        encoder: made the decisions.
        classifier: its classes are what is explained.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, place: Path, encoder: Encoder, classifier: ZeroShotClassifier) -> None:
        self._place = place.expanduser()
        self._encoder = encoder
        self._classifier = classifier
        self._names = Counter[str]()
        self._is_file = place.suffix.lower() == ".png"
        folder = self._place.parent if self._is_file else self._place
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: the folder cannot be made ({error.strerror})") from error

    def draw(self, records: Sequence[Record], labels: Sequence[str]) -> None:
        """Draws some images for their labels; those of no class for the class nearest to them.

        Raises:
            DataError: a picture cannot be written.
        """
        from clipsys.zeroshot.explain import explain, explain_class

        classes, class_CD = self._classifier.classes, self._classifier.class_CD
        for record, given in zip(records, labels, strict=True):
            picture, label = decode_image(record.read(), uri=record.uri), given
            if given not in classes:  # of no class
                scores_C = class_CD @ self._encoder.encode_image([picture])[0]
                label = classes[int(scores_C.argmax())]
            if len(classes) == 1:
                found = explain(self._encoder, picture, class_CD[0])
            else:
                found = explain_class(self._encoder, picture, label, classes, class_CD)
            found.save(self._path_of(record))

    def _path_of(self, record: Record) -> Path:
        if self._is_file:
            return self._place
        stem = Path(record.uri.rpartition("#")[2]).stem
        self._names[stem] += 1
        number = self._names[stem]
        return self._place / f"{stem}{'' if number == 1 else f'-{number}'}.png"
