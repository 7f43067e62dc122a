"""transformers' common model tests on a small Qwen3 or Llama, bare or patched; ``run.py`` runs it.

FAMILY is ``Qwen3`` or ``Llama``; with PATCHED=1 every model that a test makes or loads gets a memory whose output is
zero, and one that was saved with an adapter, or is loaded from a state dict that has one, gets that.
"""

import functools
import os
import threading
import unittest
from pathlib import Path

import torch
import transformers
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

FAMILY = os.environ["FAMILY"]
KINDS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
torch.set_num_threads(1)


class Tester:
    """Makes the small configuration and inputs that the common tests ask for."""

    batch_size, seq_length, num_hidden_layers, num_attention_heads, hidden_size = 3, 7, 2, 4, 32
    is_training = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return getattr(transformers, f"{FAMILY}Config")(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=self.hidden_size // self.num_attention_heads,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            num_labels=3,
        )

    def prepare_config_and_inputs_for_common(self):
        size = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(size, 99), "attention_mask": random_attention_mask(size)}
        return self.get_config(), inputs


class CommonModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = tuple(getattr(transformers, FAMILY + kind) for kind in KINDS)
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = Tester(self)


def patch_every_model() -> None:
    """Have the classes make and load patched models; of this process only."""
    from deltamem_fast import DeltaMemConfig, patch_model
    from deltamem_fast.config import CONFIG_NAME

    # All heads: some versions' tests want a gradient for every parameter, which an inactive head's zeros do not get.
    config = DeltaMemConfig(output_init="zero", delta_heads=("q", "k", "v", "o"))
    depth = threading.local()  # > 0: inside another model's making or loading

    def inside(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            depth.value = getattr(depth, "value", 0) + 1
            try:
                return function(*args, **kwargs)
            finally:
                depth.value -= 1

        return call

    def patching(cls):
        made, loaded = inside(cls.__init__), inside(cls.from_pretrained.__func__)

        @functools.wraps(cls.__init__)
        def make(self, *args, **kwargs):
            made(self, *args, **kwargs)
            if not depth.value and type(self) is cls:
                patch_model(self, config)

        @functools.wraps(cls.from_pretrained.__func__)
        def load(kind, *args, **kwargs):
            found = loaded(kind, *args, **kwargs)
            if depth.value:
                return found
            model = found[0] if isinstance(found, tuple) else found
            directory = args[0] if args else kwargs["pretrained_model_name_or_path"]
            adapter = Path(directory or os.devnull) / CONFIG_NAME
            patch_model(model, adapter.parent if adapter.is_file() else config)
            given = {key: value for key, value in (kwargs.get("state_dict") or {}).items() if ".delta_memory." in key}
            if given:
                model.load_state_dict(given, strict=False)
            return found

        cls.__init__, cls.from_pretrained = make, classmethod(load)

    for cls in CommonModelTest.all_model_classes:
        patching(cls)


if os.environ.get("PATCHED"):
    patch_every_model()
