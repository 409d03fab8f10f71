"""What is minimised: one file an objective, all behind one protocol.

protocol            `Objective`, its settings, and what it is given
registry            objectives by name, our own and those of other packages
heads               projection heads
two_views           what objectives over pairs of views share: simclr, barlow_twins, vicreg
infonce, sigmoid    images with texts; infonce_queue and slip too
simclr, moco, looc  images alone; moco_v3 and memory_bank too
reweighted          hard_infonce, hard_simclr: negatives weighted by their hardness
extra_texts         negclip, mined_infonce: texts without an image as further negatives
supcon              images with labels, classification too
label_views         what objectives over pairs of labelled images share: triplet, margin
n_pair, nce         images against others, with or without labels
scl, sentence_order, masked_words    texts alone
pretext             what the tasks that need no labels share: rotation, jigsaw, colour
frame_views         what objectives over ordered frames share: frame_order, cpc
draws               random numbers of single rows
"""

from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.objectives.protocol import (
    Labels,
    Objective,
    ObjectiveConfig,
    Surroundings,
    View,
)
from clipsys.training.objectives.registry import (
    BUILT_IN,
    ObjectiveSection,
    make_objective,
    objective_class,
    objective_names,
    with_current_names,
)

__all__ = [
    "BUILT_IN",
    "Inputs",
    "Labels",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSection",
    "Outputs",
    "Rows",
    "Sizes",
    "State",
    "Surroundings",
    "View",
    "make_objective",
    "objective_class",
    "objective_names",
    "with_current_names",
]
