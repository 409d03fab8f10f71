"""What is minimised: one file an objective, all behind one protocol.

protocol            `Objective`, its settings, and what it is given
registry            objectives by name, our own and those of other packages
heads               projection heads, and temperatures of an objective's own
draws               random numbers of single rows

images with texts   infonce, sigmoid (pairs: what they share), infonce_queue, slip,
                    reweighted (hard_infonce), extra_texts (negclip, mined_infonce),
                    distillation
images alone        simclr, barlow_twins, vicreg (two_views), moco, moco_v3, memory_bank, looc,
                    swav, nce, reweighted (hard_simclr), rotation, jigsaw, colour (pretext)
images with labels  supcon, classification, triplet, margin (label_views), n_pair
texts alone         scl, masked_words, sentence_order
ordered frames      cpc, frame_order (frame_views)
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
