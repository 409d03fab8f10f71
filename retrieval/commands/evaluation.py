"""What ``clipsys evaluate`` does with its options: models measured, printed and reported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from clipsys.corpora.columns import Columns
from clipsys.evaluation.cache import EmbeddingCache
from clipsys.evaluation.comparison import Comparison, compare
from clipsys.evaluation.data import DataSet, open_data
from clipsys.evaluation.measuring import Evaluation
from clipsys.evaluation.options import EvaluationOptions, Task
from clipsys.evaluation.reports.sheets import Sheet
from clipsys.evaluation.reports.tables import comparison_lines, print_lines, result_lines
from clipsys.evaluation.results import Result
from clipsys.models.encoder import load
from clipsys.printing import json_text
from clipsys.retrieval.commands.records import collection_records

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """The data as options name them."""

    data: str
    columns: Columns
    split: str | None
    limit: int | None
    label_key: str | None
    train_data: str | None
    train_split: str | None

    def open(self) -> DataSet:
        """What is measured on."""
        return self._open(self.data, self.split, self.limit)

    def open_training(self) -> DataSet | None:
        """What probes are trained on; None: part of what is measured on."""
        if self.train_data is None and self.train_split is None:
            return None
        return self._open(self.train_data or self.data, self.train_split, None)

    def _open(self, place: str, split: str | None, limit: int | None) -> DataSet:
        return open_data(
            place,
            columns=self.columns,
            split=split,
            limit=limit,
            label_key=self.label_key,
            records=collection_records(place),
        )


class Measurements:
    """Models on one data set, task by task."""

    def __init__(
        self,
        options: EvaluationOptions,
        given: Given,
        *,
        precision: str = "auto",
        cache: bool = True,
        layer: str | None = None,
    ) -> None:
        """
        Args:
            options: how to measure.
            given: the data.
            precision: of the encoders.
            cache: whether embeddings are stored.
            layer: whose feature maps are drawn; None: none.
        """
        self._options = options
        self._given = given
        self._precision = precision
        self._cache = EmbeddingCache() if cache else None
        self._layer = layer
        self.results: list[Result] = []
        #: Those of compared models, which a report shows besides.
        self._compared: list[Result] = []
        self.comparisons: list[Comparison] = []
        self.sheets: list[Sheet] = []

    @cached_property
    def _data(self) -> DataSet:
        return self._given.open()

    @cached_property
    def _training(self) -> DataSet | None:
        return self._given.open_training()

    def measure(self, models: Sequence[str], tasks: Sequence[str], *, with_sheets: bool) -> None:
        """Measures every task of every model; a model's memory is freed before the next one."""
        self._data, self._training  # noqa: B018  (faults of the data are said before a model loads)
        compared: list[list[Result]] = []
        for number, model in enumerate(models):
            evaluation = self._evaluation(model, models[:number])
            for task in tasks:
                if task == "compare":
                    compared.append(evaluation.run(self._options.on))
                elif task == "neighbours":
                    self._neighbours(evaluation)
                else:
                    results = evaluation.run(cast(Task, task))
                    self.results += results
                    if with_sheets:
                        self.sheets += evaluation.sheets(results)
        if compared:
            first, second = compared
            self.comparisons += [compare(*pair) for pair in zip(first, second, strict=True)]
            self._compared += [*first, *second]

    def show(self, *, as_json: bool) -> None:
        """Prints what was measured: tables; or JSON, a list where there are several results."""
        if as_json:
            documents = [one.document() for one in self.results]
            documents += [one.document() for one in self.comparisons]
            print(json_text(documents[0] if len(documents) == 1 else documents))
            return
        blocks = [result_lines(one) for one in self.results]
        blocks += [comparison_lines(one) for one in self.comparisons]
        for number, lines in enumerate(blocks):
            print_lines(["", *lines] if number else lines)

    def write_report(self, folder: Path) -> None:
        """Writes the report.

        Raises:
            DataError: the folder holds something else, or cannot be written.
        """
        from clipsys.evaluation.reports.writing import write_report

        page = write_report(
            folder,
            [*self.results, *self._compared],
            comparisons=self.comparisons,
            sheets=self.sheets,
        )
        _logger.info("%s", page)

    def _evaluation(self, model: str, before: Sequence[str]) -> Evaluation:
        encoder = load(model, precision=self._precision)
        if any(encoder.name == Path(one).name for one in before):
            encoder.name = model  # two run folders may have models of one name
        return Evaluation(
            encoder, self._data, self._options, train_data=self._training, cache=self._cache
        )

    def _neighbours(self, evaluation: Evaluation) -> None:
        result, sheets = evaluation.neighbours(layer=self._layer)
        self.results.append(result)
        self.sheets += sheets
