"""Texts that queries are compared with, to tell what a model's scores mean.

captions    what a model was trained with: a sample that its folder keeps, and its words
foreign     texts that hardly describe any picture, generated from a seed
"""
