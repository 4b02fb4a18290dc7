"""Generating token labels with a teacher (scripts/generate_token_labels.py)."""
