"""Structured output: constraints compiled to grammars, and their masks over the vocabulary.

llguidance does the parsing; docs/adr says why. Nothing here imports torch but ``masks``, so that
``trial`` starts quickly.
"""
