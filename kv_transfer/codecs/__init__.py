"""Codecs: KV of one frame to bytes and back. ``contract`` says what each one owes.

Pure functions of arrays: no sockets, no clock, no state between streams. ``registry`` makes
one by its wire name; the other files are the codecs and what they are built from.
"""
