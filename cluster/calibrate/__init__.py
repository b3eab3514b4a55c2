"""Making the profile of the lossy KV codecs from a checkpoint and text (``baton calibrate``)."""
