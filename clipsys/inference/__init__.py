"""Fast ways through a tower, each checked against the plain one before it is used.

equal_outputs       whether two ways through a tower give the same output
checking            an approximation, used where the first images agree with the exact tower
threads             which thread encodes which rows
text_tower          a causal text tower on batches cut to their longest caption
image_tower         vision transformers, from the class token's last block to int8
int8                products of bytes with a scale for each token and output channel
bpe                 CLIP's byte-pair tokenizer without torch
numpy_text_tower    CLIP's text tower in numpy, for a cold text query
numpy_bert_tower    a BERT-like one
numpy_layers        what both are made of
"""
