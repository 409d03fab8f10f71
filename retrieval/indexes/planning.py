"""Which index a collection of a given size gets, and when it gets another one: pure decisions.

The thresholds come from `benchmarks/search.py`, on two cores and clustered vectors of width 512;
`docs/searching.md` has the table.

    kind         in memory, of float32   why it is there
    flat         1.00                    exact; nothing to train or to tune
    hnsw         1.13                    in no plan: six times the building, and more work for texts
    ivf-flat     1.02                    in no plan: reads four times the bytes that ivf-sq8 does
    ivf-sq8      0.26                    where there are GPUs, which have no 4-bit codes
    ivf-pq       0.08                    two bits a number, fast scan, more candidates; in memory
    ivf-rabitq   0.05                    a bit a number (Gao and Long 2024), mapped; slower

Candidates of all of them are scored again exactly.

Inverted files are written list by list and mapped, so they may exceed the memory; a search then
waits for the disk. Therefore the first kind is taken that fits into the memory as a whole, and the
smallest one where none does.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

from clipsys.errors import CollectionError
from clipsys.retrieval.storage.manifest import Kind
from clipsys.retrieval.storage.snapshot import BLOCK_ROWS

KINDS: tuple[Kind, ...] = get_args(Kind)
#: Kinds that are written list by list: their lists are arrays of codes of one size.
STREAMED_KINDS: tuple[Kind, ...] = ("ivf-flat", "ivf-sq8", "ivf-pq", "ivf-rabitq")

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
#: Vectors that the codes of compressed lists are trained with.
CODE_SAMPLE = 16_384
#: The least that is sorted by list at once before it is written.
MIN_BUFFER_BYTES = 32 * 2**20
#: Scores of vectors with centroids at once: 4,096 vectors, or fewer where these exceed 64 MB.
_SCORED_ROWS, _SCORE_BYTES = 4_096, 64 * 2**20
#: Exact search for 400 queries in pieces of 4,096 vectors: scores, and places when sorting them.
_TUNING_BYTES = 400 * 20 * 4_096
#: What malloc keeps of freed memory; measured where a process was limited to what a plan said.
_KEPT_BYTES = 48 * 2**20


@dataclass(frozen=True)
class IndexPlan:
    """An index to be built.

    Attributes:
        num_lists: of an inverted file; 0 for others.
        num_training: vectors that k-means sees; 0 where nothing is trained.
        memory_bytes: what the index takes when all of it is in memory.
        build_bytes: the least that building it takes.
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

    def buffer_bytes(self, memory_bytes: int) -> int:
        """What is left, of an allowance, for vectors that are sorted by list before writing."""
        return max(MIN_BUFFER_BYTES, memory_bytes - self.build_bytes + MIN_BUFFER_BYTES)


def plan_index(
    num_items: int,
    dim: int,
    memory_bytes: int,
    recall: float = DEFAULT_RECALL,
    *,
    on_gpus: bool = False,
    without: Collection[Kind] = (),
) -> IndexPlan:
    """Chooses the fastest kind of index that fits into the memory.

    Args:
        num_items: vectors to be indexed.
        dim: their width D.
        memory_bytes: what building and holding the index may take.
        recall: share of the true ten nearest that has to be found; 1 asks for an exact index.
        on_gpus: it is going to be searched there.
        without: kinds that were tried and did not reach the recall.

    Raises:
        CollectionError: no kind that reaches the recall fits.
    """
    if not 0 < recall <= 1:
        raise CollectionError(f"recall is {recall}; expected a share above 0 and at most 1")
    refused: list[IndexPlan] = []
    for kind, reason in _wishes(num_items, recall, on_gpus, without):
        plan = _plan(kind, num_items, dim, recall, reason)
        if max(plan.build_bytes, plan.memory_bytes) <= memory_bytes:
            return plan
        refused.append(plan)
    smallest = refused[-1]
    if smallest.kind in STREAMED_KINDS and smallest.build_bytes <= memory_bytes:
        return replace(smallest, reason="no kind fits into the memory; searched from the disk")
    least = min(reversed(refused), key=lambda plan: plan.build_bytes)
    raise CollectionError(
        f"an index of {num_items:,} vectors of width {dim} for a recall of {recall:g} takes "
        f"{least.build_bytes / 1e6:,.0f} MB to build even as {least.kind}, and "
        f"{memory_bytes / 1e6:,.0f} MB are allowed; allow more memory, or ask for less recall"
    )


def plan_of_kind(kind: Kind, num_items: int, dim: int, recall: float = DEFAULT_RECALL) -> IndexPlan:
    """A plan for a kind that the caller chose, whatever the thresholds say."""
    return _plan(kind, num_items, dim, recall, "asked for")


def _wishes(
    num_items: int, recall: float, on_gpus: bool, without: Collection[Kind]
) -> list[tuple[Kind, str]]:
    """Kinds in the order in which they are tried, each with its reason."""
    if recall == 1:
        return [("flat", "a recall of 1 was asked for")]
    if num_items <= EXACT_ITEMS:
        return [("flat", f"up to {EXACT_ITEMS:,} items exact search takes milliseconds")]
    wishes: list[tuple[Kind, str]] = [
        ("ivf-pq", "a fraction of the memory, and the fastest to scan"),
        ("ivf-rabitq", "two bits a number do not fit into the memory"),
    ]
    if on_gpus:
        wishes.insert(0, ("ivf-sq8", "the smallest kind that GPUs search"))
    elif without:
        wishes.insert(0, ("ivf-sq8", f"{', '.join(without)} did not reach the recall"))
    return [(kind, reason) for kind, reason in wishes if kind not in without]


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
    if kind in STREAMED_KINDS:
        build_bytes = _streamed_build_bytes(num_items, dim, num_lists, num_training)
        if kind == "ivf-pq":
            build_bytes += memory_bytes  # it is tuned in the order of the scan, in memory
    else:
        # A vector grows by doubling: at the worst moment the old and the new buffers exist
        # together. A quarter more was measured.
        build_bytes = math.ceil(1.25 * memory_bytes) + _block_bytes(num_items, dim)
    return IndexPlan(
        kind, num_items, dim, recall, num_lists, num_training, memory_bytes, build_bytes, reason
    )


def _streamed_build_bytes(num_items: int, dim: int, num_lists: int, num_training: int) -> int:
    """The most of k-means, filling and tuning, which come one after the other; see `building`."""
    centroids = 4 * num_lists * dim
    scores = min(_SCORE_BYTES, 4 * _SCORED_ROWS * num_lists)
    kmeans = num_training * (2 * dim + 24) + scores
    codes = 16 * min(num_training, CODE_SAMPLE) * dim  # float32, residuals, copies in FAISS
    buffer = min(MIN_BUFFER_BYTES, num_items * (4 * dim + 32))
    block = _block_bytes(num_items, dim)
    filling = 12 * num_items + scores + buffer + block  # each item's position and list
    tuning = min(_TUNING_BYTES, 8_000 * num_items) + block
    kept = min(_KEPT_BYTES, 8 * num_items * dim)
    return 4 * centroids + max(kmeans, codes, filling, tuning) + kept


def _block_bytes(num_items: int, dim: int) -> int:
    """What one block of vectors takes on its way into the index, several times over."""
    return 12 * min(num_items, BLOCK_ROWS) * dim


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
