"""What a collection needs of an encoder, and the text tower without torch.

encoding         an encoder's interface, and which one is the right one
light            the text tower without torch, for a cold process
truncation       texts that are longer than the model reads
pinned           the one encoder of an open collection, loaded when first needed
"""
