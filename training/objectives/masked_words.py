"""Words that are hidden and have to be named, as a pretext task for text towers: BERT.

Shapes: B rows, L tokens, D width, M hidden tokens of all rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.distributed.collectives import gather_rows, world_size
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State, TokenIds
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.protocol import Labels, Objective, ObjectiveConfig, View

_WORDS = "words"
#: Of the tokens to be named: hidden behind the mask, replaced by any other; the rest stay.
_HIDDEN, _REPLACED = 0.8, 0.1


class MaskedWordsConfig(ObjectiveConfig):
    """Masked words: some of each text's tokens are hidden, and the tower names them; no images."""

    name: Literal["masked_words"] = Field("masked_words", description="which objective")
    share: float = Field(
        0.15, gt=0, lt=1, description="of each text's tokens that are to be named; at least one"
    )


class MaskedWords(Objective[MaskedWordsConfig]):
    """Cross-entropy of the hidden tokens among the vocabulary, over the hidden tokens of all ranks.

    Inputs:
        Texts. The first token, the last and the padding are never hidden. Of those that are to be
        named, 80 % become the tokenizer's mask, 10 % another token and 10 % stay, drawn from each
        row's own random number. A text without a token in between adds nothing.

    Recommendations:
        Further training of an encoder of Hugging Face on texts of one's own field, before labels.
        CLIP's text tower reads from left to right only, so it guesses the next token from what
        stands before it, and its tokenizer has no mask: the id of the padding stands for it.

    Relations:
        `SentenceOrder` asks about sentences. The head is BERT's; its last matrix is not tied to
        the token embeddings, whose width may be another one.

    References:
        Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding", section 3.1.
    """

    config = MaskedWordsConfig
    num_texts = 1

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """None."""
        return ()

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """What names tokens."""
        assert sizes.tokens is not None
        return nn.ModuleDict({_WORDS: _Words(sizes.width, sizes.tokens)})

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """The summed cross-entropy of each row, the number of its hidden tokens, and the named."""
        assert inputs.seeds_B is not None
        tokens_BL = inputs.texts[0]
        head: _Words = towers.heads[_WORDS]  # type: ignore[assignment]
        shown_BL, is_asked_BL = hide(tokens_BL, inputs.seeds_B, head.tokens, self.settings.share)
        features_MD = towers.token_features(shown_BL)[is_asked_BL]
        scores_MV = towers.head(_WORDS, features_MD)
        answer_M = tokens_BL[is_asked_BL]
        entropy_M = F.cross_entropy(scores_MV, answer_M, reduction="none")
        row_M = is_asked_BL.nonzero()[:, 0]
        named_M = (scores_MV.argmax(dim=1) == answer_M).to(entropy_M.dtype)
        zeros_B = entropy_M.new_zeros(len(tokens_BL))
        rows = {
            "entropy": zeros_B.index_add(0, row_M, entropy_M),
            "named": zeros_B.index_add(0, row_M, named_M),
            "asked": is_asked_BL.sum(dim=1),
        }
        return Outputs(rows, {})

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """The sum over this rank's tokens, so weighted that ranks average to the mean over all."""
        total = gather_rows(outputs.rows["asked"]).sum().clamp(min=1)
        return outputs.rows["entropy"].sum() * (world_size() / total), state

    def figures(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> dict[str, torch.Tensor]:
        """``accuracy``: the share of hidden tokens that are named."""
        asked = outputs.rows["asked"].sum().clamp(min=1)
        return {"accuracy": outputs.rows["named"].sum() / asked}


class _Words(nn.Module):
    """BERT's head: a layer, then scores of the vocabulary."""

    def __init__(self, width: int, tokens: TokenIds) -> None:
        super().__init__()
        self.tokens = tokens
        self.layer = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.vocabulary = nn.Linear(width, tokens.number)

    def forward(self, features_MD: torch.Tensor) -> torch.Tensor:
        scores_MV: torch.Tensor = self.vocabulary(self.layer(features_MD))
        return scores_MV


def hide(
    tokens_BL: torch.Tensor, seeds_B: torch.Tensor, tokens: TokenIds, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts with hidden tokens, and where those stand: (B, L) int64 and bool.

    Args:
        tokens_BL: the texts: a first token, words, a last token, padding.
        seeds_B: of each row's draws.
        tokens: ids of the padding and the mask.
        share: of the words that are to be named, at least one where there is any.
    """
    length = tokens_BL.shape[1]
    draws = [
        torch.rand(3, length, generator=torch.Generator().manual_seed(seed))
        for seed in seeds_B.tolist()
    ]
    rank_BL, kind_BL, other_BL = torch.stack(draws, dim=1).to(tokens_BL.device)
    is_token_BL = tokens_BL != tokens.padding
    place_L = torch.arange(length, device=tokens_BL.device)
    last_B1 = (place_L * is_token_BL).amax(dim=1, keepdim=True)
    is_word_BL = is_token_BL & (place_L > 0) & (place_L < last_B1)
    num_words_B1 = is_word_BL.sum(dim=1, keepdim=True)
    num_asked_B1 = (share * num_words_B1).round().clamp(min=1).minimum(num_words_B1)
    order_BL = rank_BL.masked_fill(~is_word_BL, 2.0).argsort(dim=1).argsort(dim=1)
    is_asked_BL = order_BL < num_asked_B1
    shown_BL = tokens_BL.masked_fill(is_asked_BL & (kind_BL < _HIDDEN), tokens.mask)
    is_other_BL = is_asked_BL & (kind_BL >= _HIDDEN) & (kind_BL < _HIDDEN + _REPLACED)
    return torch.where(is_other_BL, (other_BL * tokens.number).long(), shown_BL), is_asked_BL
