"""What is trained.

layers              the layers of a tower, from its top to its bottom
positions           position embeddings for another image size or context length
pretrained          what comes with pretrained weights, and what a recipe changes of it
initial             the model that a run begins with
outputs             what passes between data, model and loss
towers              towers, heads and temperature
trained             the module that DeepSpeed trains
"""
