"""The ledger of samples that could not be used: RUN/skipped.jsonl, counts by reason, the limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clipsys.errors import TrainingError
from clipsys.training.data.samples import Skipped
from clipsys.training.json_lines import format_line, read_lines, rewrite

SKIPPED_NAME = "skipped.jsonl"


class SkipLedger:
    """Counts on every rank alike; only one rank writes."""

    def __init__(self, run: Path, *, max_share: float, epoch_samples: int, writes: bool) -> None:
        """
        Args:
            run: the run folder.
            max_share: largest share of the samples seen, or of one epoch's while fewer were seen.
            epoch_samples: samples of an epoch.
            writes: whether this rank writes the list.
        """
        self._path = run / SKIPPED_NAME
        self._max_share, self._epoch_samples = max_share, epoch_samples
        self._writes = writes
        self.reasons: Counter[str] = Counter()

    def add(self, skipped: Sequence[Skipped], *, step: int, seen: int) -> None:
        """Lists and counts samples that were skipped in a step.

        Args:
            skipped: skipped samples of all ranks.
            step: the number of steps done, this one included.
            seen: samples seen so far, by all ranks.

        Raises:
            TrainingError: more than the allowed share of samples could not be used.
        """
        self.note(skipped, step=step)
        if self.reasons.total() > max(1.0, self._max_share * max(seen, self._epoch_samples)):
            last = skipped[-1]
            raise TrainingError(
                f"{self.reasons.total()} samples could not be used, more than data.max_bad_share = "
                f"{self._max_share:.1%}; the last: {last.shard}#{last.key}: {last.reason}; "
                f"all are in {self._path}"
            )

    def note(self, skipped: Sequence[Skipped], *, step: int) -> None:
        """Lists and counts, without looking at the limit."""
        self.reasons.update(one.reason for one in skipped)
        if self._writes and skipped:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                for one in skipped:
                    file.write(format_line({"step": step, **vars(one)}))

    def resume(self, step: int, reasons: dict[str, int]) -> None:
        """Goes back to what a checkpoint knew: later lines belong to steps that are done again."""
        self.reasons = Counter(reasons)
        if self._writes and self._path.is_file():
            kept = [entry for entry in read_lines(self._path) if entry["step"] <= step]
            rewrite(self._path, kept)

    def summary(self) -> str | None:
        """What was skipped and why, in one line; None if nothing was."""
        if not self.reasons:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        count = self.reasons.total()
        noun = "sample" if count == 1 else "samples"
        return f"{count} {noun} could not be used; see {self._path} ({reasons})"
