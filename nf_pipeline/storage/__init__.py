"""Where a run lives: object stores, the layout of keys, tensor shards and the manifests that commit them.

Knows nothing of torch, Ray or what the tensors mean. Start at `store.open_store`, `shard_writer.ShardWriter`,
`reader.ShardReader` and `manifest.read_manifest`. Importing this package loads none of them.
"""
