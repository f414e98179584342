"""Ranks under FSDP2: the same decisions as with tensors of other shapes, and zeros elsewhere."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import rankflow as rf
from rankflow.adapters.slots import local
from rankflow.errors import BudgetError, CheckpointError, RankFlowError, SurgeryError
from rankflow.export.sharded import write_sharded
from rankflow.resizing import mask_surgery
