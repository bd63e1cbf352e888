"""The stages as plain generator functions: what runs on a worker, without knowing which executor runs it."""
