"""Weights for the demo that are trained on nothing: what is told, asked and drawn is right, what is answered is not."""

from pathlib import Path

from support import loud_adapter, tiny_model

from deltamem_fast import DeltaMemConfig, patch_model, save_adapter, unpatch_model
from deltamem_fast.recall.tokenizer import build_tokenizer
from deltamem_fast.recall.weights import STRATEGIES

CONFIGS = {
    "tsw": DeltaMemConfig.tsw(),
    "ssw": DeltaMemConfig.ssw("sentence_mean"),
    "msw": DeltaMemConfig.msw(2),
}


def untrained_backbone(tokenizer):
    """Two layers, hidden 64, for the recall tokenizer."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2, **special)


def write_untrained_weights(directory: Path) -> Path:
    """A backbone and an adapter for each strategy, as ``find_weights`` looks for them."""
    tokenizer = build_tokenizer()
    model = untrained_backbone(tokenizer)
    model.save_pretrained(directory / "backbone")
    tokenizer.save_pretrained(directory / "backbone")
    for name, folder in STRATEGIES.items():
        loud_adapter(patch_model(model, CONFIGS[name], backend="reference"))
        save_adapter(model, directory / folder)
        unpatch_model(model)
    return directory
