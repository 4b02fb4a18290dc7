"""The way of the data, from files to the network's input.

formats (what is there: folders, archives, parquet; manifest keeps the listings) -> records (which images, by a source
that reads them) -> decode (pixels) -> augment (one plan a sample; crop, rand_augment) -> dataset (samples and
batches) -> loader (order and workers) -> device (normalise, erase) and mixing (MixToken, MixUp, CutMix).
"""
