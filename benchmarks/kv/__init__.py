"""What the KV measurements share: texts, baselines, statistics."""
