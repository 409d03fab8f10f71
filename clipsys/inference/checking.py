"""A faster, approximate way through an image tower that is compared with the exact one first.

Whether a tower bears fewer bits is found out on the first images that come, not by its name:
`CheckedEncoder`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.inference.threads import EncodeImage

_logger = logging.getLogger(__name__)

#: Cosine with the exact vector below which an approximation is given up. At 0.99 the error has a
#: length of 0.14, of which a query sees 0.14 / sqrt(D): 0.006 at D = 512, a fifth of the spread
#: that the cosines of CLIP's texts and images have among themselves.
MIN_AGREEMENT = 0.99
#: Images that are compared; fewer than this many decide nothing and are encoded exactly.
_COMPARED_MIN, _COMPARED_MAX = 8, 16


#: Makes an approximation; None: this tower has none of the kind.
MakeEncoder: TypeAlias = Callable[[], EncodeImage | None]


class CheckedEncoder:
    """Approximate towers that are compared with the exact one on the first images that come.

    Args:
        exact: images (B, C, H, W) -> features (B, D).
        approximations: makers of approximate encoders by name (``int8``, ``bf16``), the preferred
            one first. Each is called when enough images came to decide and those before it were
            given up.
        on_choice: called with the name of the encoder that is used from then on, or ``fp32``.
    """

    def __init__(
        self,
        exact: EncodeImage,
        approximations: Mapping[str, MakeEncoder],
        on_choice: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._exact = exact
        self._approximations = approximations
        self._on_choice = on_choice
        self._chosen: EncodeImage | None = None
        self._seen: list[torch.Tensor] = []

    def __call__(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of the images; exact ones until enough images came to decide."""
        if self._chosen is None:
            self._seen.append(image_BCHW[:_COMPARED_MAX])
            if sum(map(len, self._seen)) < _COMPARED_MIN:
                return self._exact(image_BCHW)
            name, self._chosen = self._choose(torch.cat(self._seen)[:_COMPARED_MAX])
            self._seen.clear()
            self._on_choice(name)
        return self._chosen(image_BCHW)

    def _choose(self, image_BCHW: torch.Tensor) -> tuple[str, EncodeImage]:
        exact_BD = self._exact(image_BCHW).float()
        for name, make in self._approximations.items():
            approximate = make()
            if approximate is None:
                _logger.info("precision: not %s (this image tower has no such form)", name)
                continue
            cosine_B = F.cosine_similarity(exact_BD, approximate(image_BCHW).float())
            agreement = float(cosine_B.min())
            compared = f"the first {len(image_BCHW)} images agree with fp32 to a cosine of"
            if agreement >= MIN_AGREEMENT:  # false for NaN as well
                _logger.info("precision: %s (%s %.4f)", name, compared, agreement)
                return name, approximate
            _logger.warning(
                "precision: not %s (%s %.4f only; %s is required)",
                *(name, compared, agreement, MIN_AGREEMENT),
            )
        _logger.info("precision: fp32")
        return "fp32", self._exact
