"""Video: decoding, feature extractors, detection in files and live sources, and what is written about it."""
