"""Folders, tar archives and Parquet files as lists of labelled images; no pixels."""
