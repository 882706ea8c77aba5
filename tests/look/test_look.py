"""A look inside a model: what is found is what the layers do, and the page shows it, in a browser too."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastbert_hf import FastBertConfig, FastBertModel
from fastbert_hf.cli.main import main
from fastbert_hf.look import look_inside, render_page
from fastbert_hf.look.routes import describe_leaves, observed
from tests.processes import CHILD_SECONDS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "</script>", "dog", "ran", "&amp;", "<b>"]
TEXTS = ["the cat sat on a mat", "a dog ran on the mat </script> <b> &amp;"]
FORMS = {
    "leaf": {"fff_depth": 2, "fff_leaf_width": 4, "fff_trees": 2},
    "published": {"fff_depth": 3, "fff_trees": 1},
    "one leaf": {"fff_depth": 0, "fff_leaf_width": 4},
    "deep": {"fff_depth": 7},
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# clicks as a reader would, and leaves what is seen then in the page
CLICKS = """
<script>
const seen = {errors, token: [], layer: null};
const buttons = (id) => [...document.getElementById(id).querySelectorAll("button")];
const nodesOn = () => [...document.querySelectorAll("#branches circle.on")].map((dot) => dot.dataset.node);
buttons("tokens").forEach((_, i) => {
  buttons("tokens")[i].click();
  seen.token.push({nodes: nodesOn(), words: document.getElementById("verdict").textContent});
});
buttons("layers")[1].click();
seen.layer = nodesOn();
buttons("leaves")[0].click();
seen.leaf = {nodes: nodesOn(), title: document.getElementById("leaf-title").textContent};
seen.wide = document.documentElement.scrollWidth > innerWidth;
seen.cells = buttons("grid").length;
document.body.append(Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)}));
</script>
"""


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture(scope="module", params=FORMS)
def model(request, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = FastBertConfig(vocab_size=len(tokenizer), **sizes, **FORMS[request.param])
    return FastBertModel(config).eval()


@pytest.fixture(scope="module")
def found(model, tokenizer):
    return look_inside(model, tokenizer, TEXTS[:1], TEXTS)


@torch.no_grad()
def test_leaves_and_confidences_are_those_of_the_layers(model, tokenizer, found):
    with observed(model, lambda layer, x: (layer, x)) as inputs:
        model(**tokenizer(TEXTS[0], return_tensors="pt"))
    assert len(inputs) == len(found["layers"]) == 2
    for number, ((layer, x),) in enumerate(inputs):
        routes = found["texts"][0]["layers"][number]
        leaves = torch.tensor([tree["leaves"] for tree in routes]).T  # (T, P)
        logits = torch.tensor([tree["logits"] for tree in routes]).transpose(0, 1)  # (T, P, D)
        confidences = torch.tensor([tree["confidence"] for tree in routes]).T
        if found["form"] == "leaf":
            expected, confidence = layer.route(x)
            torch.testing.assert_close(confidences, confidence[0], rtol=0, atol=1e-4)
        else:
            _, visited, all_logits = torch.ops.fastbert.fff_v1(
                x[0], layer.weight_in, layer.bias_in, layer.weight_out, layer.trees, layer.depth, layer.activation
            )
            expected = visited[None, :, :, -1] - (2**layer.depth - 1)
            torch.testing.assert_close(logits, all_logits[:, :, :-1], rtol=1e-3, atol=1e-6)
        assert torch.equal(leaves, expected[0].long())
        places = 2 ** torch.arange(layer.depth - 1, -1, -1)
        assert torch.equal(((logits > 0) * places).sum(dim=2), leaves), "right is 1 and left is 0"


def test_usage_counts_every_token_once_and_no_padding(found, tokenizer):
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    for layer in found["layers"]:
        for usage in layer["usage"]:
            assert usage["tokens"] == tokens
            if layer["depth"] < 7:
                assert sum(leaf["count"] for leaf in usage["leaves"].values()) == tokens
            assert usage["used"] <= 2 ** layer["depth"] and usage["effective"] <= usage["used"] + 0.01


def test_typical_tokens_are_those_that_go_to_the_leaf_more_than_others():
    ids, taken = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 1, 1, 0, 0])
    described = describe_leaves(ids, taken, [0, 1, 2], "abc".__getitem__)
    assert (described["tokens"], described["used"], described["effective"]) == (8, 2, 2.0)
    left, right, empty = (described["leaves"][leaf] for leaf in range(3))
    assert left == {"count": 4, "common": [["a", 2, 4], ["c", 2, 2]], "typical": [["c", 2, 2]]}
    assert right["typical"] == [["b", 2, 2]] and right["common"][0] == ["a", 2, 4]
    assert empty == {"count": 0, "common": [], "typical": []}


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text of its data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._in_data = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in_data = dict(attributes).get("id") == "data"

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, data):
        self.data += data if self._in_data else ""


def test_the_page_holds_what_was_found_and_asks_for_nothing_else(found):
    text = render_page(found, "a <model> & more", "two texts")
    page = Page(text)
    held = json.loads(page.data)
    assert held["model"] == "a <model> & more" and held["source"] == "two texts"
    assert held["texts"] == found["texts"]
    assert held["layers"] == json.loads(json.dumps(found["layers"]))
    assert "<title>A look inside a &lt;model&gt; &amp; more</title>" in text
    outside = [a for _, a in page.tags if a.get("src") or a.get("href", "data:").partition(",")[0] != "data:"]
    assert not outside and "@import" not in text and "url(" not in text
    assert [tag for tag, _ in page.tags].count("script") == 2, "text ended the element it stands in"


def test_a_dense_model_is_refused(tokenizer):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    model = FastBertModel(FastBertConfig(ffn_type="dense", intermediate_size=8, **sizes))
    with pytest.raises(ValueError, match=r"FastBertModel has no trees; expected .*ffn_type='fff'"):
        look_inside(model, tokenizer, TEXTS)


def test_a_text_is_cut_to_what_the_model_reads(tokenizer):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    model = FastBertModel(FastBertConfig(fff_depth=2, max_position_embeddings=6, **sizes)).eval()
    found = look_inside(model, tokenizer, TEXTS, [" ".join(WORDS)])
    assert [len(text["tokens"]) for text in found["texts"]] == [6, 6]
    assert found["layers"][0]["usage"][0]["tokens"] == 6


def test_the_command_writes_the_page(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    words = ["look", "--model_name_or_path", str(tmp_path / "model"), "--text", *TEXTS]
    main([*words, "--train_file", str(tmp_path / "text.txt"), "--output", str(tmp_path / "page.html")])
    held = json.loads(Page((tmp_path / "page.html").read_text()).data)
    assert [text["text"] for text in held["texts"]] == TEXTS and held["source"] == "2 texts of text.txt"
    assert held["layers"] == json.loads(json.dumps(look_inside(model, tokenizer, TEXTS, TEXTS)["layers"]))
    assert "2 layers" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--output is '.*'; expected a file in a folder that exists"):
        main([*words, "--output", str(tmp_path / "no" / "page.html")])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_click_on_a_token_shows_its_way_in_a_browser(found, tmp_path):
    catcher = "<script>const errors = []; onerror = (message) => errors.push(message);</script>"
    page = render_page(found, "model", "two texts").replace("<head>", f"<head>{catcher}", 1)
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{CLICKS}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *options, profile, "--window-size=500,900", "--dump-dom", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert "CONSOLE" not in result.stderr, result.stderr
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', result.stdout, re.DOTALL)[1]))
    text, depth = found["texts"][0], found["layers"][0]["depth"]

    def way(leaf):
        return {f"{level}:{leaf >> (depth - level)}" for level in range(depth + 1)}

    assert seen["errors"] == [] and not seen["wide"]
    assert len(seen["token"]) == len(text["tokens"]) and seen["cells"] == 2 * len(text["tokens"])
    for number, (token, shown) in enumerate(zip(text["tokens"], seen["token"])):
        leaf = text["layers"][0][0]["leaves"][number]
        assert set(shown["nodes"]) == way(leaf)
        assert shown["words"].startswith(f"{token} takes leaf {leaf} of {2**depth}")
    assert set(seen["layer"]) == way(text["layers"][1][0]["leaves"][-1])
    first = 0 if depth < 7 else min(text["layers"][1][0]["leaves"])
    assert set(seen["leaf"]["nodes"]) == way(first)
    assert seen["leaf"]["title"] == f"What else goes to leaf {first} of layer 1"
