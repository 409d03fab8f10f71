"""What checks, mends and describes a collection.

info             what a collection holds, in numbers
duplicates       near-duplicate groups
verification     every invariant, checked against the files
repair           mending what can be mended of them
migration        another model, built beside and swapped
moved_model      where the model lies now
"""
