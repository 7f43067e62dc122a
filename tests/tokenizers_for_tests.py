"""Small fast tokenizers, made in memory, with chat templates that have the habits of well-known models.

Each function returns a new ``PreTrainedTokenizerFast``. The vocabulary (less than 512) is the same for all:
byte-level BPE trained on a few sentences, so that every text can be encoded and a word takes a few tokens.
"""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|header|>",
    "<|/header|>",
    "<|eot|>",
)
# Added, but not special: decoding keeps them.
ADDED_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

_CORPUS = (
    "The user asks a question and the assistant answers it. You are a helpful assistant.",
    "Where did Ada go on Monday? She went to the market; then she took the train home.",
    'He said: "This is the first sentence." (And this is the second one!) Here is a third one.',
    "system user assistant tool think metadata reasoning mode name arguments content",
    "My dog is called Rex and my sister lives in Paris. What is the name of my dog?",
)

# Every message in a block of its own, as it is.
CHATML_TEMPLATE = """\
{%- for m in messages -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# A system block of its own making where the chat brings none.
DEFAULT_SYSTEM_TEMPLATE = (
    """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant. Be kind!<|im_end|>\n' }}
{%- endif -%}
"""
    + CHATML_TEMPLATE
)

# Thinking is shown only after the last question; there the last turn has a think block even if it is empty.
THINKING_TEMPLATE = """\
{%- macro text_of(m) -%}{%- if m.content is string -%}{{ m.content }}{%- endif -%}{%- endmacro -%}
{%- set ns = namespace(query=-1) -%}
{%- for m in messages -%}
{%- set body = text_of(m) -%}
{%- set is_response = body.startswith('<tool_response>') and body.endswith('</tool_response>') -%}
{%- if m.role == 'user' and not is_response -%}{%- set ns.query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if ns.query < 0 -%}{%- set ns.query = messages | length - 1 -%}{%- endif -%}
{%- if tools -%}
{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' -%}{{ text_of(messages[0]) ~ '\n\n' }}{%- endif -%}
{{ 'Tools:' }}
{%- for tool in tools -%}{{ '\n' ~ tool | tojson }}{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' -%}
{{ '<|im_start|>system\n' ~ text_of(messages[0]) ~ '<|im_end|>\n' }}
{%- endif -%}
{%- for m in messages -%}
{%- set body = text_of(m) -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ body ~ '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{%- set thought, answer = '', body -%}
{%- if m.reasoning_content is string -%}
{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in body -%}
{%- set thought = body.split('</think>')[0].split('<think>')[-1] -%}
{%- set answer = body.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.query and (loop.last or thought.strip('\n')) -%}
{{ '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ answer.lstrip('\n') }}
{%- else -%}
{{ answer }}
{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{%- if answer or not loop.first -%}{{ '\n' }}{%- endif -%}
{%- set function = call.function or call -%}
{{ '<tool_call>\n{"name": "' ~ function.name ~ '", "arguments": ' ~ function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' -%}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\n<tool_response>\n' ~ body ~ '\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}
"""

# Always a system block with metadata; its message can switch a mode, and later system messages are dropped.
MODE_TEMPLATE = """\
{%- set ns = namespace(mode='/think', extra='You are a helpful assistant.') -%}
{%- if enable_thinking is defined and not enable_thinking -%}{%- set ns.mode = '/no_think' -%}{%- endif -%}
{%- if messages[0].role == 'system' -%}
{%- set wish = messages[0].content -%}
{%- if '/no_think' in wish -%}{%- set ns.mode = '/no_think' -%}
{%- elif '/think' in wish -%}{%- set ns.mode = '/think' -%}
{%- endif -%}
{%- set ns.extra = wish.replace('/no_think', '').replace('/think', '').rstrip() -%}
{%- endif -%}
{{ '<|im_start|>system\nMetadata.\n\nReasoning mode: ' ~ ns.mode ~ '\n\n' ~ ns.extra ~ '\n\n<|im_end|>\n' }}
{%- for m in messages -%}
{%- set body = m.content if m.content is string else '' -%}
{%- if m.role == 'user' or m.role == 'tool' -%}
{{ '<|im_start|>user\n' ~ body ~ '<|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' ~ ('<think>\n\n</think>\n' if ns.mode == '/no_think' else '') }}
{{- body.lstrip('\n') ~ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' ~ ('<think>\n\n</think>\n' if ns.mode == '/no_think' else '') }}
{%- endif -%}
"""

# A bos token, and contents (strings or lists of parts) without the white space around them.
TRIMMED_TEMPLATE = """\
{%- macro text_of(m) -%}
{%- if m.content is string -%}{{ m.content }}
{%- else -%}{%- for part in m.content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- for m in messages -%}
{{ '<|header|>' ~ m.role ~ '<|/header|>\n\n' ~ text_of(m) | trim ~ '<|eot|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|header|>assistant<|/header|>\n\n' }}{%- endif -%}
"""


@cache
def _trained(trim_offsets: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=512 - len(ADDED_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(list(ADDED_TOKENS))
    return tokenizer.to_str()


def tokenizer_with(template: str, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with any chat template.

    ``trim_offsets``: whether a token's offsets leave out the space in front of the word.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(trim_offsets)),
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    tokenizer.chat_template = template
    return tokenizer


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML: each message rendered on its own, so a prefix of a chat renders to a prefix of its text."""
    return tokenizer_with(CHATML_TEMPLATE)


def default_system_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML with a default system block if the chat does not begin with a system message (as in Qwen2.5)."""
    return tokenizer_with(DEFAULT_SYSTEM_TEMPLATE)


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML that shows thinking only after the last question (as in Qwen3).

    ``<think>`` is dropped from earlier answers, and the last answer has a think block even if it thought
    nothing. Also ``reasoning_content``, ``tools``, ``tool_calls``, consecutive tool responses merged into one
    user block, and ``enable_thinking=False``, which adds an empty think block to the generation prompt.
    """
    return tokenizer_with(THINKING_TEMPLATE)


def mode_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML that always renders a system block with metadata (as in SmolLM3).

    ``/think`` and ``/no_think`` in the system message, or ``enable_thinking``, set a mode; with ``/no_think``
    every answer has an empty think block. A content that is no string is dropped, like later system messages.
    """
    return tokenizer_with(MODE_TEMPLATE)


def trimmed_tokenizer() -> PreTrainedTokenizerFast:
    """A bos token and trimmed contents (as in Llama); a token's offsets leave out the space before a word."""
    return tokenizer_with(TRIMMED_TEMPLATE, trim_offsets=True)
