"""The tokenizer of the recall proof: byte-level BPE over the words of its world, with a chat template."""

from __future__ import annotations

from . import world

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pieces() -> list[str]:
    """Every word as it stands in a text, and the parts of the names apart: merges never cross from part to part."""
    texts = [text.format(key="", value="") for group in (world.STATEMENTS, world.UPDATES, world.QUESTIONS)
             for texts in group.values() for text in texts]  # fmt: skip
    texts += [*world.SMALL_TALK, *(remark.format(person="", object="") for remark in world.REMARKS)]
    texts += [*world.SUBJECTS, *world.VERBS, *world.MANNERS]
    words = {word for text in texts for word in text.replace("?", " ?").replace(".", " .").split()}
    words |= {*world.ADJECTIVES, *world.NOUNS, *world.PLACES, *world.CODES}
    return [" " + word for word in sorted(words | set(world.ONSETS))] + [".", "?", *world.ENDINGS]


def build_tokenizer():
    """Train the tokenizer: the same each time, no random numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than there are merges
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(), trainer)
    # A word is the same token at the start of a text as inside it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=special[2:],
        chat_template=TEMPLATE,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )
