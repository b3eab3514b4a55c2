"""The prefill instance: queue, chunked prefill, first token, KV pushed out.

``decider`` decides, ``service`` is the process around it. It never decides where a request
goes: the router names the decode worker.
"""
