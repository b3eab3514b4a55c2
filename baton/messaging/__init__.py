"""ZeroMQ and MessagePack between processes: framing, caps, the hello, links and servers."""
