"""The main job: a run spec becomes a model, data and a trained adapter."""
