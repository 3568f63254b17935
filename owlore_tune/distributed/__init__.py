"""Several processes that train together: what they exchange, how they start, and how FSDP2 shards a model."""
