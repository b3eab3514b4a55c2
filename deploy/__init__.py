"""Data only: bundled models, example configs and Ray deploy files. No logic."""
