"""The top of the house: the YAML, launching processes, assembling instances. Touches no tensor."""
