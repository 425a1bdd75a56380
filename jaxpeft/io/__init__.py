"""Files: checkpoints of the adapter, Hugging Face folders of models and of adapters."""
