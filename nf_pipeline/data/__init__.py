"""Images in: sources, splits, parallel decoding, and the ingest stage that stores them as shards.

Entry functions: `sources.open_source`, `ingest.ingest` and `ingest.ingest_fingerprint` for training;
`images.open_images` and `images.open_labelled` for a finished model.
"""
