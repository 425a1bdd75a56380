"""Small reference models in Flax NNX, each one file, each loading a Hugging Face folder."""
