"""Contrastive losses over all ranks, exact in value and gradient.

    tiles               which rows and columns of the logits are computed at once
    tiled               cross-entropy and sigmoid losses a tile at a time
    triton_kernels      the same in Triton kernels
    fused               the autograd function around those kernels
    contrastive         `info_nce` and `sigmoid_loss`, between images and texts
    reweighted          `hard_info_nce` and `hard_nt_xent`, which weight negatives by hardness
    extra_texts         `neg_clip`, with texts that no image belongs to
    two_views           `nt_xent`, between two views of each image
    key_queue           `moco`, against a queue, and the queue
    redundancy          `barlow_twins` and `vicreg`, between the features of two views
    momentum_keys       `moco_v3`, against momentum keys of the batch
    memory_bank         `bank_softmax` and `bank_nce`, against a bank of all samples, and the bank
    queued_pairs        `queued_info_nce`, between images and texts of the batch and of queues
    supervised          `supcon`, between all rows of a label
    classified          `scl`, cross-entropy of a classifier with `supcon`
    leave_one_out       `looc`, the same in several spaces
    predictive          `cpc`, between predicted and true features
    distances           means over the distances of all rows
    metric              `triplet` and `margin_contrastive`, of distances with a margin
    n_pairs             `n_pair`, of products that are not normalised
    noise_contrastive   `info_nce_views`, `nce` and `logistic`, between two views in one direction
    distilled           `distilled_pairs`, images and texts with those of a teacher
    swapped_codes       `swav`, between scores and codes of views

Use the names of this package; its modules are internal.
"""

from clipsys.training.losses.classified import scl
from clipsys.training.losses.contrastive import auto_tile_size, info_nce, sigmoid_loss
from clipsys.training.losses.distilled import (
    DistillationWeights,
    Pairs,
    distilled_pairs,
    feature_distance,
    interactive_contrast,
    relational_divergence,
)
from clipsys.training.losses.extra_texts import neg_clip
from clipsys.training.losses.key_queue import enqueued, moco
from clipsys.training.losses.leave_one_out import looc
from clipsys.training.losses.memory_bank import (
    bank_log_normaliser,
    bank_nce,
    bank_softmax,
    bank_updated,
)
from clipsys.training.losses.metric import margin_contrastive, triplet
from clipsys.training.losses.momentum_keys import moco_v3
from clipsys.training.losses.n_pairs import n_pair
from clipsys.training.losses.noise_contrastive import info_nce_views, logistic, nce
from clipsys.training.losses.predictive import cpc
from clipsys.training.losses.queued_pairs import PairKeys, PairQueue, queued_info_nce
from clipsys.training.losses.redundancy import barlow_twins, vicreg
from clipsys.training.losses.reweighted import hard_info_nce, hard_nt_xent
from clipsys.training.losses.supervised import supcon
from clipsys.training.losses.swapped_codes import swav
from clipsys.training.losses.two_views import nt_xent

__all__ = [
    "DistillationWeights",
    "PairKeys",
    "PairQueue",
    "Pairs",
    "auto_tile_size",
    "bank_log_normaliser",
    "bank_nce",
    "bank_softmax",
    "bank_updated",
    "barlow_twins",
    "cpc",
    "distilled_pairs",
    "enqueued",
    "feature_distance",
    "hard_info_nce",
    "hard_nt_xent",
    "info_nce",
    "info_nce_views",
    "interactive_contrast",
    "logistic",
    "looc",
    "margin_contrastive",
    "moco",
    "moco_v3",
    "n_pair",
    "nce",
    "neg_clip",
    "nt_xent",
    "queued_info_nce",
    "relational_divergence",
    "scl",
    "sigmoid_loss",
    "supcon",
    "swav",
    "triplet",
    "vicreg",
]
