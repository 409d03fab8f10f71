"""A teacher: a trained model, frozen, whose vectors an objective takes for targets.

It stands outside of what DeepSpeed trains, so that it is in no optimizer, no partition of ZeRO, no
checkpoint and no export; every rank holds it whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError, ModelError
from clipsys.inference.text_tower import text_encoder
from clipsys.models.open_clip_models import ModelParts, load_model
from clipsys.models.open_clip_models import fingerprint as model_fingerprint
from clipsys.training.model.outputs import Rows, TeacherSizes

if TYPE_CHECKING:
    from clipsys.models.tokenization import Tokenizer

#: Names of a teacher's rows.
TEACHER_IMAGE, TEACHER_TEXT = "teacher_image", "teacher_text"


def load_teacher(spec: str) -> ModelParts:
    """Loads the model that ``objective.teacher`` names.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        return load_model(spec)
    except ModelError as error:
        raise ConfigError(f"objective.teacher: {error}") from error


class Teacher:
    """Vectors of images and texts, in evaluation mode and without gradients.

    Attributes:
        parts: the model.
        name: what messages call it.
        fingerprint: of its weights, architecture and preprocessing.
        sizes: what an objective needs to know of it.
        size: (height, width) of the images that it takes.
        normalisation: mean and deviation of its pixels, (3, 1, 1) each.
        tokenizer: of its text tower.
        num_parameters: how many weights it has.
        device: where it runs.
    """

    def __init__(self, parts: ModelParts, *, device: torch.device, precision: str) -> None:
        """
        Args:
            parts: the model.
            device: this rank's.
            precision: of the run; anything but fp32 is autocast to bfloat16, or to float16 where
                the run is in fp16.
        """
        self.parts = parts
        self.name = parts.name
        self.fingerprint = parts.loaded_fingerprint or model_fingerprint(parts)
        model: Any = parts.model.eval().requires_grad_(False).to(device)
        self._model = model
        self._encode_tokens = text_encoder(self._model)
        self._autocast = {"fp16": torch.float16}.get(precision, torch.bfloat16)
        self._is_exact = precision == "fp32"
        self.device = device
        look = parts.preprocessing
        self.size = look.size
        self.normalisation = (
            torch.tensor(look.mean, device=device).view(3, 1, 1),
            torch.tensor(look.std, device=device).view(3, 1, 1),
        )
        self.tokenizer: Tokenizer = parts.tokenizer
        self.num_parameters = sum(one.numel() for one in model.parameters())
        scale = float(model.logit_scale.detach().exp())
        self.sizes = TeacherSizes(int(parts.config["embed_dim"]), scale)

    def rows(self, image_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> Rows:
        """Unit vectors, float32, of normalised images and of tokens of this teacher's own."""
        return {TEACHER_IMAGE: self.images(image_BCHW), TEACHER_TEXT: self.texts(tokens_BL)}

    def images(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, E) unit norm, float32, of images with this teacher's size and normalisation."""
        return self._run(self._model.encode_image, image_BCHW)

    def texts(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """(B, E) unit norm, float32, of this teacher's tokens."""
        return self._run(self._encode_tokens, tokens_BL)

    @torch.no_grad()
    def _run(
        self, encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=not self._is_exact):
            features = encode(inputs.to(self.device))
        return F.normalize(features.float(), dim=-1)
