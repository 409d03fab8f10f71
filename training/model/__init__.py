"""What is trained.

layers              the layers of a tower, from its top to its bottom
initial             the model that a run begins with
towers              both towers and the temperature in one forward
"""
