"""Preparing the official files of ILSVRC2012 for training (scripts/prepare_imagenet.py)."""
