"""Segment ids of a chat: which tokens are averaged into one write.

A chat template renders messages to one string, and nothing in it says where a message begins or ends.
Rendering ever longer prefixes of the chat is not enough: templates of thinking models render a message
differently once others follow it. So the chat is also rendered with a mark in each message's content, which
shows the content's place as long as the rest of the text stays the same.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..arguments import check_choice
from ..display import shortened
from ..errors import ArgumentError, DeltaMemError
from .messages import Message, plain_messages
from .settings import RESULT_ARGUMENTS

_GRANULARITIES = ("message", "message_mean", "sentence", "sentence_mean")
_SYSTEM_ROLES = ("system", "developer")
_THINK_END = "</think>"
_PROBE_TEXT = "Probe"
_QUESTION = {"role": "user", "content": _PROBE_TEXT}

# An end mark with the closing quotes and brackets after it. Marks of scripts that put no space between sentences need
# none: ideographic 。｡！？；： (no 12：30), danda ।॥, Arabic ؟؛۔, Armenian ։, Ethiopic ።፧፨, Burmese ။, Khmer ។៕,
# Tibetan །. The others, an ellipsis among them, end a sentence before white space alone. Or a blank line, but for those
# in front of the text.
_CLOSING = r"""["'”’»›)\]}）】」』》〉〕〗＂＇]*"""
SENTENCE_END = re.compile(
    rf"[.!?;:…‥．]{_CLOSING}\s+|(?:[。｡！？；।॥؟؛۔։።፧፨။។៕།]|：(?!\d))+{_CLOSING}\s*|(?<=\S)[^\S\n]*\n[^\S\n]*\n\s*"
)

Render = Callable[..., str]


class _Marked(NamedTuple):
    """A message with a mark in it."""

    message: dict
    rest: str | None = None  # the content between the mark and its end, trailing white space left out; None: not in it
    position: int = 0  # of the mark in the rendered chat, once that is known


class _Block(NamedTuple):
    """A message in the rendered chat: its content and where its block ends, as character offsets.

    The block starts where the one before it ends.
    """

    content: tuple[int, int] | None
    end: int | None


def segment_ids_from_messages(
    tokenizer,
    messages: Sequence[Mapping],
    granularity: str,
    add_generation_prompt: bool = False,
    **template_kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of a chat, and the segment that each token belongs to.

    A message's block is its header (``<|im_start|>user\\n``), content and trailer (``<|im_end|>\\n``). With
    ``message`` each block is one segment. With ``sentence`` a block is split where its content's sentences
    end (see `sentence_spans`); the header, with a thinking block before the content, joins the first sentence,
    and the trailer, with tool calls after the content, the last. A message without content is one segment.

    A token belongs to the segment that holds its first character that is not white space. Segments are numbered
    0, 1, ... in order over the whole chat; one that owns no token gets no number. Not written, -1, are
    messages of role ``system`` or ``developer``, whatever the template puts before the first other message (a
    default system block, metadata, a token for the beginning of the text), and the generation prompt.

    Where a template merges neighbouring messages into one block (several tool responses), what it puts
    between them belongs to the later one. The template is rendered for each prefix of the chat, so the time
    grows with the square of the number of messages.

    Args:
        tokenizer: a fast tokenizer (it has to give offsets) with a chat template.
        messages: one chat, each message with a ``role`` and a ``content``, which is a string or a list of
            ``{"type": "text", "text": ...}``. It may be missing or None where there are ``tool_calls`` or
            ``reasoning_content``.
        granularity: ``message`` or ``sentence``; the configuration's ``message_mean`` and ``sentence_mean``
            mean the same.
        add_generation_prompt: end with the header of the assistant's next turn.
        template_kwargs: for the template, such as ``enable_thinking`` and ``tools``. Arguments that pad,
            truncate, continue a message or change the kind of result are refused.

    Returns:
        input_ids, segment_ids, both int64 [1, T]. input_ids are those of ``tokenizer.apply_chat_template``.

    Raises:
        ValueError: an argument is not as described; the tokenizer is not fast; or the template renders a
            message in such a way that its block cannot be found (the text names the message).
    """
    return segment_ids_under(tokenizer, messages, granularity, template_kwargs, add_generation_prompt)


def segment_ids_under(
    tokenizer,
    messages: Sequence[Mapping],
    granularity: str,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``segment_ids_from_messages`` with a template's arguments in one dict: their names may be those of this module.

    Raises:
        ValueError: as there.
    """
    check_choice(granularity, "granularity", _GRANULARITIES)
    refused = sorted(set(template_kwargs).intersection(RESULT_ARGUMENTS))
    if refused:
        raise ArgumentError(f"template_kwargs: got {', '.join(refused)}, allowed only what the chat template reads")
    plain_messages(messages, "messages")  # refuses others; templates get the contents as they are given
    messages = [dict(message) for message in messages]
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"tokenizer: got {type(tokenizer).__name__}, which is no fast tokenizer; segments need one, "
            "because only fast tokenizers say which characters a token covers"
        )

    def render(conversation, add_generation_prompt=False):
        return tokenizer.apply_chat_template(
            conversation, add_generation_prompt=add_generation_prompt, tokenize=False, **template_kwargs
        )

    with refused_by_template("messages"):
        text = render(messages, add_generation_prompt)
    input_ids, starts = tokenize(tokenizer, text)
    template = {**template_kwargs, "add_generation_prompt": add_generation_prompt}
    if chat_ids(tokenizer, messages, "messages", template) != input_ids:
        raise ArgumentError(
            "tokenizer: tokenizing the rendered text with offsets gives other ids than apply_chat_template"
        )

    # Each piece is (first character, whether it is written); a piece runs to the start of the next one.
    pieces = _pieces(render, messages, text, add_generation_prompt, granularity.startswith("sentence"))
    owners = [bisect_right(pieces, start, key=lambda piece: piece[0]) - 1 for start in starts]
    written = dict.fromkeys(owner for owner in owners if pieces[owner][1])
    number_of = {owner: number for number, owner in enumerate(written)}
    return as_row(input_ids), as_row([number_of.get(owner, -1) for owner in owners])


def own_tokens(tokenizer, messages: Sequence[Mapping], input_ids: torch.Tensor) -> torch.Tensor | None:
    """Which tokens of a chat are its messages' contents, and not what the chat template puts around them.

    Args:
        input_ids: int64 [1, T], the chat's.

    Returns:
        bool [1, T]; None where it cannot be known: the tokenizer gives no offsets, or other ids with them, or the
        template hides the contents.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None

    def render(conversation, add_generation_prompt=False):
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, tokenize=False)

    messages = [dict(message) for message in messages]
    with refused_by_template("messages"):
        text = render(messages)
    spans = [block.content for block in _blocks(render, messages, text) if block.content is not None]
    ids, starts = tokenize(tokenizer, text)
    if ids != input_ids[0].tolist():
        return None
    own = [any(begin <= start < end for begin, end in spans) for start in starts]
    return torch.tensor([own], device="cpu") if any(own) else None


def as_row(ids: Sequence[int]) -> torch.Tensor:
    """Ids as int64 [1, T], on the CPU."""
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def chat_ids(
    tokenizer, messages: Sequence[Message], name: str = "text", template: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a chat.

    Args:
        name: of the argument, for errors.
        template: arguments of ``apply_chat_template``, whatever their names.

    Raises:
        ValueError: the chat template refuses it.
    """
    with refused_by_template(name):
        ids = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **(template or {}))
    return list(ids)


@contextlib.contextmanager
def refused_by_template(name: str) -> Iterator[None]:
    """Inside, whatever a chat template raises is a ValueError that names the argument."""
    try:
        yield
    except DeltaMemError:
        raise
    except Exception as error:
        # Templates refuse chats with errors of their own and stumble over others with any kind of error; what they say
        # may quote a whole chat.
        raise ArgumentError(f"{name}: the tokenizer's chat template refuses it: {shortened(error, 200)}") from error


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text are, as (start, end) in characters.

    A sentence ends at ``. ! ? ; :`` or an ellipsis, with the closing quotes and brackets after it, before white space;
    at ``。！？；：``, a danda, an Arabic question mark and their like (``SENTENCE_END``) also where none follows; or at
    a blank line. Several marks in a row end one sentence. The white space after it belongs to the sentence that ended,
    and white space at the beginning of the text to the first one. It knows no abbreviations: "Mr. Smith" is cut after
    "Mr. ". Thai and others that write no marks are one sentence a paragraph.

    Returns:
        Spans that are not empty, in order, without a gap from 0 to len(text); none for an empty text.
    """
    return spans_to(SENTENCE_END, text)


def spans_to(ending: re.Pattern, text: str) -> list[tuple[int, int]]:
    """Where the parts of a text are that end where ``ending`` does."""
    starts = [0, *(match.end() for match in ending.finditer(text))]
    return [(start, end) for start, end in itertools.pairwise([*starts, len(text)]) if start < end]


def tokenize(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and where in it each token begins, in characters; for a fast tokenizer."""
    encoding = tokenizer(text, add_special_tokens=False, padding=False, truncation=False, return_offsets_mapping=True)
    # A token without characters of its own has the offsets (0, 0): it goes with the token before it.
    # A word's leading space is part of its token in many vocabularies, but of the sentence before in the text:
    # the first character that is not white space decides.
    spans = encoding["offset_mapping"]
    starts = itertools.accumulate((end - len(text[start:end].lstrip() or text[start:end]) for start, end in spans), max)
    return list(encoding["input_ids"]), list(starts)


# Blocks of the rendered chat


def _pieces(render: Render, messages, text: str, add_generation_prompt: bool, by_sentence: bool):
    """Tiles the text: (first character, whether written) of each piece, in order, the first one at 0."""
    pieces = [(0, False)]
    lead = next((i for i, message in enumerate(messages) if message["role"] not in _SYSTEM_ROLES), None)
    if lead is None:
        return pieces
    blocks = _blocks(render, messages, text, add_generation_prompt)
    start = blocks[lead - 1].end if lead else 0
    header_start = _header_start(render, messages[lead], text, blocks[lead], start or 0)
    start = start if header_start is None else header_start
    if start is None:
        raise _not_found(lead - 1)
    moved = [block.content for block in blocks[:lead] if block.end is None and block.content]
    for index in range(lead, len(messages)):
        content, end = blocks[index]
        if end is None:
            raise _not_found(index)
        if end < start:
            raise ArgumentError(f"messages[{index}]: the chat template renders it before the message that precedes it")
        if messages[index]["role"] in _SYSTEM_ROLES:
            pieces.append((start, False))
        else:
            # A system message that the template puts into a later one is not written, nor is what stands before it.
            inside = max((stop for begin, stop in moved if start <= begin and stop <= end), default=None)
            pieces += [(start, True)] if inside is None else [(start, False), (inside, True)]
            if by_sentence and content is not None:
                # White space before the content joins the header, so that it never is a sentence.
                begin, stop = max(content[0], start), min(content[1], end)
                pieces += [(begin + first, True) for first, _ in sentence_spans(text[begin:stop])[1:]]
        start = end
    return [*pieces, (start, False)]


def _not_found(index: int) -> ArgumentError:
    return ArgumentError(
        f"messages[{index}]: cannot find where its block ends: the chat template renders the chat up to it "
        "other than within the whole chat, and a mark in the message changes the text around it"
    )


def _blocks(render: Render, messages, text: str, add_generation_prompt: bool = False) -> list[_Block]:
    """The block of each message; end is None where it cannot be found."""
    sign = _unused_character(messages, text)
    places = _mark_all(render, messages, text, add_generation_prompt, sign)
    first_said = min((place.position for place in places.values()), default=len(text))
    blocks, start = [], 0
    for index, message in enumerate(messages):
        place = places.get(index) or _mark_one(render, messages, text, add_generation_prompt, index, sign)
        content = None if place is None else _content_span(message, text, place, start)
        if message["role"] in _SYSTEM_ROLES and start <= first_said and place and place.position > first_said:
            blocks.append(_Block(content, None))  # moved into a later message, as by Mistral's templates
            continue
        end = _block_end(render, messages, text, index, place, content, start, sign)
        if content is None and end is not None:
            content = _find_content(message, text, start, end)
        blocks.append(_Block(content, end))
        start = start if end is None else end
    return blocks


def _block_end(render: Render, messages, text, index, place, content, start, sign) -> int | None:
    before = messages[:index]
    # The end cannot lie before what is known to be inside.
    inside = max(start, place.position if place else 0, content[1] if content else 0)
    # What follows the mark where the chat ends with this message is its trailer.
    mark = _mark(sign, index)
    tail = _tail(render, [*before, place.message], mark) if place else None
    if tail is not None and text.startswith(tail, place.position):
        return max(inside, place.position + len(tail))
    prefix = _try_render(render, [*before, messages[index]])
    if prefix is not None and len(prefix) >= inside and text.startswith(prefix):
        return len(prefix)
    if place is None:
        return None
    if tail is None:
        # Where a template refuses the chat up to here, a short one with a question in front may do as well.
        tail = _tail(render, [_QUESTION, place.message], mark) or ""
    return max(inside, place.position + _trailer_length(text[place.position :], tail))


def _tail(render: Render, conversation, mark: str) -> str | None:
    rendered = _try_render(render, conversation)
    return rendered.split(mark)[1] if rendered is not None and rendered.count(mark) == 1 else None


def _trailer_length(text: str, tail: str) -> int:
    length = common_length(text, tail)
    if length < len(tail):
        # Two different tags both begin with a bracket, which belongs to neither's beginning alone.
        for opening, closing in ("<>", "[]"):
            last = tail.rfind(opening, 0, length)
            if last > tail.rfind(closing, 0, length):
                length = last
    return length


def common_length(first: Sequence, second: Sequence) -> int:
    """How many characters, or tokens, two sequences begin with alike."""
    different = (i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    return next(different, min(len(first), len(second)))


def _header_start(render: Render, message, text: str, block: _Block, floor: int) -> int | None:
    """Where the block of the first message that is written starts.

    Its header is seen between two messages of a made-up chat. None where it looks different there.
    """
    known = block.content[0] if block.content else block.end
    if known is None:
        return None
    thinking = _text_of(message)[: _visible(message)[0]].lstrip()
    for kept in (thinking, thinking.rstrip()):
        if text.endswith(kept, floor, known):
            known -= len(kept)
            break
    in_parts = isinstance(message.get("content"), (list, tuple))
    probe = {key: value for key, value in message.items() if key not in ("tool_calls", "reasoning_content")}
    probe["content"] = [{"type": "text", "text": _PROBE_TEXT}] if in_parts else _PROBE_TEXT
    before = [_QUESTION] if message["role"] == "assistant" else [message, {**_QUESTION, "role": "assistant"}]
    # The last message of a chat may have a thinking block in its header that an earlier one lacks.
    for after in ([_QUESTION], []):
        conversation = [*before, probe, *after]
        rendered = _try_render(render, conversation)
        if rendered is None:
            continue
        blocks = _blocks(render, conversation, rendered)
        start, probed = blocks[len(before) - 1].end, blocks[len(before)]
        if (probed.content is None) is not (block.content is None):
            continue
        # A template that drops the content drops the probe's too: then the whole block is the header.
        stop = probed.content[0] if probed.content else probed.end
        if start is None or stop is None or stop < start:
            continue
        header = rendered[start:stop]
        # The content may begin with white space, which its span leaves out.
        place = known
        while place >= floor + len(header):
            if text.endswith(header, 0, place):
                return place - len(header)
            if not text[place - 1 : place].isspace():
                break
            place -= 1
    return None


def _try_render(render: Render, conversation, add_generation_prompt: bool = False) -> str | None:
    # Templates refuse chats with errors of their own and stumble over others with any kind of error.
    try:
        return render(conversation, add_generation_prompt)
    except Exception:
        return None


# Marks


def _unused_character(messages, text: str) -> str:
    used = set(text).union(*(_text_of(message) for message in messages))
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)


def _mark(sign: str, index: int) -> str:
    return f"{sign}{index}{sign}"


def _mark_all(render: Render, messages, text, add_generation_prompt, sign) -> dict[int, _Marked]:
    """Marks every message but the system's at once. Empty if that changes anything but the marks' places."""
    marked = {
        index: _markings(message, _mark(sign, index))[0]
        for index, message in enumerate(messages)
        if message["role"] not in _SYSTEM_ROLES  # templates look into it for switches
    }
    conversation = [marked[i].message if i in marked else message for i, message in enumerate(messages)]
    rendered = _try_render(render, conversation, add_generation_prompt)
    if rendered is None:
        return {}
    # Text and the indices of the marks take turns.
    parts = re.split(f"{sign}(\\d+){sign}", rendered)
    if "".join(parts[::2]) != text:
        return {}
    indices = [int(index) for index in parts[1::2]]
    positions = itertools.accumulate(len(part) for part in parts[::2])
    return {i: marked[i]._replace(position=p) for i, p in zip(indices, positions) if indices.count(i) == 1}


def _mark_one(render: Render, messages, text, add_generation_prompt, index: int, sign: str) -> _Marked | None:
    mark = _mark(sign, index)
    for marked in _markings(messages[index], mark):
        conversation = [*messages[:index], marked.message, *messages[index + 1 :]]
        rendered = _try_render(render, conversation, add_generation_prompt)
        if rendered is not None and rendered.count(mark) == 1 and rendered.replace(mark, "") == text:
            return marked._replace(position=rendered.index(mark))
    return None


def _markings(message, mark: str) -> list[_Marked]:
    """Ways of putting a mark into a message, the best one first."""
    text = _text_of(message)
    start, end = _visible(message)
    found = []
    if start < end:
        # Before the trailing white space, which many templates trim.
        found.append(_Marked(_with_mark(message, end, mark), ""))
        middle = (start + end) // 2
        if start < middle:
            # Some templates look at how a content ends.
            found.append(_Marked(_with_mark(message, middle, mark), text[middle:end]))
    calls = message.get("tool_calls")
    if isinstance(calls, (list, tuple)) and calls:
        call = _marked_call(calls[-1], mark)
        if call is not None:
            found.append(_Marked({**message, "tool_calls": [*calls[:-1], call]}))
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        reasoning = reasoning.rstrip() + mark + reasoning[len(reasoning.rstrip()) :]
        found.append(_Marked({**message, "reasoning_content": reasoning}))
    if start == end:
        # Last, because templates ask whether there is a content at all.
        found.append(_Marked(_with_mark(message, len(text), mark), ""))
        if text.strip():  # nothing but thinking
            found.append(_Marked(_with_mark(message, len(text.rstrip()), mark), ""))
    return found


def _marked_call(call, mark: str):
    if not isinstance(call, Mapping):
        return None
    if isinstance(call.get("function"), Mapping):
        function = _marked_call(call["function"], mark)
        return None if function is None else {**call, "function": function}
    return {**call, "name": call["name"] + mark} if isinstance(call.get("name"), str) else None


def _with_mark(message, place: int, mark: str) -> dict:
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        content = content or ""
        return {**message, "content": content[:place] + mark + content[place:]}
    parts, offset = [], 0
    for part in content or [{"type": "text", "text": ""}]:
        text = part["text"]
        if mark and offset <= place <= offset + len(text):
            text = text[: place - offset] + mark + text[place - offset :]
            mark = ""
        parts.append({**part, "text": text})
        offset += len(part["text"])
    return {**message, "content": parts}


# Contents


def _text_of(message, separator: str = "") -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else separator.join(part["text"] for part in content)


def _visible(message, separator: str = "") -> tuple[int, int]:
    """The content without white space around it, and without the thinking at its beginning."""
    text = _text_of(message, separator)
    start = 0
    if message["role"] == "assistant" and _THINK_END in text:
        start = text.rindex(_THINK_END) + len(_THINK_END)
    body = text[start:]
    start += len(body) - len(body.lstrip())
    return start, start + len(body.strip())


def _content_span(message, text: str, place: _Marked, floor: int) -> tuple[int, int] | None:
    """Where the visible content is: as much of it as the text has before the content's end."""
    if place.rest is None or not text.startswith(place.rest, place.position):
        return None
    end = place.position + len(place.rest)
    length = 0
    for separator in ("", "\n"):  # templates join the parts of a content with one or the other
        start, stop = _visible(message, separator)
        content = _text_of(message, separator)[start:stop]
        window = text[max(floor, end - len(content)) : end]
        length = max(length, common_length(content[::-1], window[::-1]))
    return end - length, end


def _find_content(message, text: str, start: int, end: int) -> tuple[int, int] | None:
    first, last = _visible(message)
    content = _text_of(message)[first:last]
    if not content or text.count(content, start, end) != 1:
        return None
    place = text.index(content, start, end)
    return place, place + len(content)
