"""What a site is: PEFT's layers seen as sums of rank-1 components."""
