"""From a model and a data set to results: what `clipsys evaluate` does.

    model --load-------> Encoder --.
                                    |-- encoding, through the cache --> EmbeddedImages
    data --open_data---> DataSet --'                |
                                                    |--> zeroshot ---.
                                                    |--> retrieval   |--> Results
                                                    |--> probe ------'
                                                    '--> robustness: one of them, corrupted

An image is encoded once, whatever the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipsys.corpora.columns import Columns
from clipsys.corpora.records import Record
from clipsys.corpora.sources import read_uri
from clipsys.errors import ConfigError
from clipsys.evaluation.cache import EmbeddingCache
from clipsys.evaluation.class_prompts import class_question
from clipsys.evaluation.corruptions import Corruption
from clipsys.evaluation.data import DataSet, open_data
from clipsys.evaluation.embedded import EmbeddedImages
from clipsys.evaluation.encoding import encode_images, encode_texts
from clipsys.evaluation.feature_maps import feature_maps
from clipsys.evaluation.options import EvaluationOptions, Task
from clipsys.evaluation.reports.mistakes import mistake_sheets, neighbour_sheet
from clipsys.evaluation.reports.sheets import Sheet, Tile
from clipsys.evaluation.results import Result
from clipsys.evaluation.tasks.few_shot import few_shot_result
from clipsys.evaluation.tasks.neighbours import (
    nearest_neighbours,
    neighbours_result,
    spread_queries,
)
from clipsys.evaluation.tasks.probes import Probe, ProbeSettings, probe_result, train_and_test
from clipsys.evaluation.tasks.retrieval import (
    RetrievalTargets,
    retrieval_result,
    retrieval_targets,
)
from clipsys.evaluation.tasks.robustness import label_noise_result, robustness_result
from clipsys.evaluation.tasks.splitting import LabelledVectors, labelled_vectors
from clipsys.evaluation.tasks.zeroshot import zeroshot_result
from clipsys.images.decoding import decode_image
from clipsys.models.encoder import Encoder, load
from clipsys.progress import progress
from clipsys.zeroshot.deciding import Temperature, probabilities


class Evaluation:
    """A model on a data set: what several tasks need is computed once."""

    def __init__(
        self,
        encoder: Encoder,
        data: DataSet,
        options: EvaluationOptions = EvaluationOptions(),
        *,
        train_data: DataSet | None = None,
        cache: EmbeddingCache | None = None,
    ) -> None:
        """
        Args:
            encoder: the model.
            data: labelled or captioned images.
            options: how to measure.
            train_data: what a probe is trained on; None: a part of ``data``.
            cache: of embeddings; None: nothing is stored for later evaluations.
        """
        self.encoder = encoder
        self.data = data
        self._options = options
        self._train_data = train_data
        self._cache = cache

    @cached_property
    def images(self) -> EmbeddedImages:
        """The images of the data set with their vectors."""
        return self._encode(self.data)

    def run(self, task: Task) -> list[Result]:
        """Measures a task: one result, or one for each probe and curve.

        Raises:
            DataError: the data cannot be read, or lack captions or labels.
            ConfigError: an option does not fit.
        """
        if task == "probe":
            found = self.probes()
        elif task == "robustness":
            found = [self.robustness()]
        else:
            found = [self.zeroshot() if task == "zeroshot" else self.retrieval()]
        return [replace(one, encoder=self._described()) for one in found]

    def zeroshot(self) -> Result:
        """Zero-shot classification of the labelled images."""
        return self._zeroshot_of(self.images)

    def retrieval(self) -> Result:
        """Retrieval of the captioned images, in both directions."""
        return self._retrieval_of(self.images)

    def probes(self) -> list[Result]:
        """Each probe, and its few-shot and label-noise curves where they are set."""
        options, results = self._options, []
        names = {"model": self.encoder.name, "data": self.data.name}
        train, test = self._labelled
        for kind in options.probes:
            settings = ProbeSettings(kind)
            results.append(probe_result(train, test, settings, **names))
            if options.shots:
                results.append(
                    few_shot_result(
                        train, test, settings, shots=options.shots, seeds=options.seeds, **names
                    )
                )
            if options.label_noise:
                results.append(
                    label_noise_result(train, test, settings, shares=options.label_noise, **names)
                )
        return results

    def robustness(self) -> Result:
        """A task on corrupted images, beside the same on clean ones."""
        options = self._options
        clean = self.images
        if options.on == "probe":
            return robustness_result(
                self._corrupted_probe(), options.corruptions, options.severities
            )

        def measure(corruption: Corruption | None) -> Result:
            images = (
                clean if corruption is None else self._encode(_of(clean, self.data), corruption)
            )
            task = self._zeroshot_of if options.on == "zeroshot" else self._retrieval_of
            return task(images)

        return robustness_result(measure, options.corruptions, options.severities)

    def neighbours(self, *, layer: str | None = None) -> tuple[Result, list[Sheet]]:
        """Nearest neighbours of the images, with contact sheets.

        Args:
            layer: whose feature maps are drawn of some images, or ``auto``, the last one with 7 x 7
                places; None: none.

        Raises:
            ConfigError: there is no such layer.
        """
        images = self.images
        found = nearest_neighbours(images)
        names = {"model": self.encoder.name, "data": self.data.name}
        sheet = neighbour_sheet(images, found, model=self.encoder.name, read=self._read)
        sheets = [sheet]
        if layer is not None:
            sheets.append(self._feature_maps(layer))
        result = neighbours_result(images, found, **names)
        return replace(result, encoder=self._described()), sheets

    def sheets(self, results: Sequence[Result]) -> list[Sheet]:
        """Contact sheets of what some results got most wrong."""
        return [sheet for one in results for sheet in mistake_sheets(one, self._read)]

    def _feature_maps(self, layer: str) -> Sheet:
        rows = []
        for place in spread_queries(self.images, 4):
            record = self.images.records[place]
            picture = decode_image(record.read(), uri=record.uri)
            maps = feature_maps(self.encoder, picture, None if layer == "auto" else layer)
            rows.append([Tile((record.uri,), image=maps)])
        note = "All channels as colours, and those that vary most; one image a row."
        return Sheet(f"Feature maps, {self.encoder.name}", note, rows, self._read)

    def _read(self, uri: str) -> bytes:
        record = self._record_of.get(uri)
        return read_uri(uri) if record is None else record.read()

    @cached_property
    def _record_of(self) -> dict[str, Record]:
        return {record.uri: record for record in self.images.records}

    @cached_property
    def _labelled(self) -> tuple[LabelledVectors, LabelledVectors | None]:
        """What probes are trained and tested on; None: a part of the first."""
        images = self._vectors_of(self.images)
        if self._train_data is None:
            return images, None
        train = self._encode(self._train_data)
        labels = train.labels(self._train_data.name)
        return labelled_vectors(train, labels, match=self._options.match), images

    def _corrupted_probe(self) -> Callable[[Corruption | None], Result]:
        """A probe trained once, on clean images, and tested on corrupted ones."""
        train, test, described = train_and_test(*self._labelled, seed=0, name=self.data.name)
        kept = set(test.uris)
        records = [one for one in self.images.records if one.uri in kept]
        probe = Probe(
            train,
            ProbeSettings(self._options.probes[0]),
            model=self.encoder.name,
            data=self.data.name,
            described=described,
        )

        def measure(corruption: Corruption | None) -> Result:
            if corruption is None:
                return probe(test)
            return probe(self._vectors_of(self._encode(_of(records, self.data), corruption)))

        return measure

    def _vectors_of(self, images: EmbeddedImages) -> LabelledVectors:
        labels = images.labels(self.data.name)
        return labelled_vectors(images, labels, match=self._options.match)

    def _described(self) -> dict[str, str]:
        """What made the vectors; known once images are encoded."""
        return {
            "fingerprint": self.encoder.fingerprint,
            "precision": self.encoder.precision,
            "device": self.encoder.device.type,
            "decode": self._options.decode,
        }

    def _encode(self, data: DataSet, corruption: Corruption | None = None) -> EmbeddedImages:
        return encode_images(
            self.encoder,
            data,
            cache=self._cache,
            corruption=corruption,
            num_processes=self._options.num_processes,
            decode=self._options.decode,
        )

    def _zeroshot_of(self, images: EmbeddedImages) -> Result:
        options = self._options
        question, labels = class_question(
            images.labels(self.data.name),
            self.data.places,
            known=self.data.class_names,
            classnames=options.classnames,
            templates=options.templates,
        )
        if len(question.labels) < 2:
            raise ConfigError(
                f"{self.data.name}: all images are of one class, {question.names[0]!r}; "
                "zero-shot classification needs two or more"
            )
        texts = encode_texts(self.encoder, question.prompts, cache=self._cache)
        temperature = Temperature(self.encoder.logit_scale, self.encoder.logit_bias)
        _, units_N = np.unique(np.array(images.contents), return_inverse=True)
        number = len(question.templates)
        return zeroshot_result(
            images.vectors_ND,
            question.vectors(texts),
            question.labels,
            labels,
            uris=[record.uri for record in images.records],
            names=question.names,
            units_N=units_N,
            probabilities=lambda scores_NC: probabilities(scores_NC, None, temperature)[0],
            model=self.encoder.name,
            data=self.data.name,
            prompts=repr(question.templates[0]) if number == 1 else f"{number} templates",
        )

    def _retrieval_of(self, images: EmbeddedImages) -> Result:
        targets = self._targets(images)
        texts = encode_texts(self.encoder, targets.texts, cache=self._cache)
        total = len(images) + len(targets.texts)
        with progress("Ranking", total, unit="queries") as advance:
            return retrieval_result(
                images.vectors_ND,
                texts,
                targets,
                uris=[record.uri for record in images.records],
                model=self.encoder.name,
                data=self.data.name,
                advance=advance,
            )

    def _targets(self, images: EmbeddedImages) -> RetrievalTargets:
        return retrieval_targets(
            ((record.captions, record.metadata) for record in images.records),
            contents=images.contents,
            captions=self._options.captions,
            match=self._options.match,
            duplicates=self._options.duplicates,
        )


def evaluate(
    model: str | Path | Encoder,
    task: Task,
    data: str | Path,
    *,
    columns: Columns = Columns(),
    split: str | None = None,
    limit: int | None = None,
    label_key: str | None = None,
    records: Iterable[Record] | None = None,
    train_data: str | Path | None = None,
    train_split: str | None = None,
    cache: bool = True,
    **options: Any,
) -> list[Result]:
    """Measures a model on a data set.

    Args:
        model: what `clipsys.load` takes, or an encoder.
        task: ``zeroshot`` or ``probe`` (labelled images), ``retrieval`` (captioned images), or
            ``robustness`` (one of these, named with ``on``, on corrupted images).
        data: a folder, a table, shards, or Hugging Face's Parquet.
        columns, split, limit, label_key, records: see `clipsys.evaluation.data.open_data`.
        train_data, train_split: probe: what it is trained on; default a part of ``data``.
        cache: whether embeddings are stored for later evaluations.
        options: attributes of `EvaluationOptions`.

    Returns:
        One result; of ``probe`` one for each probe and curve.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: the data cannot be read, or have no captions or labels.
        ConfigError: an option does not fit.
    """
    opened = open_data(
        data, columns=columns, split=split, limit=limit, label_key=label_key, records=records
    )
    train = None
    if train_data is not None or train_split is not None:
        place = train_data if train_data is not None else data
        train = open_data(place, columns=columns, split=train_split, label_key=label_key)
    encoder = model if isinstance(model, Encoder) else load(model)
    stored = EmbeddingCache() if cache else None
    chosen = EvaluationOptions(**options)
    return Evaluation(encoder, opened, chosen, train_data=train, cache=stored).run(task)


def _of(images: EmbeddedImages | Sequence[Record], data: DataSet) -> DataSet:
    """The data set that has these images alone."""
    records = images.records if isinstance(images, EmbeddedImages) else images
    return replace(data, _open=lambda: records)
