"""From the official files of ILSVRC2012 to what training reads: what scripts/prepare_imagenet.py does."""
