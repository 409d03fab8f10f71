"""The list of hard negatives of a run: when it is mined anew, where it lies, how it is resumed.

RUN/mining/step-00001200/     the list in use, mined when so many steps were done
CHECKPOINT/mined/             the list that training goes on with after that checkpoint

Rank 0 searches and writes; every rank, and every decoding process, maps the one list into memory.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Generator
from pathlib import Path

from clipsys.errors import TrainingError
from clipsys.files.links import link_or_copy
from clipsys.images.preprocessing import Preprocessing
from clipsys.training.data.batches import TrainingBatches
from clipsys.training.data.further_texts import MinedList, MinedNegatives, write_mined_list
from clipsys.training.data.loader import load_batches
from clipsys.training.data.samples import Batch
from clipsys.training.distributed.agreement import on_every_rank, require_equal
from clipsys.training.distributed.collectives import on_first_rank, rank, world_size
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.mining.config import MiningConfig
from clipsys.training.mining.encoding import encode_samples
from clipsys.training.mining.search import hard_negatives

_logger = logging.getLogger(__name__)

FOLDER = "mining"
#: The list's folder in a checkpoint.
ATTACHED = "mined"
#: A share of samples without a negative that is said to be large.
_MANY = 0.5


class Miner:
    """Mines a run's list, and makes the batches that use it."""

    def __init__(
        self,
        settings: MiningConfig,
        source: TrainingBatches,
        preprocessing: Preprocessing,
        *,
        run: Path,
        num_negatives: int,
        steps_per_epoch: int,
        epochs: int,
        num_samples: int,
        width: int,
        batch_size: int,
        workers: int,
        timeout_s: float,
    ) -> None:
        """
        Args:
            settings: the recipe's.
            source: batches of the whole run, without mined texts.
            preprocessing: what the image tower sees.
            run: the run folder.
            num_negatives: texts drawn of each sample.
            steps_per_epoch: steps of each epoch.
            epochs: epochs of the run.
            num_samples: of the training data.
            width: of the vectors.
            batch_size: samples encoded at once on each rank.
            workers: decoding processes of each rank.
            timeout_s: longest wait for a batch.
        """
        self._settings, self._source, self._preprocessing = settings, source, preprocessing
        self._folder, self._num_negatives = run / FOLDER, num_negatives
        self._steps_per_epoch, self._epochs = steps_per_epoch, epochs
        self._num_samples, self._width, self._batch_size = num_samples, width, batch_size
        self._workers, self._timeout_s = workers, timeout_s
        self._mined: MinedList | None = None

    @property
    def mined(self) -> MinedList | None:
        """The list in use; None before the first."""
        return self._mined

    def is_due(self, step: int) -> bool:
        """Whether a list is to be mined before a step (0-based), and has not been."""
        epoch, inside = divmod(step, self._steps_per_epoch)
        since = epoch - self._settings.start_epoch
        if inside or since < 0 or epoch >= self._epochs:
            return False
        is_refresh = since % self._settings.refresh_epochs == 0
        return is_refresh and (self._mined is None or self._mined.step != step)

    def _next_refresh(self, step: int) -> int:
        """The epoch before which a list is mined next."""
        since = step // self._steps_per_epoch - self._settings.start_epoch
        if since < 0:
            return self._settings.start_epoch
        period = self._settings.refresh_epochs
        return self._settings.start_epoch + (since // period + 1) * period

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """This rank's micro-batches from a step on, to the next refresh."""
        further = MinedNegatives(self._mined, self._num_negatives)
        last = min(self._epochs, self._next_refresh(step))
        dataset = self._source.between(step, last, further)
        return load_batches(dataset, self._workers, timeout_s=self._timeout_s)

    def mine(self, engine: Engine, step: int) -> dict[str, float]:
        """Mines the list that is used from a step on. Every rank calls it.

        Returns:
            What was found, as `Mined.figures` has it.
        """
        share = self._source.shares(step, self._batch_size, rank(), world_size())
        encoded = encode_samples(
            engine,
            load_batches(share, self._workers, timeout_s=self._timeout_s),
            self._preprocessing,
            num_samples=self._num_samples,
            width=self._width,
        )
        target = self._folder / _name(step)

        def search() -> dict[str, float]:
            found = hard_negatives(*encoded[:4], self._settings)
            write_mined_list(
                target,
                step=step,
                candidates_NH=found.candidates_NH,
                groups_N=encoded.groups_N,
                texts=encoded.texts,
            )
            return found.figures

        figures = on_first_rank(search)
        self._use(target)
        listed = ", ".join(f"{name} {value:.1%}" for name, value in figures.items())
        if rank() == 0:
            _logger.info("mined hard negatives before step %d: %s", step, listed)
            if figures["without"] > _MANY:
                _logger.warning(
                    "%.0f%% of the samples have no mined negative: their own texts are not among "
                    "the %d nearest, or all others are too similar; raise objective.mining.depth, "
                    "or begin later (start_epoch)",
                    *(100 * figures["without"], self._settings.depth),
                )
        return figures

    def resume(self, checkpoint: Path, step: int) -> None:
        """Goes on with the list of a checkpoint. Every rank calls it.

        Raises:
            TrainingError: it has none, and should have.
        """
        attached = checkpoint / ATTACHED
        if not on_first_rank(attached.is_dir):
            if step // self._steps_per_epoch >= self._settings.start_epoch and not self.is_due(
                step
            ):
                raise TrainingError(
                    f"{checkpoint}: has no list of mined texts ({ATTACHED}/), which the run used; "
                    "put it back, or resume from another checkpoint"
                )
            return
        target = self._folder / _name(on_first_rank(lambda: MinedList(attached).step))
        on_first_rank(lambda: _link_folder(attached, target))
        self._use(target)

    def _use(self, folder: Path) -> None:
        mined = on_every_rank(lambda: MinedList(folder))
        require_equal(
            {"a list of mined texts with the fingerprint": mined.fingerprint()},
            remedy="put the run folder on storage that every machine sees alike",
        )
        self._mined = mined
        on_first_rank(lambda: _forget_others(folder))

    def attachments(self) -> dict[str, Path]:
        """What a checkpoint must hold: files by their path in it."""
        if self._mined is None:
            return {}
        folder = self._mined.folder
        return {f"{ATTACHED}/{path.name}": path for path in sorted(folder.iterdir())}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _link_folder(source: Path, target: Path) -> None:
    """The same files under another name; on a drive without links, copies."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=link_or_copy)


def _forget_others(folder: Path) -> None:
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
