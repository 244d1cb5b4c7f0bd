"""What every rank needs, imported once by the fork server and never used there, so that ranks start in milliseconds."""

import importlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client reads it: it asks for a name that is none again and again

import deepspeed  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

from launch import certify, chat, going_on, hand_over, measure, parts, profiling  # noqa: F401
from sft_dist import checkpoint, engine, evaluate, model, step_profile, trainer  # noqa: F401

importlib.import_module("peft")  # behind `sft_dist.adapter`, which keeps it quiet
