"""The benchmark: this project beside backpropagation and its relatives, under the same memory budgets.

Every cell (one method at one budget with one seed) runs in a process of its own, reads the same ingested images
through the same feed, and is measured with the same meter and clock. Entry: `nf_pipeline.bench.suite.run_suite`.
"""
