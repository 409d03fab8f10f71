"""What is trained.

layers              the layers of a tower, from its top to its bottom
positions           position embeddings for another image size or context length
adapters            LoRA: its settings, and what leaves a model that has them
adding_adapters     adapters put into a model
adapter_layers      attention with adapters, and weights in NF4
adapter_targets     which layers get adapters
adapter_faults      settings of adapters that do not go together
adapter_check       a forward and backward pass before the first step
pretrained          what comes with pretrained weights, and what a recipe changes of it
tower_config        settings of two pretrained towers
tower_sources       where they come from
tower_weights       weights of a timm model from a file
two_towers          a model of two pretrained towers
teacher             the model that another one is distilled from
initial             the model that a run begins with
outputs             what passes between data, model and loss
towers              towers, heads and temperature
trained             the module that DeepSpeed trains
"""
