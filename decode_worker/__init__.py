"""The decode instance: reservations, continuous batching, preemption; also both phases in one.

``decider`` decides, ``service`` is the process around it. A mixed instance is this worker
given requests without a prefill side: it prefills them itself, in chunks beside its decodes.
"""
