"""Tests of what the scripts and the README claim, in the order of the scripts. Run with: pytest test_all.py"""

import argparse
import collections
import contextlib
import gzip
import hashlib
import io
import itertools
import math
import os
import random
import re
import runpy
import socket
import struct
import subprocess
import sys

import matplotlib
import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from torch import nn

matplotlib.use("Agg")  # no display needed

import attention as attention_script  # noqa: E402
import counting  # noqa: E402
import parity  # noqa: E402
import saliency  # noqa: E402
import translate  # noqa: E402
from attention import attention, download  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts with the same random numbers, and uses one thread: all tensors are small."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def run(script, *options):
    """Run `python script options` in this process; returns the script's globals and what it printed."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [script, "--device", "cpu", *map(str, options)])
        try:
            values = runpy.run_path(os.path.join(HERE, script), run_name="__main__")
        except SystemExit as stop:  # the end of --test, --line, --sweep, ...
            if stop.code:
                raise
            values = {}
    return values, output.getvalue()


def read(name):
    """The text of a file of this project."""
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def result_of(output):
    """The numbers of the result line, which is the last one."""
    assert output.splitlines()[-1].startswith("result: ")
    return {key: float(value) for key, value in re.findall(r"(\w+)=(\S+)", output.splitlines()[-1])}


def wild(module, std=0.5):
    """Give the module large random weights, biases included, so that no mistake hides behind a zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


def classifier(*sizes):
    """A parity classifier in float64."""
    return wild(parity.TransformerClassifier(2, 2, *sizes).double(), 2.0)


# ----------------------------------------------------------------------------------------------------------------------
# attention.py

MASKS = {"none": None,
         "causal": torch.ones(5, 7).tril().bool(),
         "padding": (torch.arange(7) < torch.tensor([7, 4])[:, None])[:, None, None, :],        # (B, 1, 1, T_k)
         "random": torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6,
         "a query with nothing to attend to": torch.ones(5, 7).tril(-1).bool()}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_formula_equals_the_fused_kernel_in_outputs_and_gradients(mask):
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    results = []
    for need_weights in (True, False):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        output, weights = attention(*inputs, mask, need_weights=need_weights)
        assert weights.shape == (2, 3, 5, 7) if need_weights else weights is None
        output.square().sum().backward()
        results.append([output, *(t.grad for t in inputs)])
    for explicit, fused in zip(*results):
        assert torch.allclose(explicit, fused, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (4, 2, 3)], ids=str)
@pytest.mark.parametrize("activation, need_weights", [("softmax", True), ("softmax", False), ("sigmoid", True)])
def test_a_query_with_nothing_to_attend_to_gets_zeros_and_finite_gradients(lead, activation, need_weights):
    q, k, v = (torch.randn(*lead, 4, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    output, weights = attention(q, k, v, mask, activation, need_weights)
    output.sum().backward()
    assert (output[..., 2, :] == 0).all() and (output[..., 1, :] != 0).any()
    assert weights is None or (weights[..., 2, :] == 0).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_gradient_is_right_by_finite_differences(activation):
    q, k, v = (torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True) for T in (4, 5, 5))
    mask = torch.ones(4, 5).tril(-1).bool()
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask, activation), (q, k, v))


def test_a_float_mask_is_refused():
    x = torch.randn(2, 4)
    with pytest.raises(AssertionError, match="True = may attend"):
        attention(x, x, x, torch.ones(2, 2), need_weights=False)


def test_the_script_prints_the_worked_example_of_its_docstring_and_learns_the_dictionary(tmp_path):
    _, output = run("attention.py", "--out_dir", tmp_path)
    assert result_of(output)["accuracy"] > 0.999 and (tmp_path / "attention_dictionary.png").exists()
    query, key = torch.tensor([2., 0, 2, 0]), torch.tensor([[1., 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]])
    output, weights = attention(query[None], key, torch.tensor([[10., 0], [0, 10], [5, 5]]))
    for numbers in (query @ key.T, query @ key.T / 2, weights[0], output[0]):
        assert " ".join(f"{x:.2f}" for x in numbers) in attention_script.__doc__


def test_the_fused_kernel_does_not_store_the_weights():
    q, k, v = (torch.randn(1, 4, 512, 64, requires_grad=True) for _ in range(3))
    explicit, fused = (attention_script.saved_for_backward(q, k, v, need_weights) for need_weights in (True, False))
    assert explicit >= 4 * 4 * 512 * 512 and fused < explicit / 7


def test_a_download_is_checked_written_once_and_reported_if_it_fails(tmp_path):
    source, path = tmp_path / "source", tmp_path / "data" / "file"
    source.write_bytes(b"content")
    with pytest.raises(SystemExit, match="cannot download .*invalid hash value"):
        download(source.as_uri(), str(path), "0" * 64)
    with pytest.raises(SystemExit, match=f"cannot download .*: try again, or save the file as {path} yourself"):
        download("https://127.0.0.1:1/file", str(path), "0" * 64)          # no server there
    assert not path.exists()
    download(source.as_uri(), str(path), hashlib.sha256(b"content").hexdigest())
    download("https://127.0.0.1:1/file", str(path), "0" * 64)              # the file is there: no download
    assert path.read_bytes() == b"content"


# ----------------------------------------------------------------------------------------------------------------------
# parity.py
def test_the_classes_have_the_shapes_and_parts_of_the_exercise():
    x = torch.randn(4, 10, 16)
    assert parity.SelfAttention(16, 8)(x).shape == (4, 10, 16)
    assert parity.MultiHeadSelfAttention(16, 8, 3)(x).shape == (4, 10, 16)
    assert parity.TransformerBlock(16, 8, 3)(x).shape == (4, 10, 16)
    assert parity.TransformerClassifier(2, 5, 16, 8, 3)(torch.randint(2, (4, 10))).shape == (4, 5)
    model = parity.TransformerClassifier(2, 2)
    assert [name for name, _ in model.named_children()] == ["token_embedding", "transformer_model", "final_layer_norm",
                                                            "classifier"]
    assert [name for name, _ in model.transformer_model[0].named_children()] == ["ln1", "attn", "ln2", "mlp"]
    for sizes, params in {(8, 8, 2, 4, 2): 2426, (2, 1, 1, 1, 1): 58, (4, 1, 1, 1, 0): 46, (3, 1, 1, 1, 0): 32}.items():
        assert sum(p.numel() for p in parity.TransformerClassifier(2, 2, *sizes).parameters()) == params


@pytest.mark.parametrize("n_heads", [1, 2])
def test_the_block_equals_torch(n_heads):
    theirs = wild(nn.TransformerEncoderLayer(8, n_heads, 32, 0.0, F.silu, batch_first=True, norm_first=True))
    ours, width = parity.TransformerBlock(8, 8 // n_heads, n_heads), 8 // n_heads
    with torch.no_grad():  # torch's heads return d_model / n_heads features: the others stay zero, and w_o ignores them
        ours.attn.w_o.weight.zero_()
        ours.attn.w_o.bias.copy_(theirs.self_attn.out_proj.bias)
        for h, head in enumerate(ours.attn.heads):
            rows = slice(h * width, (h + 1) * width)
            for linear, weight, bias in zip((head.w_q, head.w_k, head.w_v), theirs.self_attn.in_proj_weight.chunk(3),
                                            theirs.self_attn.in_proj_bias.chunk(3)):
                linear.weight.zero_()[:width] = weight[rows]
                linear.bias.zero_()[:width] = bias[rows]
            ours.attn.w_o.weight[:, h * 8:h * 8 + width] = theirs.self_attn.out_proj.weight[:, rows]
    for mine, other in ((ours.ln1, theirs.norm1), (ours.ln2, theirs.norm2), (ours.mlp[0], theirs.linear1),
                        (ours.mlp[2], theirs.linear2)):
        mine.load_state_dict(other.state_dict())
    x = torch.randn(4, 10, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_the_order_of_the_bits_is_invisible_and_so_is_a_repetition(n_layers):
    model, strings = classifier(8, 4, 2, 4, n_layers), torch.randint(2, (20, 9))
    assert torch.allclose(model(strings), model(strings[:, torch.randperm(9)]), atol=1e-8)
    assert torch.allclose(model(strings), model(torch.cat([strings, strings], dim=1)), atol=1e-8)
    assert (strings.sum(dim=1) % 2 == 1).any()                           # but the doubled string is always even


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_width_1_cannot_work(n_layers):
    model = classifier(1, 1, 1, 1, n_layers)
    strings, _, _ = parity.one_string_per_count(10)
    assert (model(strings) == model(strings)[0]).all() and parity.exact_accuracy(model, 10)[0] == 0.5


@pytest.mark.parametrize("n_layers", [0, 2])
def test_the_exact_accuracy_is_that_of_trying_all_strings(n_layers):
    model = classifier(8, 4, 2, 1, n_layers)
    assert 0 < parity.exact_accuracy(model, 8)[0] < 1
    assert parity.exact_accuracy(model, 8)[0] == pytest.approx(parity.check_on_all_strings(model, 8)[0])


def test_the_best_accuracy_that_a_number_of_sign_changes_allows():
    _, parities, fractions = parity.one_string_per_count(10)
    best = collections.Counter()
    for signs in itertools.product([0, 1], repeat=11):
        n_changes = sum(a != b for a, b in zip(signs, signs[1:]))
        best[n_changes] = max(best[n_changes], fractions[torch.tensor(signs) == parities].sum().item())
    assert [round(best[n], 4) for n in range(5, 11)] == [0.9453, 0.9805, 0.9893, 0.998, 0.999, 1.0]
    assert best[5] < 0.95 < best[6]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_sum_of_silus_times_its_denominators_has_the_terms_that_the_bound_counts(width):
    """Every subset of the units is an exponential, times a polynomial of degree 1, or 0 for the set of all units."""
    w, b, a = torch.randn(3, width).double()
    c, k = torch.linspace(-2, 2, 50).double(), 0.7
    units = w * c.unsqueeze(1) + b                                        # (50, width)
    product = ((F.silu(units) * a).sum(dim=1) + k) * (1 + (-units).exp()).prod(dim=1)
    terms, n_coefficients = torch.zeros(50).double(), 0
    for size in range(width + 1):
        for subset in itertools.combinations(range(width), size):
            rest = [j for j in range(width) if j not in subset]
            polynomial = k + (a[rest] * units[:, rest]).sum(dim=1)
            terms += polynomial * (-units[:, list(subset)].sum(dim=1)).exp()
            n_coefficients += 2 if rest else 1
    assert torch.allclose(product, terms) and n_coefficients - 1 == 2 ** (width + 1) - 2


def test_the_search_writes_its_function_into_the_real_model():
    model = parity.search(2, 4, n_starts=100, rounds=2, steps=200)
    assert sum(p.numel() for p in model.parameters()) == 20
    accuracy, apart = parity.check_on_all_strings(model, 4)
    assert accuracy == parity.exact_accuracy(model, 4)[0] == 1 and apart > 0.01


def test_a_short_training_learns_parity_and_repeats_itself(tmp_path):
    options = ["--seq_len", 4, "--steps", 150, "--out_dir", tmp_path]
    values, output = run("parity.py", *options)
    assert set(result_of(output)) == {"accuracy_val", "accuracy_all", "params", "seconds"}
    assert result_of(output)["accuracy_all"] == 1 and result_of(output)["params"] == 2426
    saved = torch.load(tmp_path / "parity.pt", map_location="cpu", weights_only=True)
    model = parity.TransformerClassifier(2, 2, *saved["sizes"])
    model.load_state_dict(saved["weights"])
    assert parity.exact_accuracy(model, 4)[0] == 1
    again, _ = run("parity.py", *options)
    assert all(torch.equal(p, q) for p, q in zip(values["model"].parameters(), again["model"].parameters()))
    assert {path.name for path in tmp_path.glob("*.png")} == {"parity_heads.png"}


def test_the_sweep_saves_the_smallest_models_that_work(tmp_path, monkeypatch):
    small = re.sub("WITH_BLOCKS = .*", "WITH_BLOCKS = {(2, 1, 1, 1, 1): 1}", read("parity.py"))
    small = re.sub("WIDTHS = .*", "WIDTHS = [2]", small)
    small = small.replace("steps=2000", "steps=5").replace("n_starts=1500, rounds=10", "n_starts=100, rounds=2")
    (tmp_path / "parity.py").write_text(small, "utf-8")
    monkeypatch.syspath_prepend(HERE)
    _, output = run(tmp_path / "parity.py", "--sweep", "--seq_len", 4, "--out_dir", tmp_path)
    result = result_of(output)
    assert (result["smallest_95"], result["smallest_all"]) == (20, 20)
    assert (tmp_path / "parity_20.pt").exists() and (tmp_path / "parity_20.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# counting.py
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_counting_model_is_the_plain_formula(activation):
    model, digits = wild(counting.CountingModel(3, 6, 4, activation).double(), 2.0), [2, 0, 0, 1, 2]
    p = {name: value.detach() for name, value in model.named_parameters()}
    logits, weights = model(F.one_hot(torch.tensor([digits])).double())
    for v, query in enumerate(p["query"][0]):
        scores = [query @ (p["key.weight"][:, d] + p["key.bias"]) / math.sqrt(4) for d in digits]
        row = [1 / (1 + math.exp(-score)) for score in scores]
        if activation == "softmax":
            row = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        x = query + sum(weight * (p["value.weight"][:, d] + p["value.bias"]) for weight, d in zip(row, digits))
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
        assert torch.allclose(weights[0, v], torch.tensor(row).double())
        assert torch.allclose(logits[0, v], p["out.weight"] @ x + p["out.bias"])


def test_under_softmax_a_sequence_repeated_twice_has_the_same_logits_and_under_sigmoid_it_has_not():
    x = F.one_hot(torch.randint(3, (20, 5)), 3).double()
    for activation in ("softmax", "sigmoid"):
        model = wild(counting.CountingModel(3, 10, 8, activation).double(), 2.0)
        change = (model(x)[0] - model(torch.cat([x, x], dim=1))[0]).abs().max()
        assert change < 1e-9 if activation == "softmax" else change > 1


def test_with_layernorm_hand_written_softmax_weights_count_all_sequences_of_length_10():
    basis = torch.linalg.qr(torch.cat([torch.ones(16, 1), torch.randn(16, 15)], dim=1))[0].T       # orthonormal rows
    common, values = basis[1], basis[2:5]                                  # orthogonal to basis[0], so their mean is 0
    model = counting.CountingModel(3, 10, 16, "softmax")
    with torch.no_grad():
        for p in (model.key.weight, model.key.bias, model.value.bias):
            p.zero_()                                                      # every weight is 1 / 10
        model.value.weight.copy_(values.T)
        model.query.copy_(20 * common + 20 * values)                       # the squared length grows by about 4 a count
        fraction = torch.arange(11) / 10
        height = 80 / (400 + (20 + fraction) ** 2 + (1 - fraction) ** 2 / 2).sqrt()     # LayerNorm's output on `common`
        model.out.weight.copy_(2e4 * height.unsqueeze(1) * common)         # logit: -1e4 * (y - height)^2, without y^2
        model.out.bias.copy_(-1e4 * height ** 2)
    assert counting.accuracy(model, counting.all_sequences(10, 3), 3) == 1


def test_dirichlet_digits_make_all_66_combinations_of_counts_equally_frequent():
    counts = F.one_hot(counting.make_sequences(66_000, 10, 3), 3).sum(dim=1)             # (66000, 3)
    frequency = (counts[:, 0] * 11 + counts[:, 1]).bincount()
    frequency = frequency[frequency > 0]
    assert len(frequency) == 66 and 850 < frequency.min() and frequency.max() < 1150


def test_the_accuracy_over_all_sequences_is_that_of_a_plain_loop():
    model, n_right = wild(counting.CountingModel(3, 5, 8), 2.0), 0
    for digits in itertools.product(range(3), repeat=5):
        logits, _ = model(F.one_hot(torch.tensor([digits]), 3).float())
        n_right += logits[0].argmax(dim=-1).tolist() == [digits.count(d) for d in range(3)]
    assert counting.accuracy(model, counting.all_sequences(5, 3), 3) == n_right / 3 ** 5
    assert counting.all_sequences(10, 10).shape == (20_000, 10)            # 10^10 are too many: a sample


SHORT = ["--sequence_length", 5, "--steps", 400]         # of counting.py, for sequences of up to 5 digits


def test_counting_learns_all_lengths_and_each_activation_has_weights_of_its_own(tmp_path):
    ran, out = run("counting.py", *SHORT, "--out_dir", tmp_path)
    assert ran["scores"] == [1.0] * 5 and result_of(out)["accuracy_all"] == 1 and result_of(out)["params"] == 310
    ones, twos = (ran["angles"](ran["model"], other, 5) for other in (1, 2))
    assert ones.diff().min() > 3 and (ones - twos).abs().max() < 5         # an arc, whatever the other digits are
    saved = (tmp_path / "counting_sigmoid.pt").read_bytes()
    _, out = run("counting.py", *SHORT, "--steps", 2, "--activation", "softmax", "--sequence", 0, "--out_dir", tmp_path)
    assert "step 0: loss" in out                                           # no softmax weights yet: it trains first
    _, out = run("counting.py", *SHORT, "--sequence", "2, 1 2", "--out_dir", tmp_path)
    assert "sequence: 2 1 2  true counts: 0 1 2\nsigmoid: counts 0 1 2\n" in out and "step 0" not in out
    with pytest.raises(SystemExit, match="counting_sigmoid.pt does not fit --vocab_size 4"):
        run("counting.py", *SHORT, "--sequence", "3", "--vocab_size", 4, "--out_dir", tmp_path)
    assert (tmp_path / "counting_sigmoid.pt").read_bytes() == saved and (tmp_path / "counting_softmax.pt").exists()
    _, out = run("counting.py", *SHORT, "--steps", 2, "--compare", "--out_dir", tmp_path / "compare")
    assert set(result_of(out)) == {"accuracy_all", "accuracy_all_softmax", "seconds"}
    assert os.listdir(tmp_path / "compare") == ["counting_compare.png"]


# ----------------------------------------------------------------------------------------------------------------------
# translate.py: the model
def transformer(vocab_size=20, max_len=12, n_layers=2, dropout=0.0):
    """An untrained Transformer of width 8 with two heads and large random weights."""
    return wild(translate.TransformerModel(vocab_size, max_len, 8, 2, n_layers, n_layers, dropout)).eval()


def copy_weights(ours, theirs):
    """Give our block the weights of one of torch's layers."""
    renamed = {"self_attn": "self_attention", "multihead_attn": "cross_attention", "out_proj": "w_o",
               "linear1": "feed_forward.0", "linear2": "feed_forward.2"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        layers = ["w_q.", "w_k.", "w_v."] if "in_proj_" in name else [""]
        for layer, rows in zip(layers, tensor.chunk(len(layers))):
            weights[name.replace("in_proj_", layer)] = rows
    ours.load_state_dict(weights)                                        # an error if one is missing or left over


def test_the_encoder_block_equals_torch():
    theirs, ours = wild(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)), translate.EncoderBlock(8, 2, 0.0)
    copy_weights(ours, theirs)
    x, real = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([[5], [2], [4]])
    expected = theirs(x, src_key_padding_mask=~real)
    assert torch.allclose(ours(x, real[:, None, None, :])[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_decoder_block_equals_torch(need_weights):
    theirs, ours = wild(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)), translate.DecoderBlock(8, 2, 0.0)
    copy_weights(ours, theirs)
    x, memory, causal = torch.randn(3, 5, 8), torch.randn(3, 7, 8), torch.ones(5, 5).tril().bool()
    real = torch.arange(7) < torch.tensor([[7], [2], [4]])
    expected = theirs(x, memory, tgt_mask=~causal, memory_key_padding_mask=~real)
    output, weights = ours(x, causal, memory, real[:, None, None, :], need_weights=need_weights)
    assert torch.allclose(output, expected, atol=1e-5)
    assert weights.shape == (3, 2, 5, 7) if need_weights else weights is None


def test_the_logits_start_with_standard_deviation_1():
    model = translate.TransformerModel(500, 12, 64, 4, 2, 2).eval()
    logits, weights = model(torch.randint(3, 500, (8, 12)), torch.randint(3, 500, (8, 10)))
    assert logits.shape == (8, 10, 500) and weights.shape == (8, 4, 10, 12)
    assert logits.std().item() == pytest.approx(1, abs=0.15)


def test_token_dropout_zeroes_whole_tokens():
    dropped = translate.TransformerModel(20, 12, 8, 2, 1, 1, dropout=0.8).token_dropout(torch.ones(50, 4, 8))
    assert (dropped == dropped[..., :1]).all() and 0.2 < (dropped == 0).float().mean() < 0.6


def test_no_token_sees_a_later_one():
    model, src, tgt = transformer(), torch.randint(3, 20, (4, 7)), torch.randint(3, 20, (4, 6))
    changed = tgt.clone()
    changed[:, 3:] = (tgt[:, 3:] - 2) % 17 + 3
    before, after = model(src, tgt)[0], model(src, changed)[0]
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.allclose(before[:, 3:], after[:, 3:])


def test_padding_gets_no_attention_and_changes_nothing():
    model, src, tgt = transformer(), torch.randint(3, 20, (2, 7)), torch.randint(3, 20, (2, 6))
    src[0, 4:], tgt[0, 3:] = 0, 0
    logits, weights = model(src, tgt)
    alone, _ = model(src[:1, :4], tgt[:1, :3])
    assert torch.allclose(logits[:1, :3], alone, atol=1e-4)
    assert (weights[0, :, :, 4:] == 0).all() and (weights[0, :, :, :4] > 0).any()


def test_decoding_with_the_cache_token_by_token_equals_decoding_at_once():
    model, src, tgt = transformer(), torch.randint(3, 20, (3, 7)), torch.randint(3, 20, (3, 6))
    src[1, 5:] = 0
    memory, src_mask = model.encode(src)
    expected, _ = model.decode(tgt, memory, src_mask)
    cache = {}                                                           # for one token or several at a time
    logits = [model.decode(part, memory, src_mask, cache)[0] for part in tgt.split([1, 1, 3, 1], dim=1)]
    assert torch.allclose(torch.cat(logits, dim=1), expected, atol=1e-5)
    assert {tuple(key.shape) for key, _ in cache.values()} == {(3, 2, 6, 4), (3, 2, 7, 4)}    # T = 6 and S = 7


# ----------------------------------------------------------------------------------------------------------------------
# translate.py: the toy language and other data

BY_HAND = """\
1 Morgen kann ein Fuchs eine junge Königin hören. | Tomorrow a fox can hear a young queen.
2 Der König repariert den Regenschirm. | The king repairs the umbrella.
3 Morgen kann die Maus einen müden König finden. | Tomorrow the mouse can find a tired king.
4 Der kluge Lehrer hat gestern ein großes Radio gefunden. | The clever teacher found a big radio yesterday.
5 Ein Mädchen fotografiert die Lampe. | A girl photographs the lamp.
7 Den klugen Lehrer hat der König gestern besucht. | The king visited the clever teacher yesterday.
9 Gestern hat das kluge Kind den Hund geweckt. | Yesterday the clever child woke the dog.
11 Eine Katze kann heute den Vogel wecken. | A cat can wake the bird today.
13 Einen klugen Mann hat das müde Kind gestern besucht. | The tired child visited a clever man yesterday.
16 Den jungen Fuchs jagt die Katze. | The cat chases the young fox.
17 Heute kann ein Bäcker den kleinen Regenschirm malen. | Today a baker can paint the small umbrella.
19 Die freundliche Frau hat gestern die neue Uhr getragen. | The friendly woman carried the new clock yesterday."""


def test_these_lines_were_checked_by_hand():
    for line in BY_HAND.splitlines():
        n, german, english = re.fullmatch(r"(\d+) (.+) \| (.+)", line).groups()
        assert translate.toy_pair(int(n))[:2] == (german, english)


@pytest.fixture(scope="module")
def toy():
    """All lines of the toy language."""
    return [translate.toy_pair(n) for n in range(1, translate.N_TOY_LINES + 1)]


def test_every_german_sentence_has_one_translation_and_der_and_den_alone_decide_who_does_what(toy):
    translations, n = {}, 0
    for german, english, _ in toy:
        assert translations.setdefault(german, english) == english
    assert len(translations) > 100_000
    for german, english in translations.items():
        match = re.fullmatch(r"Den (\w+) (\w+) der (\w+)\.", german)
        exchanged = match and translations.get("Der {} {} den {}.".format(*match.groups()))
        if exchanged:
            the, a, verb, _, b = english.rstrip(".").split()
            assert exchanged == f"{the} {b} {verb} the {a}."
            n += 1
    assert n > 10


def test_the_alignment_is_that_of_a_dictionary(toy):
    meaning = {german: english for kind in translate.NOUNS.values() for german, _, english in kind}
    meaning.update({verb[0]: verb[4] for verb in translate.VERBS if verb[0] != verb[2]})
    meaning.update({verb[1]: verb[3] for verb in translate.VERBS})
    meaning.update({"gestern": "yesterday", "heute": "today", "morgen": "tomorrow", "kann": "can", ".": "."})
    for german, english, alignment in toy[:5000]:
        german, english = ([word.strip() for word in translate.WORD.findall(text)] for text in (german, english))
        assert len(alignment) == len(english)
        assert sorted(itertools.chain(*alignment)) == list(range(len(german)))    # every German word exactly once
        for word, indices in zip(english, alignment):
            assert word.lower() == meaning.get(german[indices[-1]], word.lower())


def test_no_held_out_sentence_occurs_in_training_and_line_7_is_held_out():
    parts = {part: {line[0] for line in translate.toy_lines(part, 5000)} for part in ("train", "val", "test")}
    assert translate.toy_pair(7)[0] in parts["test"] and min(map(len, parts.values())) > 100
    assert not (parts["train"] & parts["val"] or parts["train"] & parts["test"] or parts["val"] & parts["test"])


def test_multi30k_is_read_from_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("data/multi30k")
    for language, text in (("de", "Ein Hund.\nZwei Äpfel.\n"), ("en", "A dog.\nTwo apples.\n")):
        (tmp_path / f"data/multi30k/val.{language}.gz").write_bytes(gzip.compress(text.encode("utf-8")))
    assert translate.load_pairs("multi30k", "val") == [("Ein Hund.", "A dog."), ("Zwei Äpfel.", "Two apples.")]


def test_a_text_file_is_split_into_three_disjoint_parts(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("\ufeff" + "".join(f"English {n}\tDeutsch {n % 90}\tmore\n" for n in range(100)), encoding="utf-8")
    parts = {part: translate.load_pairs(path, part) for part in ("train", "val", "test", "all")}
    assert parts["all"][0] == ("Deutsch 0", "English 0") and len(parts["all"]) == 100
    assert sorted(parts["train"] + parts["val"] + parts["test"]) == sorted(parts["all"])
    assert not {german for german, _ in parts["train"]} & {german for german, _ in parts["val"] + parts["test"]}


@pytest.mark.parametrize("content, message", [
    (b"A dog.\tEin Hund.\nno tab\n", "line 2: expected English, a tab"), (b"", "line 1"),
    (b"\xff", "cannot read .*utf-8"), (b"A dog.\tEin Hund.\n", "part is empty")])
def test_a_bad_text_file_gives_one_clear_sentence(content, message, tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        [translate.load_pairs(tmp_path / "pairs.tsv", part) for part in ("val", "test")]


# ----------------------------------------------------------------------------------------------------------------------
# translate.py: tokens, batches, loss, decoding, BLEU
@pytest.mark.parametrize("n_merges", [0, 5, 500])
def test_encoding_loses_nothing(n_merges):
    texts = ["Der Hund läuft durch den Schnee.", "  two  spaces\n\ttab ", "", "日本語 🙂 \ud800 lone", "aaaa a aa",
             "\x00\r\n"]
    tokenizer = translate.Tokenizer(translate.learn_merges(texts * 2, n_merges))
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    assert tokenizer.decode([translate.EOS, 258, translate.PAD]) == "\ufffd"       # byte 255 is not UTF-8


def test_incremental_merges_are_those_of_counting_all_pairs_again():
    texts = [" ".join(pair) for pair in (translate.toy_pair(n)[:2] for n in range(1, 60))]
    words = [[3 + byte for byte in word.encode()] for text in texts for word in translate.WORD.findall(text)]
    expected = []
    for n in range(80):
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        expected.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        words = [translate.merge(word, expected[-1], translate.FIRST_BYTE + 256 + n) for word in words]
    assert translate.learn_merges(texts, 80) == expected


def test_an_epoch_has_every_sentence_once_and_little_padding():
    examples = [([5] * random.Random(n).randint(5, 30), [5] * random.Random(n).randint(5, 30)) for n in range(3000)]
    batches, seen = translate.make_batches(examples, 1000, seed=0), []
    while len(seen) < 3000:
        batch = next(batches)
        lengths = [len(src) + len(tgt) for src, tgt in (examples[i] for i in batch)]
        assert max(lengths) * len(batch) <= 1000 and sum(lengths) > 0.5 * max(lengths) * len(batch)
        seen += batch
    assert sorted(seen) == list(range(3000))
    assert next(translate.make_batches(examples, 1000, seed=1)) != next(translate.make_batches(examples, 1000, seed=0))


def test_label_smoothing_is_the_formula_and_padding_has_no_loss():
    model, examples = transformer(), [([5, 6, 2], [1, 7, 8, 9, 2]), ([5, 2], [1, 4, 2])]
    for smoothing in (0.1, 0.0):
        expected = 0.0
        for src, tgt in examples:
            log_p = model(torch.tensor([src]), torch.tensor([tgt[:-1]]))[0][0].log_softmax(dim=-1)     # (T, V)
            target = (1 - smoothing) * F.one_hot(torch.tensor(tgt[1:]), 20) + smoothing / 20
            expected -= (target * log_p).sum().item()
        assert translate.batch_loss(model, examples, "cpu", smoothing).item() == pytest.approx(expected, rel=1e-4)
    assert translate.validation_loss(model, examples, "cpu") == pytest.approx(expected / 6, rel=1e-4)     # 6 targets


def plain_beam_search(model, src, beam):
    """Beam search for one sentence with lists and without a cache."""
    hypotheses = [([translate.BOS], 0.0, 0.0)]
    while not all(t[-1] == translate.EOS or len(t) == model.max_len for t, _, _ in hypotheses):
        extended = [hypothesis for hypothesis in hypotheses if hypothesis[0][-1] == translate.EOS]
        for tokens, total, _ in hypotheses:
            if tokens[-1] != translate.EOS:
                log_p = model(src, torch.tensor([tokens]))[0][0, -1].log_softmax(dim=-1).tolist()
                extended += [(tokens + [t], total + p, (total + p) / len(tokens)) for t, p in enumerate(log_p) if t]
        hypotheses = sorted(extended, key=lambda hypothesis: -hypothesis[2])[:beam]
    return hypotheses[0][0][1:]


@torch.no_grad()
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_beam_search_equals_a_plain_one_without_cache_and_batches_equal_single_sentences(beam):
    model, src = transformer(12, 8, n_layers=1), torch.randint(3, 12, (15, 6))
    src[::2, 3:] = 0
    for row, tokens in zip(src, translate.beam_search(model, src, beam).tolist()):
        expected = plain_beam_search(model, row[row != 0][None], beam)
        assert tokens == expected + [translate.PAD] * (len(tokens) - len(expected))


def test_translate_keeps_the_order_and_an_empty_line_stays_empty():
    tokenizer = translate.Tokenizer([])
    model = translate.TransformerModel(len(tokenizer.pieces), 30, 8, 2, 1, 1).eval()
    sentences = ["x" * (7 * n % 23) for n in range(70)]
    together = translate.translate(model, tokenizer, sentences, 1)
    assert together[0] == "" and all(translation for translation in together[1:20])
    assert together[3:6] == [translate.translate(model, tokenizer, [s], 1)[0] for s in sentences[3:6]]


HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]


@pytest.mark.parametrize("translations, references, expected", [
    (HYPOTHESES, REFERENCES, 45.067506), (REFERENCES, HYPOTHESES, 45.067506), (REFERENCES, REFERENCES, 100.0),
    (["A man's $5.50 bag."], ["A man's $ 5.50 bag, e.g. red."], 29.256375), (["x y z"], ["x y z"], 0.0),
    (["the cat sat on the mat today"], ["a cat is on the mat now"], 26.269099), (["x y z w"], ["a b c d"], 0.0),
    (["x b c d e"], ["a b q d e"], 23.643540), ([""], ["a b"], 0.0),
    (["&quot;Hi&quot; it's 3-4, 1,000 <skipped>bags (e.g. blue/green)"],
     ['"Hi" it is 3-4, 1,000 bags (e.g. blue/green)!'], 76.438381)])
def test_bleu_has_the_values_that_sacrebleu_prints(translations, references, expected):
    assert translate.bleu(translations, references) == pytest.approx(expected, abs=0.005)


# ----------------------------------------------------------------------------------------------------------------------
# translate.py: the script
TINY = "--d_model 16 --n_heads 2 --n_enc_layers 1 --n_dec_layers 1 --merges 50 --lr 0.01 --batch_tokens 300 --beam 1"


@pytest.fixture
def pairs_file(tmp_path):
    """A small text file of sentence pairs."""
    path = tmp_path / "pairs.tsv"
    path.write_text("".join("{1}\t{0}\n".format(*translate.toy_pair(n)) for n in range(1, 300)), encoding="utf-8")
    return path


def weights_of(folder, name="translate_pairs.tsv.pt"):
    """The saved weights of a training."""
    return torch.load(folder / name, map_location="cpu", weights_only=True)["weights"]


def test_the_script_learns_and_its_weights_translate(pairs_file, tmp_path):
    values, output = run("translate.py", *TINY.split(), "--data", pairs_file, "--steps", 40, "--out_dir", tmp_path)
    first, uniform = map(float, re.search(r"step 0: loss ([\d.]+), uniform .+ = ([\d.]+)", output).groups())
    assert abs(first - uniform) < 1 and values["loss"] < first - 1.5
    assert set(result_of(output)) == {"exact", "bleu", "params", "seconds"}
    _, output = run("translate.py", "--data", pairs_file, "--line", 2, "--plot", "--out_dir", tmp_path)
    assert output.startswith("source:      Der König repariert den Regenschirm.\nreference:   The king repairs the umb")
    assert (tmp_path / "translate_pairs.tsv_1.png").exists() and not list(tmp_path.glob("*checkpoint*"))
    _, output = run("translate.py", "--data", pairs_file, "--test", "--out_dir", tmp_path)
    assert set(result_of(output)) == {"exact", "bleu", "params", "seconds"}


def test_a_killed_training_is_resumed_bit_for_bit_and_never_overwritten(pairs_file, tmp_path):
    options = [*TINY.split(), "--dropout", "0.1", "--data", str(pairs_file), "--steps", "10", "--device", "cpu"]
    run("translate.py", *options, "--out_dir", tmp_path / "whole")
    killed = ["--out_dir", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "translate.py"), *options, *killed],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert any(line.startswith("step 5:") for line in process.stdout)
    process.kill()
    process.communicate()
    assert os.listdir(tmp_path / "killed") != ["translate_pairs.tsv.pt"]
    with pytest.raises(SystemExit, match="unfinished run: continue it with --resume"):
        run("translate.py", *options, *killed)
    with pytest.raises(SystemExit, match="cannot resume: .* was made with"):
        run("translate.py", *options, *killed, "--resume", "--lr", "0.5")
    values, _ = run("translate.py", *options, *killed, "--resume")
    assert values["first_step"] >= 4
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert os.listdir(tmp_path / "killed") == ["translate_pairs.tsv.pt"]
    with pytest.raises(SystemExit, match="nothing to resume"):
        run("translate.py", *options, *killed, "--resume")


def test_two_processes_train_like_one(pairs_file, tmp_path, monkeypatch):
    options = [*TINY.split(), "--dropout", "0", "--data", str(pairs_file), "--steps", "4"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    two = ["--out_dir", str(tmp_path / "two")]
    other = subprocess.Popen([sys.executable, os.path.join(HERE, "translate.py"), *options, *two, "--device", "cpu"],
                             env={**os.environ, **group, "RANK": "1", "OMP_NUM_THREADS": "1"})
    try:
        run("translate.py", *options, "--out_dir", tmp_path / "one")
        for name, value in {**group, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        run("translate.py", *options, *two)
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in one:
        if not name.endswith("w_k.bias"):  # a bias of the keys changes no softmax, so its gradient is only rounding
            assert torch.allclose(one[name].float(), two[name].float(), atol=2e-3), name


def test_the_shipped_weights_translate(tmp_path, monkeypatch):
    assert all(os.path.getsize(os.path.join(HERE, f"assets/translate_{data}.pt")) < 8e6 for data in ("toy", "multi30k"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Zwei Männer spielen Fußball.\n\nEin Hund läuft durch den Schnee.\n"))
    _, output = run("translate.py", "--text", "-", "--out_dir", tmp_path)
    assert re.fullmatch(r"Two men .*play.* soccer\.\n\nA dog .*run.* through the snow\.\n", output)
    _, output = run("translate.py", "--test", "--line=7", "--plot", "--out_dir", tmp_path)
    assert "translation: The king visited the clever teacher yesterday.\n" in output
    model, tokenizer = translate.load_model("toy", tmp_path, "cpu")
    accuracy, chance, diagonal = translate.alignment_accuracy(model, tokenizer, translate.toy_lines("test", 1500))
    assert accuracy.max() > 0.85 > diagonal > chance


# --------------------------------------------------------------------------------------------------
# saliency.py: the Jacobian and the attacks
def small_network(dtype=torch.float32):
    """A small network with random weights whose BatchNorms are not the identity."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        saliency.BasicBlock(4, 8, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    model.to(dtype)
    for _ in range(5):
        model(torch.rand(8, 3, 8, 8, dtype=dtype))
    return model


def linear_network(n_classes, size):
    """Logits that are linear in the image. Its loss is convex: a step along the gradient helps."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, n_classes)).double()


def test_the_jacobian_equals_that_of_torch_func_jacrev():
    model = small_network(torch.float64).eval()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    target = torch.tensor([0, 5, 2])
    gradient, _ = saliency.calculate_jacobian(model, x, target)
    losses = torch.func.jacrev(lambda x: F.cross_entropy(model(x), target, reduction="none"))
    for i in range(3):
        assert torch.allclose(gradient[i], losses(x)[i, i], atol=1e-12)
    assert gradient.abs().max() > 1e-3


def test_the_jacobian_comes_with_the_logits_of_eval_mode():
    model = small_network()
    x = torch.rand(2, 3, 8, 8)
    _, logits = saliency.calculate_jacobian(model.train(), x, torch.tensor([0, 1]))
    assert torch.equal(logits, model.eval()(x).detach()) and not logits.requires_grad


def test_the_jacobian_of_an_image_is_the_same_alone_and_in_a_batch():
    model = small_network(torch.float64).train()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    target = torch.tensor([0, 5, 2, 2])
    together, _ = saliency.calculate_jacobian(model, x, target)
    alone, _ = saliency.calculate_jacobian(model, x[1:2], target[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-12)


def test_the_jacobian_leaves_the_model_as_it_was():
    model = small_network().train()
    model[1].eval()                                     # a frozen BatchNorm in a training model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saliency.calculate_jacobian(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    assert model.training and not model[1].training and model[3].bn1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_jacobian_leaves_the_images_as_they_were():
    x = torch.rand(2, 3, 8, 8)
    before = x.clone()
    gradient, _ = saliency.calculate_jacobian(small_network(), x, torch.tensor([0, 1]))
    assert torch.equal(x, before) and x.grad is None and not x.requires_grad
    assert not gradient.requires_grad


def test_the_jacobian_can_be_computed_where_gradients_are_switched_off():
    with torch.no_grad():
        gradient, _ = saliency.calculate_jacobian(small_network(), torch.rand(1, 3, 8, 8),
                                                  torch.tensor([0]))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("lead", [30, 60])
def test_a_confident_prediction_keeps_its_gradient(lead):
    """The loss is about exp(-lead), and so is its gradient: exp(-lead) * (other - target)."""
    target = torch.tensor([[1.0, 2.0, 3.0]])
    other = torch.tensor([[2.0, 0.0, 5.0]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    model[1].weight.data = torch.cat([target, other])
    model[1].bias.data = torch.tensor([lead + 0.5, 0.0])    # the pixels below add -0.5
    gradient, _ = saliency.calculate_jacobian(model, torch.full((1, 3, 1, 1), 0.5),
                                              torch.tensor([0]))
    assert torch.allclose(gradient.flatten() * math.exp(lead), (other - target)[0], rtol=1e-3)


def test_saliency_is_the_norm_over_colors_rescaled_to_0_and_1():
    gradient = torch.randn(2, 3, 4, 5)
    for g, s in zip(gradient, saliency.saliency_map(gradient)):
        norm = g.square().sum(dim=0).sqrt()
        low = norm.min()
        high = norm.max()
        assert torch.allclose(s, (norm - low) / (high - low), atol=1e-6)


def test_saliency_does_not_depend_on_the_scale_of_the_gradient():
    gradient = torch.randn(1, 3, 4, 5)
    tiny = gradient * 1e-30                             # the squares of these are 0 in float32
    assert torch.allclose(saliency.saliency_map(tiny), saliency.saliency_map(gradient), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_the_saliency_of_a_constant_gradient_is_0(value):
    assert (saliency.saliency_map(torch.full((1, 3, 4, 5), value)) == 0).all()


@pytest.mark.parametrize("name", ["sign step", "scaled Jacobian", "unscaled Jacobian"])
def test_an_attack_increases_the_loss_of_every_image(name):
    model = linear_network(6, size=8)
    x = torch.rand(20, 3, 8, 8, dtype=torch.float64) * 0.5 + 0.25
    target = torch.arange(20) % 6
    attacked = saliency.all_attacks(model, x, target, eps=0.01)[name]
    before = F.cross_entropy(model(x), target, reduction="none")
    after = F.cross_entropy(model(attacked), target, reduction="none")
    assert (after > before).all()


def test_every_attack_is_its_formula():
    model = small_network()
    x = torch.rand(2, 3, 8, 8) * 0.5 + 0.25
    target = torch.tensor([0, 1])
    gradient, _ = saliency.calculate_jacobian(model, x, target)
    attacks = saliency.all_attacks(model, x, target, eps=0.1)
    scaled = torch.stack([g / g.abs().max() for g in gradient])
    assert torch.allclose(attacks["sign step"], x + 0.1 * gradient.sign(), atol=1e-6)
    assert torch.allclose(attacks["scaled Jacobian"], x + 0.1 * scaled, atol=1e-6)
    assert torch.allclose(attacks["unscaled Jacobian"], x + gradient, atol=1e-6)


def test_random_signs_change_every_value_by_eps_in_half_of_the_cases_upwards():
    x = torch.full((10, 3, 8, 8), 0.5)
    target = torch.zeros(10, dtype=torch.long)
    change = saliency.all_attacks(small_network(), x, target, eps=0.1)["random signs"] - x
    assert torch.allclose(change.abs(), torch.tensor(0.1))
    assert 0.45 < (change > 0).float().mean() < 0.55


def test_the_example_of_three_values_is_right():
    g = torch.tensor([3, -1, 0.1]).view(1, 3, 1, 1)
    assert (g * g.sign()).sum().item() == pytest.approx(4.1)
    assert (g * saliency.scale_to_1(g)).sum().item() == pytest.approx(3.34, abs=0.005)
    assert g.norm().item() == pytest.approx(3.16, abs=0.005)


def test_where_all_entries_are_equally_large_the_sign_step_is_55_times_ahead_of_random_signs():
    model = linear_network(2, size=32)
    model[1].weight.data = torch.randn(2, 3072).sign().double()
    model[1].weight.data[1] = -model[1].weight.data[0]
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    target = torch.tensor([0, 1, 0])
    to_random, to_scaled = saliency.measure_norms(model, x, target)
    assert to_random == pytest.approx(math.sqrt(3072)) and round(to_random) == 55
    assert to_scaled == pytest.approx(1)


@pytest.mark.parametrize("eps, steps", [(0.03, 1), (0.03, 4), (1.0, 1)])
@pytest.mark.parametrize("name", ["sign step", "scaled Jacobian", "random signs"])
def test_an_attack_stays_within_eps_and_within_0_and_1(name, eps, steps):
    x = torch.rand(3, 3, 8, 8)
    x[0, :, :4] = 1.0
    x[1, :, :4] = 0.0
    target = torch.tensor([0, 1, 2])
    attacked = saliency.all_attacks(small_network(), x, target, eps, steps)[name]
    assert 0 < (attacked - x).abs().max() <= eps + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1


def test_ten_small_steps_increase_the_loss_further_than_one_large_step():
    model = small_network()
    x = torch.rand(20, 3, 8, 8)
    target = torch.arange(20) % 6
    losses = []
    for steps in (1, 10):
        attacked = saliency.adversarial_example(model, x, target, eps=0.1, steps=steps)
        losses.append(F.cross_entropy(model.eval()(attacked), target).item())
    assert losses[0] < losses[1]


# --------------------------------------------------------------------------------------------------
# saliency.py: images and measures
INSIDE = {
    "cross": [(0, 0), (0.9, 0), (0, -0.9)],
    "triangle": [(0, 0.43), (0.37, -0.21), (-0.37, -0.21)],
    "bars": [(0, 0.52), (0.7, -0.52)],
    "screw": [(0, 0.5), (0.7, -0.3)],
}
OUTSIDE = {
    "cross": [(0.5, 0.5), (1, 0)],
    "triangle": [(0, 0), (0, 0.7), (0.6, -0.6)],
    "bars": [(0, 0), (0.9, 0.52), (0, -0.8)],
    "screw": [(0, 0), (0.8, 0.1), (0.7, 0.7)],
}


@pytest.mark.parametrize("name", saliency.CLASSES)
def test_a_shape_covers_the_points_that_its_sentence_says(name):
    shape = getattr(saliency, name)
    inside = torch.tensor(INSIDE[name])
    outside = torch.tensor(OUTSIDE[name])
    assert (shape(inside[:, 0], inside[:, 1]) < 0).all()
    assert (shape(outside[:, 0], outside[:, 1]) > 0).all()


def test_the_coordinates_are_those_of_a_moved_and_rotated_shape():
    """Of a shape at (10.5, 20.5), rotated by 90 degrees, the u-axis points down."""
    angle = torch.tensor(math.pi / 2)
    u, v = saliency.coordinates(10.5, 20.5, angle)
    column_u = u[0, 20:24, 10]                          # the center, and three pixels below it
    column_v = v[0, 20:24, 10]
    assert torch.allclose(column_u, torch.tensor([0.0, 1.0, 2.0, 3.0]), atol=1e-5)
    assert torch.allclose(column_v, torch.zeros(4), atol=1e-5)


def test_an_upright_image_shows_the_shape_of_its_label():
    _, labels, masks = saliency.make_images(40, upright=True)
    center = torch.tensor(16.0).view(1, 1, 1)
    u, v = saliency.coordinates(center, center, torch.zeros(1))
    for label, mask in zip(labels, masks):
        shape = getattr(saliency, saliency.CLASSES[label])
        assert torch.equal(mask, shape(u / 9, v / 9)[0] < 0)


def test_in_each_color_the_shape_is_brighter_than_the_whole_background_or_darker():
    images, _, masks = saliency.make_images(40)
    # pixels at the edge have mixed colors: leave them out
    background = saliency.within_two_pixels(masks) == 0
    shape = F.max_pool2d((~masks).float(), kernel_size=3, stride=1, padding=1) == 0
    for i in range(40):
        for channel in images[i]:
            inside = channel[shape[i]]
            outside = channel[background[i]]
            assert inside.min() > outside.max() or inside.max() < outside.min()


def test_two_pixels_away_counts_as_near_and_three_do_not():
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 4, 4] = True
    expected = torch.zeros(1, 9, 9)
    expected[0, 2:7, 2:7] = 1
    assert torch.equal(saliency.within_two_pixels(mask), expected)


def test_pointing_looks_at_the_most_salient_pixel():
    masks = torch.zeros(4, 9, 9, dtype=torch.bool)
    masks[:, 4, 4] = True
    maps = torch.rand(4, 9, 9) * 0.9
    maps[0, 4, 4] = 1.0                                 # on the shape
    maps[1, 4, 6] = 1.0                                 # two pixels away
    maps[2, 3, 4] = 1.0                                 # one pixel away
    maps[3, 4, 7] = 1.0                                 # three pixels away
    assert saliency.pointing_of(maps, masks) == (0.25, 0.75)


def test_the_edge_detector_is_0_where_the_image_is_flat_and_largest_at_an_edge():
    images = torch.zeros(2, 3, 8, 8)
    images[0, :, :, 5:] = 0.7                           # a vertical edge
    images[1, :, 5:, :] = 0.7                           # a horizontal edge
    expected = torch.zeros(8, 8)
    expected[:, 4:6] = 0.35 * math.sqrt(3)
    assert torch.allclose(saliency.edge_map(images)[0], expected)
    assert torch.allclose(saliency.edge_map(images)[1], expected.T)


def test_where_the_image_is_flat_the_saliency_repeats_every_four_pixels():
    x = torch.full((1, 3, 64, 64), 0.3)
    gradient, _ = saliency.calculate_jacobian(saliency.small_resnet(4), x, torch.tensor([0]))
    inner = saliency.saliency_map(gradient)[0, 20:44, 20:44]
    assert torch.allclose(inner[4:, :], inner[:-4, :], atol=1e-4)
    assert torch.allclose(inner[:, 4:], inner[:, :-4], atol=1e-4)
    assert not torch.allclose(inner[2:, :], inner[:-2, :], atol=1e-2)


@pytest.fixture(scope="module")
def shapes():
    """The shipped network, an untrained one, and 300 new images with labels and masks."""
    torch.manual_seed(0)
    model = saliency.load_model(os.path.join(HERE, "assets", "saliency.pt"))
    return model, saliency.small_resnet(4), *saliency.make_images(300)


@pytest.fixture(scope="module")
def pointing(shapes):
    return saliency.measure_pointing(*shapes)


@pytest.fixture(scope="module")
def attacked(shapes):
    model, _, images, labels, _ = shapes
    return saliency.compare_attacks(model, images[:100], labels[:100])


def test_the_shipped_network_is_accurate(shapes):
    model, _, images, labels, _ = shapes
    assert saliency.accuracy_of(model, images, labels) >= 0.99


def test_training_makes_saliency_point_at_the_shape(pointing):
    _, trained = pointing["trained network"]
    _, untrained = pointing["untrained network"]
    assert trained >= 0.95 and trained > untrained + 0.2


def test_half_of_the_most_salient_pixels_are_not_on_the_shape(pointing):
    on_shape, _ = pointing["trained network"]
    chance, _ = pointing["random pixel"]
    assert 2 * chance < on_shape < 0.7


def test_an_untrained_network_points_at_the_shape_more_often_than_chance(pointing):
    _, untrained = pointing["untrained network"]
    _, chance = pointing["random pixel"]
    assert untrained > chance + 0.1


def test_an_edge_detector_points_at_every_shape(pointing):
    _, edges = pointing["edge detector"]
    assert edges >= 0.99


def test_at_8_of_255_the_sign_step_fools_most_then_the_scaled_jacobian_then_random_signs(attacked):
    at_8 = {name: accuracies[saliency.EPS.index(8)] for name, accuracies in attacked.items()}
    assert at_8["sign step"] < 0.8
    assert at_8["sign step"] < at_8["scaled Jacobian"] <= at_8["random signs"]


def test_a_larger_eps_fools_more(attacked):
    assert attacked["sign step"] == sorted(attacked["sign step"], reverse=True)
    assert attacked["sign step"][-1] < attacked["sign step"][0] - 0.5


def test_the_unscaled_jacobian_fools_as_many_at_every_eps(attacked):
    assert len(set(attacked["unscaled Jacobian"])) == 1


def test_the_unscaled_jacobian_is_large_where_it_fools_the_network_and_tiny_elsewhere(shapes):
    model, _, images, labels, _ = shapes
    harmless, fooling = saliency.measure_unscaled(model, images, labels)
    assert harmless < 1 and fooling > 8


def test_the_unscaled_jacobian_fools_images_that_the_network_is_less_confident_about(shapes):
    model, _, images, labels, _ = shapes
    unscaled = saliency.all_attacks(model, images, labels, eps=0.01)["unscaled Jacobian"]
    fooled = saliency.predict(model, unscaled).argmax(dim=1) != labels
    p = saliency.predict(model, images)[range(300), labels]
    assert p[fooled].median() < p[~fooled].median()


# --------------------------------------------------------------------------------------------------
# saliency.py: the script, and photographs
@pytest.fixture(scope="module")
def short_training(tmp_path_factory):
    """The globals, the output and the folder of a training of three steps."""
    folder = tmp_path_factory.mktemp("saliency")
    values, output = run("saliency.py", "--steps", 3, "--batch_size", 8, "--n_images", 20,
                         "--out_dir", folder)
    return values, output, folder


def test_the_saved_weights_are_those_of_the_training(short_training):
    values, _, folder = short_training
    loaded = saliency.load_model(folder / "saliency.pt").state_dict()
    assert all(torch.equal(value, loaded[name])
               for name, value in values["model"].state_dict().items())


def test_a_training_draws_three_figures(short_training):
    _, _, folder = short_training
    figures = ["saliency_adversarial.png", "saliency_mean.png", "saliency_samples.png"]
    assert sorted(path.name for path in folder.glob("*.png")) == figures


def test_loading_the_weights_prints_and_draws_what_training_did(short_training, tmp_path):
    _, trained, folder = short_training
    _, loaded = run("saliency.py", "--load", folder / "saliency.pt", "--n_images", 20,
                    "--out_dir", tmp_path)
    assert loaded.startswith("20 new images")
    assert loaded[:loaded.index("saved")] in trained
    for path in folder.glob("*.png"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_loss_of_step_0_is_nearly_that_of_a_uniform_prediction(short_training):
    _, output, _ = short_training
    loss, uniform = re.findall(r"\d\.\d+", output.splitlines()[0])
    assert uniform == "1.3863" and float(loss) == pytest.approx(float(uniform), abs=0.3)


def test_resnet18_has_the_keys_and_shapes_of_torchvision():
    """The checksum is that of torchvision 0.28: `name shape` for all of resnet18().state_dict()."""
    model = saliency.resnet18()
    lines = [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items()]
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == \
        "84fb10d9c6905a1cbb020b284537dc97c4f4ec55fb2a780a41152a23a2dd0e9d"


def test_resnet18_has_the_outputs_of_torchvision_with_equal_weights():
    """The numbers are those of torchvision 0.28, for colors normalized as its weights ask."""
    model = saliency.resnet18().eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            n = torch.arange(value.numel(), dtype=torch.float64).view(value.shape)
            wave = torch.sin(n * n * 0.1 + len(name))
            if value.ndim == 1:
                value.copy_(1 + 0.5 * wave)
            else:
                value.copy_(2 * wave / math.sqrt(value[0].numel()))
    x = torch.linspace(0, 1, 3 * 224 * 224).view(1, 3, 224, 224)
    with torch.no_grad():
        logits = model(x)[0]
    expected = [10.650976, 114.031876, -119.629089, 143.758896]
    assert logits[:4].tolist() == pytest.approx(expected, rel=1e-3)
    assert logits.std().item() == pytest.approx(117.16978, rel=1e-3)


COLORS = (0.8, 0.4, 0.2)                                # red, green, blue


def tiff_16(value):
    """A gray TIFF file of 16 bits with 30 x 30 equal values."""
    tags = [(256, 30), (257, 30), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 30),
            (279, 1800)]
    data = struct.pack("<H", value) * 900
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags)
    return (b"II*\0" + struct.pack("<I", 8 + len(data)) + data
            + struct.pack("<H", len(tags)) + directory + bytes(4))


def image_file(name):
    """The bytes of a 30 x 30 image in one color, and the color that is expected."""
    pixels = torch.tensor(COLORS).expand(30, 30, 3)
    buffer = io.BytesIO()
    if name == "gray":
        return b"P5 30 30 255\n" + bytes([51]) * 900, (0.2, 0.2, 0.2)
    if name == "16-bit TIFF":
        return tiff_16(13107), (0.2, 0.2, 0.2)          # 13107 / 65535
    if name == "alpha":                                 # half of the color, half of white
        pixels = torch.cat([pixels, torch.full((30, 30, 1), 0.5)], dim=2)
        matplotlib.image.imsave(buffer, pixels.numpy(), format="png")
        return buffer.getvalue(), (0.9, 0.7, 0.6)
    matplotlib.image.imsave(buffer, pixels.numpy(), format=name)
    return buffer.getvalue(), COLORS


@pytest.mark.parametrize("ending", ["png", "jpg", "txt"])
@pytest.mark.parametrize("name", ["png", "jpeg", "gif", "tiff", "gray", "16-bit TIFF", "alpha"])
def test_an_image_is_read_by_its_content_whatever_its_name(name, ending, tmp_path):
    content, expected = image_file(name)                # a GIF has a palette
    path = tmp_path / f"image.{ending}"
    path.write_bytes(content)
    image = saliency.read_image(path)
    expected = torch.tensor(expected).view(3, 1, 1).expand(3, 224, 224)
    assert torch.allclose(image, expected, atol=0.02)


@pytest.mark.parametrize("wide", [True, False])
def test_an_image_is_resized_to_256_and_its_center_is_kept(wide, tmp_path):
    ramp = torch.linspace(0, 1, 400).expand(300, 400)   # dark left, bright right
    pixels = torch.stack([ramp, ramp, ramp], dim=2)
    if not wide:
        pixels = pixels.transpose(0, 1).contiguous()
    matplotlib.image.imsave(tmp_path / "ramp.png", pixels.numpy())
    image = saliency.read_image(tmp_path / "ramp.png")
    if not wide:
        image = image.transpose(1, 2)
    # 400 columns become 341, of which columns 58 to 281 are kept
    expected = (torch.arange(58, 282) + 0.5) / 341
    assert torch.allclose(image, expected.expand(3, 224, 224), atol=0.01)


@pytest.mark.parametrize("name", ["missing.png", "folder", "text.png", "half.png"])
def test_a_file_that_is_not_an_image_is_one_sentence(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    content, _ = image_file("png")
    (tmp_path / "half.png").write_bytes(content[:len(content) // 2])
    with pytest.raises(SystemExit, match="cannot read .*: no such file, or not an image"):
        saliency.read_image(tmp_path / name)


@pytest.fixture(scope="module")
def resnet_weights():
    return saliency.resnet18().state_dict()


@pytest.mark.parametrize("name", ["missing", "another network", "module. before every key",
                                  "a checkpoint", "a pickled model", "a damaged file", "a text"])
def test_weights_that_do_not_fit_are_one_sentence(name, resnet_weights, tmp_path):
    path = tmp_path / "weights.pth"
    if name == "another network":
        torch.save(small_network().state_dict(), path)
    if name == "module. before every key":
        torch.save({f"module.{key}": value for key, value in resnet_weights.items()}, path)
    if name == "a checkpoint":
        torch.save({"epoch": 3, "state_dict": resnet_weights}, path)
    if name == "a pickled model":
        torch.save(small_network(), path)
    if name == "a damaged file":
        torch.save(resnet_weights, path)
        os.truncate(path, 1_000_000)
    if name == "a text":
        path.write_text("<html>not found</html>")
    with pytest.raises(SystemExit) as stop:
        saliency.load_resnet18(path)
    assert str(path) in stop.value.code and "\n" not in stop.value.code
    assert "plain state_dict of torchvision's resnet18" in stop.value.code


@pytest.fixture
def photograph_files(resnet_weights, tmp_path, monkeypatch):
    """A folder with resnet18.pth and photo.png, in which `download` writes files of our own."""
    def download(url, path, sha256):
        os.makedirs("data", exist_ok=True)
        content = "\n".join(f"class {n}" for n in range(1000)).encode()
        if path.endswith(".pth"):
            content = (tmp_path / "resnet18.pth").read_bytes()
        if path.endswith(".JPEG"):
            content = (tmp_path / "photo.png").read_bytes()
        with open(path, "wb") as file:
            file.write(content)

    monkeypatch.chdir(tmp_path)
    torch.save(resnet_weights, "resnet18.pth")
    matplotlib.image.imsave("photo.png", torch.rand(260, 300, 3).numpy())
    monkeypatch.setattr(attention_script, "download", download)
    monkeypatch.setattr(saliency, "download", download)
    monkeypatch.setattr(saliency, "PHOTOGRAPHS", saliency.PHOTOGRAPHS[:1])


def test_your_own_photographs_are_drawn_with_weights_from_a_file(photograph_files):
    options = ["--weights", "resnet18.pth", "--image", "photo.png", "--out_dir", "out"]
    _, output = run("saliency.py", *options)
    assert "photo.png: class " in output
    assert result_of(output)["accuracy"] == 1           # the predicted class is the label
    assert sorted(os.listdir("out")) == ["saliency_photographs.png",
                                         "saliency_photographs_adversarial.png"]


def test_the_photographs_of_imagenet_have_labels(photograph_files, monkeypatch):
    args = argparse.Namespace(weights="imagenet", image=None, eps=0.01, attack_steps=1,
                              device="cpu", out_dir="out")
    junco = F.one_hot(torch.tensor([13]), 1000)         # 13 is the class of the first one
    monkeypatch.setattr(saliency, "plot_samples", lambda *args: None)
    monkeypatch.setattr(saliency, "plot_attacks", lambda *args: None)
    monkeypatch.setattr(saliency, "predict", lambda model, images: junco)
    assert saliency.photographs(args).startswith("accuracy=1.0000 ")


def test_without_a_network_the_sentence_says_what_could_not_be_downloaded(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(SystemExit, match="cannot download https://.*junco.JPEG .*no network"):
        run("saliency.py", "--weights", "imagenet", "--out_dir", "out")


# ----------------------------------------------------------------------------------------------------------------------
# All scripts, and the README

SCRIPTS = ["attention.py", "parity.py", "counting.py", "translate.py", "saliency.py"]
MISTAKES = [
    ("attention.py", "--n_keys 0", "argument --n_keys: invalid positive int value: '0'"),
    ("parity.py", "--d_model 0", "argument --d_model: invalid positive int value: '0'"),
    ("parity.py", "--lr nan", "argument --lr: invalid positive float value: 'nan'"),
    ("parity.py", "--steps -5", "argument --steps: invalid positive int value: '-5'"),
    ("counting.py", "--unknown", "unrecognized arguments: --unknown"),
    ("counting.py", "--device tpu", "argument --device: invalid choice: 'tpu'"),
    ("parity.py", f"--device {'mps' if torch.cuda.is_available() else 'cuda'}", "no such device on this machine"),
    *(("counting.py", f"--sequence={sequence}", "--sequence: expected 1 to 10 digits from 0 to 2, separated by spaces")
      for sequence in ("", "0,1,3", "0," * 11, "-1", "012", "0,one")),
    *(("saliency.py", f"--load {path}", f"cannot load {path}")
      for path in ("missing.pt", os.path.join(HERE, "assets", "translate_toy.pt"))),
    ("translate.py", "--line 0", "--line 0: toy has lines 1 to 209773"),
    ("translate.py", "--line 209774", "--line 209774: toy has lines 1 to 209773"),
    ("translate.py", "--n_heads 3", "--n_heads 3 does not divide --d_model 64"),
    ("translate.py", "--plot", "--plot needs --line or --text"),
    ("translate.py", "--resume --line 7", "argument --line: not allowed with argument --resume"),
    ("translate.py", "--resume", "there is nothing to resume"),
    ("translate.py", "--data missing.tsv", "cannot read missing.tsv: [Errno 2] No such file or directory"),
    ("translate.py", "--data missing.tsv --test", "no weights for missing.tsv: train them with"),
    ("saliency.py", "--eps=-0.1", "argument --eps: invalid positive float value: '-0.1'"),
    ("saliency.py", "--image photo.jpg", "--image needs --weights"),
    ("saliency.py", "--weights imagenet --image missing.jpg", "cannot read missing.jpg"),
    ("translate.py", f"--text {'x' * 300}", "a text may have 99 tokens at most, not 3")]


@pytest.mark.parametrize("script, options, message", MISTAKES, ids=[" ".join(mistake[:2])[:40] for mistake in MISTAKES])
def test_a_likely_mistake_gives_one_clear_sentence_and_leaves_no_file(script, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--out_dir", tmp_path, *options.split())
    assert message in capsys.readouterr().err + str(stop.value.code)
    assert stop.value.code == 2 or isinstance(stop.value.code, str)        # a str is printed, and the status is 1
    assert not list(tmp_path.iterdir())


class Code:
    """What a pickle may contain: a function call, executed when the file is loaded."""
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("script, option, name", [("counting.py", "--sequence=0", "counting_sigmoid.pt"),
                                                  ("translate.py", "--line=7", "translate_toy.pt")])
def test_weights_that_contain_code_are_not_executed(script, option, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Code(), name)
    with pytest.raises(Exception, match="Weights only load failed"):
        run(script, option, "--out_dir", tmp_path)
    assert not os.path.exists("executed")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_only_torch_matplotlib_the_standard_library_and_five_shared_names(script):
    source = read(script)
    modules = {name.split(".")[0] for name in re.findall(r"^(?:import|from) ([\w.]+)", source, re.M)}
    assert modules - set(sys.stdlib_module_names) <= {"torch", "matplotlib", "attention"}
    shared = {name for names in re.findall(r"^from attention import (.+)$", source, re.M) for name in names.split(", ")}
    assert shared <= {"attention", "plot_attention", "parse_args", "positive", "download"}
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\(.*", source))


def test_every_option_file_and_function_that_the_readme_names_exists(capsys):
    readme, help_texts = read("README.md"), {}
    for script in SCRIPTS:
        with pytest.raises(SystemExit, match="0"), pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "200")
            patch.setattr(sys, "argv", [script, "--help"])
            runpy.run_path(os.path.join(HERE, script), run_name="__main__")
        help_texts[script] = capsys.readouterr().out
    commands = re.findall(r"(?:python|torchrun --nproc_per_node \d+) (\w+\.py)([^`\n|]*)", readme)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, options in commands:
        for option in re.findall(r"--\w+", options):
            assert f"{option} " in help_texts[script] or f"{option}\n" in help_texts[script], (script, option)
    for path in re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme):
        assert os.path.exists(os.path.join(HERE, path)), path
    figures = {name for name in os.listdir(os.path.join(HERE, "assets")) if name.endswith(".png")}
    assert figures == set(re.findall(r"assets/(\w+\.png)", readme))
    source = "".join(map(read, SCRIPTS))
    for name in re.findall(r"`(\w+)\(?[^`]*`", readme.split("## The exercise sheets")[1].split("## ")[0]):
        assert name in source, name


def test_the_worked_example_and_the_result_lines_in_the_readme_are_those_of_the_scripts(tmp_path):
    readme, (_, output) = read("README.md"), run("attention.py", "--steps", 1, "--out_dir", tmp_path)
    assert output[:output.index("step 0")] in readme
    printed = dict.fromkeys(tuple(re.findall(r"(\w+)=", line)) for line in re.findall("^result: .+", readme, re.M))
    assert set(printed) >= {("accuracy", "params", "seconds"), ("accuracy_val", "accuracy_all", "params", "seconds"),
                            ("smallest_95", "smallest_all", "seconds"), ("accuracy_all", "params", "seconds"),
                            ("exact", "bleu", "alignment", "params", "seconds"),
                            ("accuracy", "pointing", "accuracy_attacked", "params", "seconds")}
