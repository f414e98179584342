"""What fast DoRA costs, against PEFT's LoRA and DoRA on the same machine."""
