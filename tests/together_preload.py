"""Imported once by the process that the others are forked from."""

import accelerate  # noqa: F401
import few_samples  # noqa: F401
import torch
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

import sculptor.benchmark.runner
import sculptor.tasks.analyze
import sculptor.tasks.evaluate
import sculptor.tasks.train
import sculptor.tasks.verify  # noqa: F401

torch.set_num_threads(1)
