"""The way of the data, from files to the network's input.

records (which images) -> decode (pixels) -> augment (one plan a sample; crop, rand_augment) -> dataset (samples and
batches) -> loader (order and workers) -> device (normalise, erase) and mixing (MixToken, MixUp, CutMix).
"""
