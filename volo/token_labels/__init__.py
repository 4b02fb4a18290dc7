"""Token labels: a teacher's top scores for every cell of an image, and the way from there to dense targets.

store (the packed file format, read by all workers and ranks at once) and writer; published (the folder of .pt files
of the published code); opening (either of them, checked against a data set); pack (one into the other). teachers,
labeller and generate write labels; source, geometry and targets lead them to the loss.
"""
