"""``python -m rankflow``, which ``torchrun -m rankflow`` and ``accelerate launch -m`` start too."""

from rankflow.cli import app

app()
