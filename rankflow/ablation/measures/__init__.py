"""What an ablation measures beside quality."""
