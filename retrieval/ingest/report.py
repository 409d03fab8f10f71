"""What became of the records that a collection was given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from clipsys.retrieval.storage.items import Failure


@dataclass
class AddReport:
    """What became of each record.

    Attributes:
        added: new items that were encoded.
        changed: known items whose image changed; encoded again under a new id.
        reused: new items whose vector was already there (a copied file).
        moved: items whose file was moved; they keep their ids.
        updated: known items with other captions, metadata or file times; not encoded.
        filled: items whose captions or metadata a second source of the run added to.
        unchanged: known items as they were; not even read, where the source tells size and time.
        failed: records that could not be used, now in the failure ledger.
        known_failures: records that failed before and have not changed; not tried again.
        doubles: items that were removed because another had the same file under another path.
        pruned: items that were removed because no source gives them any more.
        reasons: `failed` by category.
        first_failures: a few of them, to show.
        seconds: how long it took.
    """

    added: int = 0
    changed: int = 0
    reused: int = 0
    moved: int = 0
    updated: int = 0
    filled: int = 0
    unchanged: int = 0
    failed: int = 0
    known_failures: int = 0
    doubles: int = 0
    pruned: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Records seen."""
        tallies = (self.added, self.changed, self.reused, self.moved, self.updated, self.unchanged)
        return sum(tallies) + self.failed + self.known_failures

    def summary(self) -> str:
        """One line for people: ``120 added, 3 failed (2 corrupt, 1 empty), 512 unchanged``."""
        words = {
            "added": self.added,
            "changed": self.changed,
            "moved": self.moved,
            "copied": self.reused,
            "updated": self.updated,
            "updated by a second source": self.filled,
            "unchanged": self.unchanged,
            "pruned": self.pruned,
            "doubles of one file removed": self.doubles,
        }
        parts = [f"{count:,} {word}" for word, count in words.items() if count]
        if self.failed:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.most_common())
            parts.append(f"{self.failed:,} failed ({reasons})")
        if self.known_failures:
            parts.append(f"{self.known_failures:,} failed before and not changed since")
        return ", ".join(parts) or "nothing to do"
