"""Images, from files to the network's input.

sources (folders, archives, Parquet -> labelled records) -> pixels (header, plan, box needed, decode, apply) -> dataset
(samples and batches) -> loader (order, workers) -> normalise (normalise and erase on the device), mixing (MixToken,
MixUp, CutMix).
"""
