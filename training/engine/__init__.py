"""DeepSpeed around a model: gradients of the whole batch, steps and checkpoints.

config              the section ``engine`` of a recipe
schedule            the learning rate's course
optimizers          optimizers by name, and the parameter groups they work on
gradient_check      stopping before a gradient that is not finite reaches the weights
ema                 an average of the weights
momentum            copies of towers that follow them
repartition         ZeRO's state for another number of ranks
zero                stages, buckets and what is offloaded
replay              forward passes that leave no trace, and their repetition
whole_weights       weights that ranks divide, and float32 masters, as a whole
checkpoint_fit      whether a checkpoint fits the engine that loads it
deepspeed_engine    `Engine`
"""
