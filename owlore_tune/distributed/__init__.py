"""Distributed training: collectives, process startup, and FSDP2 sharding."""
