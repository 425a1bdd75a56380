"""The conformance table: every style of model, every method, every law."""
