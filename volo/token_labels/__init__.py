"""Token labels: a teacher's top scores for every cell of an image, and the targets of the loss made from them.

store (the packed file format, read by all workers and ranks at once), writer, pt_folder (the published folder of .pt
files) and pack (from the latter to the former); opening (either layout, checked against a data set); source (the
label maps of a training set); aligned and published, the two geometries, one of which source chooses; token_cells
(where a token looks in its map); targets (the input of the loss). generation/ makes labels.
"""
