"""How fine-tuning changed a model's weights: in magnitude, and in direction."""
