"""Torch as notebooks use it: compiled, scripted, quantised, half precise, in train mode, out of transformers."""

# ruff: noqa: E501 - a cell is easier to read in as few lines as it has
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]

NET = (
    "import torch\nfrom torch import nn\ntorch.manual_seed(0)\n"
    "net = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 2)).eval()\n"
    "def predict(net, x):\n    with torch.no_grad(): return net(torch.tensor([x], dtype=net_dtype)).float().tolist()\n"
    "net_dtype = torch.float32\nX = [0.5] * 40"
)
DEPLOY = "deploy(net, predict, sample={'x': X}, names=('net', 'predict'))"


def test_a_module_in_eval_mode_is_equal_and_its_weights_are_written_once(book: Any) -> None:
    """A plain module: equal answers, weights as blobs that the next deploy does not write again."""
    card = book.deploy(NET, DEPLOY)
    assert card["parity"]["state"] == "equal"
    assert card["parity"]["note"] == ""
    blobs = card["receipt"]["blobs"]
    assert blobs["new"] == blobs["count"] > 0
    again = book.deploy("def predict(net, x): return [float(net(torch.tensor([x]))[0, 0])]", DEPLOY)["receipt"]["blobs"]
    assert (again["new"], again["new_bytes"], again["count"]) == (0, 0, blobs["count"])


def test_train_mode_with_dropout_is_said_and_not_switched(book: Any) -> None:
    """A model left in train mode answers at random: the card says why, and the model stays in train mode."""
    card = book.deploy(NET + "\nnet.train()", DEPLOY)
    assert "not deterministic" in card["parity"]["note"]
    assert "the model is in train mode" in card["parity"]["note"]
    assert book.run("print(net.training)").strip() == "True"


def test_batch_norm_in_train_mode_changes_the_model_while_it_answers(book: Any) -> None:
    """Predict itself changes the model's statistics: what travels is the state before that, so answers agree."""
    card = book.deploy(
        "import torch\nfrom torch import nn\nnet = nn.BatchNorm1d(3000).train()\n"
        "def predict(net, x):\n    net(torch.arange(6000.).reshape(2, 3000)); return float(net.running_mean[5]) + x",
        "deploy(net, predict, sample={'x': 1.0})",
    )
    assert card["parity"]["state"] == "equal"


def test_half_precision_quantised_and_scripted_modules(book: Any) -> None:
    """bf16, dynamically quantised and TorchScript modules answer alike outside the notebook."""
    book.run("import warnings; warnings.simplefilter('ignore')\n" + NET)
    for change, dtype in (
        ("net.bfloat16()", "torch.bfloat16"),
        ("torch.ao.quantization.quantize_dynamic(net, {nn.Linear})", "torch.float32"),
        ("torch.jit.script(net)", "torch.float32"),
    ):
        card = book.deploy(NET + f"\nnet = {change}; net_dtype = {dtype}", DEPLOY)
        assert card["parity"]["state"] == "equal", change


def test_a_compiled_module(book: Any) -> None:
    """torch.compile travels as the module it compiles; the clean process compiles it again."""
    card = book.deploy(NET + "\nnet = torch.compile(net, backend='eager')", DEPLOY)
    assert card["parity"]["state"] == "equal"


def test_tensors_as_answers(book: Any) -> None:
    """0-d and bf16 tensors, tensors that want gradients, and containers of them are answers."""
    book.run("import torch")
    card = book.deploy(
        "def predict(x):\n"
        "    t = torch.ones(2, requires_grad=True)\n"
        "    return {'zero': torch.tensor(1.5), 'half': torch.ones(2, dtype=torch.bfloat16), 'grad': t * x, 'all': (t,)}",
        "deploy(predict, sample={'x': 2})",
    )
    assert card["parity"]["state"] == "equal"


def test_one_attribute_of_a_trainer_travels_without_the_trainer(book: Any) -> None:
    """`%deploy trainer.model predict` takes the model; optimiser, data and the trainer itself stay home."""
    card = book.deploy(
        NET
        + "\nclass Trainer: pass\ntrainer = Trainer(); trainer.model = net; trainer.data = torch.empty(50_000_000)\n"
        "predict([*[net]][0], X)\nfinal = trainer.model",
        "deploy(trainer.model, predict, sample={'x': X}, names=('trainer.model', 'predict'))",
    )
    assert card["call"] == "predict(net ← trainer.model, x)"
    assert card["receipt"]["blobs"]["bytes"] < 100_000


def test_a_hub_shaped_folder_becomes_a_pipeline(book: Any) -> None:
    """--model-from with a folder of a hub: files by digest, and the pipeline that its config names."""
    pytest.importorskip("transformers")
    book.run(
        "import os, json, torch\nfrom transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast\n"
        "torch.manual_seed(0)\nos.makedirs('hub')\nopen('hub/vocab.txt', 'w').write('\\n'.join(['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]','fine','bad']))\n"
        "config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)\n"
        "BertForSequenceClassification(config).eval().save_pretrained('hub')\n"
        "BertTokenizerFast('hub/vocab.txt').save_pretrained('hub')\n"
        "def predict(model, text): return model(text)[0]['label']"
    )
    card = book.deploy("deploy(predict, model_from='hub', sample={'text': 'fine'})")
    assert card["call"] == "predict(model ← hub, text)"
    assert card["parity"]["state"] == "not compared"
    assert "model.safetensors" in card["receipt"]["files"]
