"""One decoder for every family: what differs between them is data in ``ModelSpec``."""
