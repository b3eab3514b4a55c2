"""The whole of Baton beside the whole of vLLM: 1 prefill + 1 decode worker each, over HTTP."""
