"""Which index a collection of a given size gets, and when it gets another one: pure decisions.

The thresholds come from `benchmarks/search.py`, on two cores and clustered vectors of width 512;
`docs/searching.md` has the table.

    kind         in memory, of float32   why it is there
    flat         1.00                    exact; nothing to train or to tune
    hnsw         1.13                    in no plan: six times the building, and more work for texts
    ivf-flat     1.02                    in no plan: reads four times the bytes that ivf-sq8 does
    ivf-sq8      0.26                    where ivf-pq is not; scans five times as long
    ivf-pq       0.08                    two bits a number, fast scan, more candidates; in memory
    ivf-rabitq   0.05                    a bit a number (Gao and Long 2024), mapped; slower

Candidates of all of them are scored again exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from clipsys.errors import CollectionError

Kind = Literal["flat", "hnsw", "ivf-flat", "ivf-sq8", "ivf-pq", "ivf-rabitq"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Recall@10 against exact search that an index must reach unless another is asked for.
DEFAULT_RECALL = 0.98
#: Up to this many items comparing every vector takes a few milliseconds.
EXACT_ITEMS = 20_000
#: Links of an HNSW node at its lowest layer are twice this.
HNSW_LINKS = 32
#: Vectors that k-means sees for each list.
TRAINING_PER_LIST = 32
_ID_BYTES = 8
#: RaBitQ stores two float32 factors beside a vector's bits.
_RABITQ_FACTOR_BYTES = 8
#: What one block of vectors takes on its way into the index, several times over.
_WORKING_BYTES = 128 * 2**20


@dataclass(frozen=True)
class IndexPlan:
    """An index to be built.

    Attributes:
        num_lists: of an inverted file; 0 for others.
        num_training: vectors that k-means sees; 0 where nothing is trained.
        memory_bytes: what the index takes when it is loaded.
        build_bytes: the most that building it takes.
        reason: why this kind, in words.
    """

    kind: Kind
    num_items: int
    dim: int
    recall: float
    num_lists: int
    num_training: int
    memory_bytes: int
    build_bytes: int
    reason: str

    def __str__(self) -> str:
        lists = f", {self.num_lists:,} lists" if self.num_lists else ""
        return (
            f"{self.kind}{lists} for {self.num_items:,} x {self.dim}, about "
            f"{self.memory_bytes / 1e6:,.0f} MB ({self.build_bytes / 1e6:,.0f} MB while being "
            f"built): {self.reason}"
        )

    @property
    def is_exact(self) -> bool:
        """Whether the index finds the true nearest without being tuned."""
        return self.kind == "flat"


def plan_index(
    num_items: int, dim: int, memory_bytes: int, recall: float = DEFAULT_RECALL
) -> IndexPlan:
    """Chooses the fastest kind of index that fits into the memory.

    Args:
        num_items: vectors to be indexed.
        dim: their width D.
        memory_bytes: what building and holding the index may take.
        recall: share of the true ten nearest that has to be found; 1 asks for an exact index.

    Raises:
        CollectionError: no kind that reaches the recall fits.
    """
    if not 0 < recall <= 1:
        raise CollectionError(f"recall is {recall}; expected a share above 0 and at most 1")
    refused: list[IndexPlan] = []
    for kind, reason in _wishes(num_items, recall):
        plan = _plan(kind, num_items, dim, recall, reason)
        if plan.build_bytes <= memory_bytes:
            return plan
        refused.append(plan)
    least = min(refused, key=lambda plan: plan.build_bytes)
    raise CollectionError(
        f"an index of {num_items:,} vectors of width {dim} for a recall of {recall:g} takes "
        f"{least.build_bytes / 1e6:,.0f} MB to build even as {least.kind}, and "
        f"{memory_bytes / 1e6:,.0f} MB are allowed; allow more memory, or ask for less recall"
    )


def plan_of_kind(kind: Kind, num_items: int, dim: int, recall: float = DEFAULT_RECALL) -> IndexPlan:
    """A plan for a kind that somebody asked for, whatever the thresholds say."""
    return _plan(kind, num_items, dim, recall, "asked for")


def _wishes(num_items: int, recall: float) -> list[tuple[Kind, str]]:
    """Kinds in the order in which they are tried, each with its reason."""
    if recall == 1:
        return [("flat", "a recall of 1 was asked for")]
    if num_items <= EXACT_ITEMS:
        return [("flat", f"up to {EXACT_ITEMS:,} items exact search takes milliseconds")]
    return [
        ("ivf-pq", "a fraction of the memory, and the fastest to scan"),
        ("ivf-rabitq", "two bits a number do not fit into the memory"),
    ]


def _plan(kind: Kind, num_items: int, dim: int, recall: float, reason: str) -> IndexPlan:
    num_lists = num_lists_for(num_items) if kind.startswith("ivf") else 0
    num_training = min(num_items, TRAINING_PER_LIST * num_lists)
    bytes_each = {
        "flat": 4 * dim,
        "hnsw": 4 * dim + 2 * HNSW_LINKS * 4,
        "ivf-flat": 4 * dim,
        "ivf-sq8": dim,
        "ivf-pq": _pq_bytes(dim),
        "ivf-rabitq": math.ceil(dim / 8) + _RABITQ_FACTOR_BYTES,
    }[kind] + _ID_BYTES
    memory_bytes = num_items * bytes_each + num_lists * dim * 4
    if kind == "ivf-pq":
        # Blocks of 32 codes are half empty at a list's end, and centroids are kept twice.
        memory_bytes += num_lists * (16 * _pq_bytes(dim) + dim * 4)
    # Lists grow by doubling: at the worst moment the old and the new buffers exist together, but
    # not of all lists at once. A quarter more was measured; k-means is over by then.
    growing = math.ceil((2.25 if kind == "ivf-pq" else 1.25) * memory_bytes)  # pq: in two orders
    training = 8 * num_training * dim  # the sample, and the same sorted by list
    build_bytes = max(growing, training) + min(_WORKING_BYTES, 8 * num_items * dim)
    return IndexPlan(
        kind, num_items, dim, recall, num_lists, num_training, memory_bytes, build_bytes, reason
    )


def _pq_bytes(dim: int) -> int:
    """Four bits for two numbers, or for each where their number is odd."""
    return math.ceil(dim / 4 if dim % 2 == 0 else dim / 2)


def num_lists_for(num_items: int) -> int:
    """Lists of an inverted file: 4 sqrt(N). With half as many twice the vectors are scanned."""
    return max(1, min(round(4 * math.sqrt(num_items)), num_items // TRAINING_PER_LIST))


Upkeep = Literal["keep", "extend", "build"]


def plan_upkeep(
    kind: Kind,
    *,
    num_trained: int,
    num_covered: int,
    num_new: int,
    num_gone: int,
    at_once: bool = False,
) -> Upkeep:
    """What becomes of an index when items were added and removed.

    What an index does not cover is compared exactly beside it, so up to a point nothing needs to
    be done. After that new vectors are sorted into the lists that exist; these fit until the
    collection has doubled.

    Args:
        kind: of the index.
        num_trained: items that it was made for.
        num_covered: vectors in it, of live items and of deleted ones.
        num_new: live items that are not in it.
        num_gone: deleted items that are in it.
        at_once: a single one of either is enough.
    """
    if num_new + num_gone < (1 if at_once else max(1_000, num_covered // 100)):
        return "keep"
    num_live = num_covered + num_new - num_gone
    trained = kind.startswith("ivf")
    if not trained or num_gone > num_covered // 5 or num_live > 2 * num_trained:
        return "build"
    return "extend"
