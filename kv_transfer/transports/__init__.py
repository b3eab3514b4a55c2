"""What moves (head, payload) parts from one worker to another, under one contract.

``contract`` says what each must do and ``tests/conformance`` holds each to it; ``choose`` picks
one per peer. None of them knows what a part means.
"""
