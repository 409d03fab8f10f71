"""Losses that pull the images and texts of a student to those of a teacher: CLIP-KD.

Each rank brings its own rows of both and gets its share, as with `info_nce`. The teacher's vectors
are constants. What all terms need of the other ranks is gathered in one collective for each model.

Shapes: B rows of this rank, N = W·B rows of all W ranks, D width of the student, E width of the
teacher, T rows of a tile.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, world_size
from clipsys.training.losses.contrastive import (
    auto_tile_size,
    both_ways,
    check_pairs,
    cross_entropy,
    pairing_of,
)
from clipsys.training.losses.tiled import Gradients, differentiable, scaled_gradients
from clipsys.training.losses.tiles import Pairing


class Pairs(NamedTuple):
    """Unit vectors of images and of their texts, row for row."""

    image: torch.Tensor
    text: torch.Tensor


class DistillationWeights(NamedTuple):
    """Weight of each term; 0 leaves it out. The defaults are those of the released code.

    Attributes:
        contrastive: InfoNCE of the student's images and texts.
        feature: squared distance of the student's vectors from the teacher's (FD).
        relational: divergence of the student's distributions over the batch from the teacher's
            (CRD).
        interactive: InfoNCE of the student's images with the teacher's texts, and the reverse
            (ICL).
    """

    contrastive: float = 1.0
    feature: float = 2000.0
    relational: float = 1.0
    interactive: float = 1.0


def feature_distance(
    student: Pairs, teacher: Pairs, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Mean squared difference of images from the teacher's, plus that of texts (FD).

    Inputs:
        ``student`` (B, E) of this rank, unit norm, with gradients, of the teacher's width;
        ``teacher`` (B, E), unit norm, constants. ``group``: the process group, which makes no
        difference: each row is compared with itself, and ranks have as many rows each.

    Recommendations:
        The term that does most in the paper. The mean is over widths too, so that unit vectors are
        2 (1 - cosine) / E apart: hence the large weight.

    References:
        Yang et al. 2024, "CLIP-KD: An Empirical Study of CLIP Model Distillation" (feature
        distillation), with the mean over widths of the released code.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: shapes do not fit.
    """
    _check("feature_distance", student, teacher, same_width=True)
    ours = _as_numbers(student)
    theirs = _constants(teacher, ours)
    with torch.autocast(ours.image.device.type, enabled=False):
        return F.mse_loss(ours.image, theirs.image) + F.mse_loss(ours.text, theirs.text)


def relational_divergence(
    student: Pairs,
    teacher: Pairs,
    logit_scale: torch.Tensor,
    teacher_scale: torch.Tensor | float,
    tile_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Divergence of what the student takes for the match of each row from what the teacher does.

    KL(teacher ‖ student) of the softmax of each image over all texts, and of each text over all
    images, averaged (CRD).

    Inputs:
        ``student`` (B, D) of this rank, unit norm, with gradients; ``teacher`` (B, E), unit norm,
        constants; widths may differ. ``logit_scale`` and ``teacher_scale``: one element each,
        already exponentiated. ``tile_size``: rows of logits held at once; None chooses by the
        device.

    Recommendations:
        A teacher of a high temperature scale is nearly sure of each pair, and then this is nearly
        `info_nce`; what it adds are the second and third matches.

    Relations:
        `feature_distance` compares vectors, this one their relations: it needs no common width.

    References:
        Yang et al. 2024, "CLIP-KD" (contrastive relational distillation); averaged over the two
        directions as in the released code, and at the temperatures of the two models.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: shapes do not fit.
    """
    _check("relational_divergence", student, teacher)
    ours = _as_numbers(student)
    theirs = _constants(teacher, ours)
    scales = _scales(ours, logit_scale, teacher_scale)
    rows = tile_size or auto_tile_size(len(ours.image) * world_size(group), ours.image.device)
    return _relational(ours, _gathered(ours, group), theirs, _gathered(theirs, group), scales, rows)


def interactive_contrast(
    student: Pairs,
    teacher: Pairs,
    logit_scale: torch.Tensor,
    tile_size: int | None = None,
    groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_groups: bool = False,
) -> torch.Tensor:
    """InfoNCE of the student's images among the teacher's texts, and texts among images (ICL).

    Inputs:
        ``student`` (B, E) of this rank, unit norm, with gradients, of the teacher's width;
        ``teacher`` (B, E), unit norm, constants; the rest as for `info_nce`.

    Relations:
        `info_nce` of each tower of the student with the other tower of the teacher, which does not
        learn.

    References:
        Yang et al. 2024, "CLIP-KD" (interactive contrastive learning). The released code learns a
        scale of its own for it, which it reads without exponentiating; here it is the student's.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: shapes do not fit, or ``tile_size`` is not positive.
    """
    _check("interactive_contrast", student, teacher, same_width=True)
    check_pairs("interactive_contrast", student.image, student.text, groups, tile_size)
    ours = _as_numbers(student)
    theirs = _constants(teacher, ours)
    scale = logit_scale.to(ours.image.dtype).reshape(())
    pairing = pairing_of(groups, len(ours.image), group, ignore=ignore_groups)
    rows = tile_size or auto_tile_size(len(ours.image) * world_size(group), ours.image.device)
    return _interactive(ours, _gathered(theirs, group), scale, pairing, rows)


def distilled_pairs(
    student: Pairs,
    teacher: Pairs,
    logit_scale: torch.Tensor,
    teacher_scale: torch.Tensor | float,
    weights: DistillationWeights = DistillationWeights(),
    projected: Pairs | None = None,
    groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_groups: bool = False,
    tile_size: int | None = None,
) -> torch.Tensor:
    """`info_nce` with the three terms of CLIP-KD, each with its weight.

    Inputs:
        ``student`` (B, D) of this rank, unit norm, with gradients; ``teacher`` (B, E), unit norm,
        constants. ``projected`` (B, E), unit norm: the student's vectors in the teacher's width,
        for the terms that compare the two; None: the student's own, where D = E. ``logit_scale``
        and ``teacher_scale``: one element each, already exponentiated. ``groups``: (B,) integer
        ids; samples of equal id are positives of each other, or left out (``ignore_groups``).

    Recommendations:
        The defaults are the paper's for a width of 512 and more; features alone (``feature``) do
        most.

    Relations:
        `info_nce`, `feature_distance`, `relational_divergence` and `interactive_contrast` are its
        terms.

    References:
        Yang et al. 2024, "CLIP-KD: An Empirical Study of CLIP Model Distillation".

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: shapes do not fit, or ``tile_size`` is not positive.
    """
    compared = student if projected is None else projected
    needs_width = bool(weights.feature or weights.interactive)
    _check("distilled_pairs", student, teacher)
    _check("distilled_pairs", compared, teacher, same_width=needs_width)
    check_pairs("distilled_pairs", student.image, student.text, groups, tile_size)
    ours = _as_numbers(student)
    theirs = _constants(teacher, ours)
    scales = _scales(ours, logit_scale, teacher_scale)
    pairing = pairing_of(groups, len(ours.image), group, ignore=ignore_groups)
    rows = tile_size or auto_tile_size(len(ours.image) * world_size(group), ours.image.device)
    terms = []
    if weights.contrastive or weights.relational:
        all_ours = _gathered(ours, group)
    if weights.relational or weights.interactive:
        all_theirs = _gathered(theirs, group)
    if weights.contrastive:
        contrast = both_ways(*ours, *all_ours, scales[0], pairing, rows)
        terms.append(weights.contrastive * contrast)
    if weights.feature:
        terms.append(weights.feature * feature_distance(compared, teacher, group))
    if weights.relational:
        divergence = _relational(ours, all_ours, theirs, all_theirs, scales, rows)
        terms.append(weights.relational * divergence)
    if weights.interactive:
        contrast = _interactive(_as_numbers(compared), all_theirs, scales[0], pairing, rows)
        terms.append(weights.interactive * contrast)
    if not terms:
        raise ConfigError("distilled_pairs: every weight is 0; set one of them")
    return torch.stack(terms).sum()


def _relational(
    ours: Pairs,
    all_ours: Pairs,
    theirs: Pairs,
    all_theirs: Pairs,
    scales: tuple[torch.Tensor, torch.Tensor],
    tile_size: int,
) -> torch.Tensor:
    scale, teacher_scale = scales

    def divergence(
        query_BD: torch.Tensor, key_ND: torch.Tensor, their_BE: torch.Tensor, their_NE: torch.Tensor
    ) -> torch.Tensor:
        compute = partial(
            _divergence,
            their_query_BE=their_BE * teacher_scale,
            their_key_NE=their_NE,
            tile_size=tile_size,
        )
        return differentiable(compute, query_BD, key_ND, scale)

    image_to_text = divergence(ours.image, all_ours.text, theirs.image, all_theirs.text)
    text_to_image = divergence(ours.text, all_ours.image, theirs.text, all_theirs.image)
    return (image_to_text + text_to_image) / 2


def _divergence(
    query_BD: torch.Tensor,
    key_ND: torch.Tensor,
    scale: torch.Tensor,
    needs_gradients: bool,
    *,
    their_query_BE: torch.Tensor,
    their_key_NE: torch.Tensor,
    tile_size: int,
) -> tuple[torch.Tensor, Gradients | None]:
    """Mean over queries of KL(teacher ‖ student) over all keys, whole rows of logits at a time.

    The gradient towards a logit is the difference of the two probabilities.
    """
    mean = 1 / len(query_BD)
    total = scale.new_zeros((), dtype=torch.float64)
    query_gradient_BD = torch.zeros_like(query_BD) if needs_gradients else query_BD
    key_gradient_ND = torch.zeros_like(key_ND) if needs_gradients else key_ND
    for start in range(0, len(query_BD), tile_size):
        rows = slice(start, min(start + tile_size, len(query_BD)))
        ours_TN = ((query_BD[rows] * scale) @ key_ND.T).log_softmax(dim=1)
        theirs_TN = (their_query_BE[rows] @ their_key_NE.T).log_softmax(dim=1)
        probability_TN = theirs_TN.exp()
        # The logarithm of a probability of 0 may be -inf, and counts nothing.
        difference_TN = (theirs_TN - ours_TN).where(probability_TN > 0, 0)
        total += (probability_TN * difference_TN).sum(dtype=torch.float64)
        if needs_gradients:
            weight_TN = ours_TN.exp_().sub_(probability_TN).mul_(mean)
            query_gradient_BD[rows] = weight_TN @ key_ND
            key_gradient_ND.addmm_(weight_TN.T, query_BD[rows])
    value = (total * mean).to(query_BD.dtype)
    if not needs_gradients:
        return value, None
    return value, scaled_gradients(query_BD, query_gradient_BD, key_gradient_ND, scale)


def _interactive(
    ours: Pairs, all_theirs: Pairs, scale: torch.Tensor, pairing: Pairing, tile_size: int
) -> torch.Tensor:
    image_to_text = cross_entropy(ours.image, all_theirs.text, scale, pairing, tile_size)
    text_to_image = cross_entropy(ours.text, all_theirs.image, scale, pairing, tile_size)
    return (image_to_text + text_to_image) / 2


def _gathered(pairs: Pairs, group: dist.ProcessGroup | None) -> Pairs:
    """The rows of all ranks, in one collective: each one makes the ranks wait for the slowest."""
    if world_size(group) == 1:
        return pairs
    return Pairs(*gather_rows(torch.cat(list(pairs), dim=1), group).chunk(2, dim=1))


def _as_numbers(pairs: Pairs) -> Pairs:
    """In float32, or float64 for float64."""
    dtype = torch.promote_types(pairs.image.dtype, torch.float32)
    return Pairs(*(one.to(dtype) for one in pairs))


def _constants(teacher: Pairs, ours: Pairs) -> Pairs:
    """The teacher's vectors without gradients, in the precision of the student's."""
    return Pairs(*(one.detach().to(ours.image.dtype) for one in teacher))


def _scales(
    ours: Pairs, logit_scale: torch.Tensor, teacher_scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    theirs = torch.as_tensor(teacher_scale, device=ours.image.device).detach()
    return (
        logit_scale.to(ours.image.dtype).reshape(()),
        theirs.to(ours.image.dtype).reshape(()),
    )


def _check(name: str, student: Pairs, teacher: Pairs, *, same_width: bool = False) -> None:
    ours, theirs = tuple(student.image.shape), tuple(teacher.image.shape)
    fits = (
        student.image.ndim == teacher.image.ndim == 2
        and student.image.shape == student.text.shape
        and teacher.image.shape == teacher.text.shape
        and ours[0] == theirs[0] > 0
    )
    if not fits:
        shapes = ", ".join(str(tuple(one.shape)) for one in (*student, *teacher))
        raise ConfigError(
            f"{name}: images and texts of the student and the teacher have the shapes {shapes}; "
            "expected (B, D) twice and (B, E) twice with B of 1 or more"
        )
    if same_width and ours[1] != theirs[1]:
        raise ConfigError(
            f"{name}: the student has width {ours[1]} and the teacher {theirs[1]}; project the "
            "student's vectors to the teacher's width"
        )
