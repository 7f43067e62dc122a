"""The page as a file: self-contained, its data exact, its policy strict, untrusted text no more than text."""

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from inspection_support import CHAT, CONFIGS, TOKENIZER, filled, model_with, random_memory, random_trace, report

from deltamem_fast.inspection.page import TEMPLATE, fill, safe_json, write_page
from deltamem_fast.inspection.trace import trace
from deltamem_fast.memory.figures import distance

ATTACK = "</script><script>alert(1)</script><!-- {{policy}} &amp; \u2028 \ud800"


class Page(HTMLParser):
    """The elements of a page: [tag, attributes, text up to the first tag inside or the end]."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rest = [], ["", {}, ""]
        self.open = self.rest
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open = [tag, dict(attrs), ""]
        self.elements.append(self.open)

    def handle_endtag(self, tag):
        self.open = self.rest

    def handle_data(self, data):
        self.open[2] += data

    def all(self, tag, **wanted):
        return [e for e in self.elements if e[0] == tag and all(e[1].get(k) == v for k, v in wanted.items())]


def data_of(path):
    return json.loads(Page(path.read_text("utf-8")).all("script", id="data")[0][2])


def unpacked(text, *shape):
    return torch.tensor(np.frombuffer(base64.b64decode(text), dtype="<f4")).reshape(shape)


def test_the_page_holds_the_memory_exactly(tmp_path):
    memory = random_memory(layers=(1, 4, 5), rows=2, heads=2, rank=3)
    memory._skipped[4] += 2
    path = write_page(tmp_path / "new" / "page.html", memory, row=1, title="A & B", facts={"File": "a.safetensors"})
    data = data_of(path)
    assert data["layers"] == [1, 4, 5] and data["shape"] == [2, 3, 3] and data["facts"] == [["File", "a.safetensors"]]
    assert data["other"] is None and data["trace"] is None
    assert data["figures"] == report(memory, 1).to_dict()["rows"] and data["figures"][2]["skipped"] == 2
    expected = torch.stack([memory[i][1] for i in (1, 4, 5)])
    assert torch.equal(unpacked(data["state"], 3, 2, 3, 3), expected)
    page = Page(path.read_text("utf-8"))
    assert page.all("title")[0][2] == page.all("h1")[0][2] == "A & B" and page.all("html")[0][1] == {"lang": "en"}
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_the_page_holds_the_other_memory_and_the_trace_exactly(tmp_path):
    model = model_with(CONFIGS["ssw"])
    memory, other = filled(model), filled(model, seed=5)
    found = trace(model, TOKENIZER, CHAT, memory)
    data = data_of(write_page(tmp_path / "a.html", memory, trace=found, other=other, other_name="bob"))
    assert data["other"]["name"] == "bob" and data["other"]["figures"] == distance(memory, other).to_dict()["rows"]
    assert torch.equal(unpacked(data["other"]["state"], 3, 1, 8, 8), torch.stack([other[i][0] for i in range(3)]))
    told, length = data["trace"], len(found)
    assert told["tokens"] == list(found.tokens) and told["segments"] == list(found.segment_ids) and told["begin"]
    for name in ("writes", "reads", "beta", "norms"):
        assert torch.equal(unpacked(told[name], length, 3, 1), getattr(found, name))
        assert told["totals"][name] == pytest.approx(found.total(name).tolist(), rel=1e-5)
    assert told["held"] == list(range(length + 1)) and not told["frozen"]
    assert torch.equal(unpacked(told["states"], length, 3, 1, 8, 8), found.states)
    assert torch.equal(unpacked(told["initial"], 3, 1, 8, 8), found.initial)

    data = data_of(write_page(tmp_path / "b.html", trace=dataclasses.replace(found, states=None)))
    assert data["figures"] == report(found.memory).to_dict()["rows"] and not data["trace"]["begin"]
    assert data["trace"]["held"] == [0, length]
    assert torch.equal(unpacked(data["trace"]["states"], 1, 3, 1, 8, 8)[0], found.final)


def test_nothing_is_asked_of_anyone(tmp_path):
    found, memory = random_trace()
    text = write_page(tmp_path / "a.html", memory, trace=found, other=random_memory(range(3), 1, 2, 4)).read_text()
    page = Page(text)
    text = text.replace(page.all("script", id="data")[0][2], "")  # base64 may have two slashes in a row
    assert not re.search(r"//\w|url\(|@import|fetch\(|XMLHttp|WebSocket|import\(|\bsrc=|\bhref=", text)
    assert not [e for e in page.elements if e[0] in ("link", "img", "iframe", "object", "embed", "base", "form")]
    assert not [e for e in page.elements if any(name.startswith("on") or name == "style" for name in e[1])]
    assert "innerHTML" not in text and "insertAdjacent" not in text and "document.write" not in text


def test_the_policy_allows_what_is_in_the_template_and_nothing_else(tmp_path):
    text = write_page(tmp_path / "a.html", random_memory()).read_text("utf-8")
    page = Page(text)
    (meta,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.split(" ", 1) for rule in meta[1]["content"].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'" and "unsafe" not in str(rules)
    for tag in ("style", "script"):
        inside = [e[2] for e in page.all(tag) if not e[1]]
        digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in inside]
        assert digests and rules[f"{tag}-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert len(page.all("script")) == len([e for e in page.all("script") if not e[1]]) + 1


def test_untrusted_text_is_text(tmp_path):
    found, memory = random_trace()
    found = dataclasses.replace(found, tokens=(ATTACK, *found.tokens[1:]))
    clean = write_page(tmp_path / "a.html", memory, trace=found, other=memory).read_text("utf-8")
    path = write_page(
        tmp_path / "b.html", memory, trace=found, other=memory, title=ATTACK, other_name=ATTACK, facts={ATTACK: ATTACK}
    )
    page = Page(path.read_text("utf-8"))
    assert [e[:2] for e in page.elements if e[0] != "meta"] == [e[:2] for e in Page(clean).elements if e[0] != "meta"]
    data = data_of(path)
    assert data["trace"]["tokens"][0] == data["other"]["name"] == ATTACK == data["facts"][0][0]
    assert page.all("h1")[0][2] == ATTACK.replace("\ud800", "?")
    assert not re.search("[<>&\u2028]", page.all("script", id="data")[0][2])


def test_json_that_is_safe_inside_a_script():
    value = {"a": ATTACK, "b": ["<!--", "-->", "日本"], "c": None}
    text = safe_json(value)
    assert json.loads(text) == value and not set("<>&\u2028\ud800") & set(text) and "日本" in text
    with pytest.raises(ValueError):
        safe_json({"a": math.nan})
    assert (
        fill("{{title}}|{{data}}|{{other}}", "{{data}}<", {"x": "{{policy}}"})
        == '{{data}}&lt;|{"x":"{{policy}}"}|{{other}}'
    )


def test_states_that_are_not_finite_can_be_shown(tmp_path):
    memory = random_memory()
    memory[1][0, 0, 2, 3] = math.nan
    memory[1][0, 0, 0, 0] = -math.inf
    data = data_of(write_page(tmp_path / "a.html", memory, other=memory))
    assert data["figures"][1]["norm"] is None and data["other"]["figures"][1]["distance"] is None
    assert math.isnan(unpacked(data["state"], 2, 1, 8, 8)[1, 0, 2, 3].item())


def test_what_makes_no_page(tmp_path):
    found, memory = random_trace()
    path = tmp_path / "a.html"
    for call, message in (
        (lambda: write_page(path), "memory: got neither a memory nor a trace"),
        (lambda: write_page(path, memory, row=1), "row: got 1, allowed an integer, 0 to 0"),
        (lambda: write_page(path, memory, other=random_memory()), "other: got layers"),
        (lambda: write_page(path, random_memory(rows=2), other=random_memory(), row=1), "other: row: got 1"),
        (lambda: write_page(path, found.memory, trace=found), "trace: did not start from this memory"),
        (lambda: write_page(path, random_memory(), trace=found), "trace: did not start from this memory"),
        (lambda: write_page(path, random_memory(rows=0)), "holds no conversation"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_the_template_is_plain_and_narrow():
    lines = TEMPLATE.read_text("utf-8").splitlines()
    assert max(map(len, lines)) <= 120 and not any(line != line.rstrip() or "\t" in line for line in lines)
