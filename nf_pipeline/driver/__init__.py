"""The driver: plans a run, submits its stages in order, collects and assembles. Holds no tensors."""
