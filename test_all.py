"""
Tests of what the scripts and the README claim, in the order of the scripts.

$ pytest test_all.py
"""

import argparse
import ast
import collections
import contextlib
import copy
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
import zipfile

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
    """Every test starts with the same random numbers. One thread: all tensors are small."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def run(script, *options):
    """Run a script in this process. Returns its global variables and what it printed."""
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
    last = output.splitlines()[-1]
    assert last.startswith("result: ")
    return {key: float(value) for key, value in re.findall(r"(\w+)=(\S+)", last)}


def wild(module, std=0.5):
    """Give a module large random weights, also biases, so no mistake hides behind a zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


def classifier(*sizes):
    """A parity classifier in float64."""
    return wild(parity.TransformerClassifier(2, 2, *sizes).double(), 2.0)


# --------------------------------------------------------------------------------------------------
# attention.py

RANDOM_MASK = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
MASKS = {
    "none": None,
    "causal": torch.ones(5, 7).tril().bool(),
    "padding": (torch.arange(7) < torch.tensor([[7], [4]])).view(2, 1, 1, 7),
    "random": RANDOM_MASK,
    "a query with nothing to attend to": torch.ones(5, 7).tril(-1).bool(),
}


def queries_keys_values():
    """Random q (2, 3, 5, 8), k (2, 3, 7, 8), v (2, 3, 7, 4)."""
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    k = torch.randn(2, 3, 7, 8, requires_grad=True)
    v = torch.randn(2, 3, 7, 4, requires_grad=True)
    return q, k, v


def test_the_loops_give_the_output_of_the_matrices():
    q = torch.randn(4, 3)
    k = torch.randn(5, 3)
    v = torch.randn(5, 2)
    loops = attention_script.attention_loops(q.tolist(), k.tolist(), v.tolist())
    output, _ = attention(q, k, v)
    assert torch.allclose(torch.tensor(loops), output, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_output_is_that_of_torch(mask):
    q, k, v = queries_keys_values()
    output, _ = attention(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_gradients_are_those_of_torch(mask):
    inputs = queries_keys_values()
    output, _ = attention(*inputs, mask)
    ours = torch.autograd.grad(output.square().sum(), inputs)
    expected = F.scaled_dot_product_attention(*inputs, mask)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    for our_gradient, their_gradient in zip(ours, theirs):
        assert torch.allclose(our_gradient, their_gradient, atol=1e-5)


def test_the_weights_are_those_of_the_output():
    q, k, _ = queries_keys_values()
    v = torch.eye(7)  # with one-hot values, the output is the weights
    output, weights = attention(q, k, v)
    assert torch.equal(output, weights)


def test_softmax_weights_of_a_query_sum_to_1():
    q, k, v = queries_keys_values()
    _, weights = attention(q, k, v)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 3, 5))


def test_a_sigmoid_weight_depends_on_its_own_key_only():
    q, k, v = queries_keys_values()
    _, weights = attention(q, k, v, activation="sigmoid")
    _, alone = attention(q, k[:, :, :1], v[:, :, :1], activation="sigmoid")
    assert torch.allclose(weights[..., :1], alone)
    assert weights.max() < 1
    assert weights.min() > 0


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mask", list(MASKS.values())[1:], ids=list(MASKS)[1:])
def test_a_masked_key_gets_weight_0(mask, activation):
    q, k, v = queries_keys_values()
    _, weights = attention(q, k, v, mask, activation)
    assert torch.equal(weights > 0, mask.expand(2, 3, 5, 7))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_query_with_nothing_to_attend_to_gets_zeros(activation):
    q, k, v = queries_keys_values()
    mask = MASKS["a query with nothing to attend to"]
    output, _ = attention(q, k, v, mask, activation)
    assert (output[..., 0, :] == 0).all()
    assert (output[..., 1:, :] != 0).all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_gradients_are_right_by_finite_differences(mask, activation):
    def output(q, k, v):
        return attention(q, k, v, mask, activation)[0]

    inputs = tuple(tensor.double() for tensor in queries_keys_values())
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_query_with_nothing_to_attend_to_gets_no_nan_on_the_way_back(activation):
    q, k, v = queries_keys_values()
    mask = MASKS["a query with nothing to attend to"]
    # an error at the first NaN in a backward pass
    with torch.autograd.set_detect_anomaly(True):
        output, _ = attention(q, k, v, mask, activation)
        output.sum().backward()


def test_masked_keys_get_no_weight_however_low_the_other_scores_are():
    q = torch.full((1, 4), 100.0)
    k = torch.tensor([[-100.0] * 4, [100.0] * 4])
    v = torch.eye(2)
    _, weights = attention(q, k, v, torch.tensor([[True, False]]))
    assert weights.tolist() == [[1.0, 0.0]]


def test_half_precision_does_not_overflow():
    # 64 * 40 * 40 = 102,400, the largest float16 is 65,504
    x = torch.full((2, 64), 40.0, dtype=torch.float16)
    output, weights = attention(x, x, x)
    assert (output == 40).all()
    assert (weights == 0.5).all()


def test_a_mask_of_numbers_is_refused():
    q, k, v = queries_keys_values()
    with pytest.raises(AssertionError, match="mask must be boolean, True = may attend"):
        attention(q, k, v, torch.ones(5, 7))


def test_the_docstring_has_the_right_numbers():
    query = torch.tensor([[2.0, 0, 2, 0]])
    key = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]])
    value = torch.tensor([[10.0, 0], [0, 10], [5, 5]])
    output, weights = attention(query, key, value)
    rows = {
        "scores  = query . key ": query @ key.T,
        "scores / sqrt(4)      ": query @ key.T / 2,
        "weights = softmax     ": weights,
        "output                ": output,
    }
    for name, row in rows.items():
        numbers = " ".join(f"{x:.2f}" for x in row[0].tolist())
        assert f"    {name} =  {numbers}" in attention_script.__doc__


def test_queries_of_the_dictionary_are_rotated_keys():
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    query, key, target = attention_script.make_lookups(5, 6, rotation, noise=0.0)
    for b in range(5):
        rotated = key[b, target[b]] @ rotation
        assert torch.allclose(query[b], rotated, atol=1e-6)


def test_the_script_agrees_with_its_loops_and_learns_the_dictionary(tmp_path):
    _, output = run("attention.py", "--out_dir", tmp_path)
    assert "the loops give the same output: True\n" in output
    result = result_of(output)
    assert result["accuracy"] > 0.999
    assert result["params"] == 2 * 32 * 32
    assert (tmp_path / "attention_dictionary.png").exists()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_attention_works_on_all_leading_dimensions(activation):
    for lead in [(), (3,), (4, 2, 3)]:
        q = torch.randn(*lead, 5, 8)
        k = torch.randn(*lead, 7, 8)
        v = torch.randn(*lead, 7, 4)
        output, weights = attention(q, k, v, MASKS["causal"], activation)
        assert output.shape == (*lead, 5, 4)
        assert weights.shape == (*lead, 5, 7)


def test_the_memory_of_the_formula_grows_with_the_square_of_the_length_that_of_the_kernel_does_not(
):
    _, memory = attention_script.benchmark("cpu", [128, 256])
    mib = 2 ** 20
    for i, T in enumerate([128, 256]):
        scaled_queries = 4 * T * 64 * 4  # 4 heads, 4 bytes a number
        all_weights = 4 * T * T * 4
        assert memory["explicit"][i] * mib == all_weights + scaled_queries
        assert memory["fused"][i] < 2.1 * scaled_queries / mib


def test_the_guide_lines_of_the_benchmark_do_not_cross_the_data(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(attention_script.plt, "close", figures.append)
    lengths = [64, 128, 256, 512]
    measured = {"explicit": [9.0, 10.0, 20.0, 70.0], "fused": [1.0, 2.0, 4.0, 8.0]}
    attention_script.plot_benchmark(lengths, measured, measured, tmp_path / "figure.png")
    lines = [line.get_ydata() for line in figures[0].axes[1].lines]
    assert len(lines) == 4
    explicit = lines[0]
    fused = lines[1]
    square = lines[2]
    linear = lines[3]
    for guide, y in zip(square, explicit[2:], strict=True):
        assert guide > y
    for guide, y in zip(linear, fused, strict=True):
        assert guide < y


def drawn(monkeypatch, *arguments, **options):
    """The axes that plot_attention draws, without the color bar."""
    figures = []
    monkeypatch.setattr(attention_script.plt, "close", figures.append)
    attention_script.plot_attention(*arguments, io.BytesIO(), **options)
    return figures[0].axes[:-1]


def test_marks_are_dots_in_the_cells_that_are_true(monkeypatch):
    weights = torch.rand(2, 3, 4)
    marks = torch.zeros(2, 3, 4, dtype=torch.bool)
    marks[1, 2, 0] = True
    axes = drawn(monkeypatch, weights, list("abcd"), list("xyz"), marks=marks)
    dots = [axis.collections[0].get_offsets() for axis in axes[:2]]
    assert len(dots[0]) == 0
    assert dots[1].tolist() == [[0, 2]]  # key 0, query 2


def test_heatmaps_show_the_weights_on_one_scale(monkeypatch):
    weights = torch.rand(3, 4, 5)
    axes = drawn(monkeypatch, weights, list("abcde"), list("wxyz"))
    for axis, panel in zip(axes, weights):
        image = axis.images[0]
        shown = torch.tensor(image.get_array().tolist())
        assert torch.equal(shown, panel)
        assert image.get_clim() == (0.0, weights.max().item())
        labels = [label.get_text() for label in axis.get_yticklabels()]
        assert labels == list("wxyz")


def test_output_never_ends_a_training(monkeypatch, tmp_path):
    buffer = io.BytesIO()
    console = io.TextIOWrapper(buffer, encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["script", "--out_dir", str(tmp_path)])
    attention_script.parse_args(argparse.ArgumentParser())
    print("\u2581", flush=True)  # a console of code page 1252 does not have it
    assert buffer.getvalue() == rb"\u2581" + os.linesep.encode()


def test_the_seed_is_that_of_the_option(monkeypatch, tmp_path):
    options = ["--seed", "5", "--out_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["script", *options])
    attention_script.parse_args(argparse.ArgumentParser())
    assert torch.initial_seed() == 5


def test_a_download_is_checked(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"content")
    path = tmp_path / "data" / "file"
    with pytest.raises(SystemExit, match="cannot download .*invalid hash value"):
        download(source.as_uri(), str(path), "0" * 64)
    assert not path.exists()


def test_a_download_that_fails_says_what_to_do(tmp_path):
    path = tmp_path / "file"
    message = f"cannot download .*: try again, or save the file as {path} yourself"
    with pytest.raises(SystemExit, match=message):
        download("https://127.0.0.1:1/file", str(path), "0" * 64)  # no server there


def test_a_file_is_downloaded_once(tmp_path):
    source = tmp_path / "source"
    path = tmp_path / "data" / "file"
    source.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    download(source.as_uri(), str(path), sha256)
    source.unlink()
    download(source.as_uri(), str(path), sha256)
    assert path.read_bytes() == b"content"


def test_a_wrong_file_that_is_already_there_is_named_and_kept(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"<html>")
    sha256 = hashlib.sha256(b"content").hexdigest()
    with pytest.raises(SystemExit, match=f"{path} .*: delete it"):
        download("https://127.0.0.1:1/file", str(path), sha256)
    assert path.read_bytes() == b"<html>"


# --------------------------------------------------------------------------------------------------
# parity.py
def test_the_classes_have_the_shapes_of_the_exercise():
    x = torch.randn(4, 10, 16)
    assert parity.SelfAttention(16, 8)(x).shape == (4, 10, 16)
    assert parity.MultiHeadSelfAttention(16, 8, 3)(x).shape == (4, 10, 16)
    assert parity.TransformerBlock(16, 8, 3)(x).shape == (4, 10, 16)
    tokens = torch.randint(2, (4, 10))
    assert parity.TransformerClassifier(2, 5, 16, 8, 3)(tokens).shape == (4, 5)


def test_the_classes_have_the_parts_of_the_exercise():
    model = parity.TransformerClassifier(2, 2)
    names = [name for name, _ in model.named_children()]
    assert names == ["token_embedding", "transformer_model", "final_layer_norm", "classifier"]
    names = [name for name, _ in model.transformer_model[0].named_children()]
    assert names == ["ln1", "attn", "ln2", "mlp"]


@pytest.mark.parametrize("n_heads", [1, 2])
def test_the_block_equals_torch(n_heads):
    theirs = nn.TransformerEncoderLayer(8, n_heads, 32, 0.0, F.silu, batch_first=True,
                                        norm_first=True)
    wild(theirs)
    width = 8 // n_heads
    ours = parity.TransformerBlock(8, width, n_heads)
    ours.ln1.load_state_dict(theirs.norm1.state_dict())
    ours.ln2.load_state_dict(theirs.norm2.state_dict())
    ours.mlp[0].load_state_dict(theirs.linear1.state_dict())
    ours.mlp[2].load_state_dict(theirs.linear2.state_dict())
    weights = theirs.self_attn.in_proj_weight.chunk(3)                     # of q, k and v
    biases = theirs.self_attn.in_proj_bias.chunk(3)
    out = theirs.self_attn.out_proj
    with torch.no_grad():
        # torch's heads return d_model / n_heads features. The others stay 0, and w_o ignores them.
        ours.attn.w_o.weight.zero_()
        ours.attn.w_o.bias.copy_(out.bias)
        for h, head in enumerate(ours.attn.heads):
            rows = slice(h * width, (h + 1) * width)
            linears = (head.w_q, head.w_k, head.w_v)
            for linear, weight, bias in zip(linears, weights, biases):
                linear.weight.zero_()
                linear.bias.zero_()
                linear.weight[:width] = weight[rows]
                linear.bias[:width] = bias[rows]
            ours.attn.w_o.weight[:, h * 8:h * 8 + width] = out.weight[:, rows]
    x = torch.randn(4, 10, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_layernorm_computes_the_example_in_the_comment():
    normalized = nn.LayerNorm(4)(torch.tensor([1.0, 3.0, 5.0, 7.0]))
    numbers = ", ".join(f"{x:.2f}" for x in normalized)
    assert f"({numbers})" in read("parity.py")


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_the_order_of_the_bits_is_invisible(n_layers):
    model = classifier(8, 4, 2, 4, n_layers)
    strings = torch.randint(2, (20, 9))
    shuffled = strings[:, torch.randperm(9)]
    assert torch.allclose(model(strings), model(shuffled), atol=1e-8)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_a_string_written_twice_gets_the_same_logits(n_layers):
    model = classifier(8, 4, 2, 4, n_layers)
    strings = torch.randint(2, (20, 9))
    twice = torch.cat([strings, strings], dim=1)
    assert torch.allclose(model(strings), model(twice), atol=1e-8)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_width_1_gives_all_strings_the_same_logits(n_layers):
    model = classifier(1, 1, 1, 1, n_layers)
    strings, _, _ = parity.one_string_per_count(10)
    logits = model(strings)
    assert (logits == logits[0]).all()


@pytest.mark.parametrize("n_layers", [0, 2])
def test_the_exact_accuracy_is_that_of_trying_all_strings(n_layers):
    model = classifier(8, 4, 2, 1, n_layers)
    accuracy, correct, _ = parity.exact_accuracy(model, 8)
    n_right, _ = parity.check_on_all_strings(model, 8)
    assert 0 < n_right < 256
    assert accuracy == n_right / 256
    assert sum(math.comb(8, c) for c in range(9) if correct[c]) == n_right


def test_the_check_counts_right_answers_and_finds_the_closest_logits():
    def model(strings):
        logits = torch.zeros(len(strings), 2)
        logits[:, 1] = 2.0 * (strings.sum(dim=1) % 2) - 1.0                # right everywhere but
        logits[strings.sum(dim=1) == 3, 1] = -0.25                         # for three ones
        return logits
    assert parity.check_on_all_strings(model, 4) == (12, 0.25)


@pytest.fixture(scope="module")
def short_training(tmp_path_factory):
    """A training at length 4: the script's globals, what it printed, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("parity")
    values, output = run("parity.py", "--seq_len", 4, "--steps", 200, "--out_dir", folder)
    return values, output, folder


def test_a_short_training_learns_parity(short_training):
    result = result_of(short_training[1])
    assert list(result) == ["accuracy_val", "accuracy_all", "params", "seconds"]
    assert result["accuracy_val"] == 1
    assert result["accuracy_all"] == 1
    assert result["params"] == 2426


def test_the_saved_weights_are_those_of_the_trained_model(short_training):
    values, _, folder = short_training
    saved = torch.load(folder / "parity.pt", weights_only=True)
    model = parity.TransformerClassifier(*saved["sizes"])
    model.load_state_dict(saved["weights"])
    strings, _, _ = parity.one_string_per_count(4)
    assert torch.equal(model(strings), values["model"](strings))


def test_the_curve_has_one_loss_and_one_accuracy_for_each_step(short_training):
    values, _, folder = short_training
    assert len(values["losses"]) == len(values["accuracies"]) == values["step"] + 1
    assert values["losses"][0] == pytest.approx(math.log(2), abs=0.1)
    assert values["losses"][-1] < 0.05
    assert values["accuracies"][-1] == 1
    assert (folder / "parity_curve.png").exists()


def test_the_training_stops_after_five_low_losses_in_a_row(short_training):
    losses = short_training[0]["losses"]
    low = "".join("1" if loss < 0.002 else "0" for loss in losses)
    assert low.index("11111") == len(losses) - 5 < 195


def test_the_same_seed_trains_the_same_model(tmp_path):
    options = ["--seq_len", 4, "--steps", 5, "--batch_size", 20, "--out_dir", tmp_path]
    first, _ = run("parity.py", *options)
    second, _ = run("parity.py", *options)
    for p, q in zip(first["model"].parameters(), second["model"].parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("batch_size", [3, 800])
def test_a_batch_is_a_part_of_the_training_strings(batch_size, tmp_path, monkeypatch):
    """Seen by the embedding: a batch of the first 8 of 10 strings, the other 2 at the end."""
    seen = []
    embed = nn.Embedding.forward

    def _embed(self, tokens):
        seen.append(tokens)
        return embed(self, tokens)
    monkeypatch.setattr(nn.Embedding, "forward", _embed)
    values, _ = run("parity.py", "--n_samples", 10, "--steps", 1, "--batch_size", batch_size,
                    "--out_dir", tmp_path)
    x = values["x"]
    rows = values["rows"]
    assert len(rows) == min(batch_size, 8)
    assert rows.max() < 8
    assert torch.equal(seen[0], x[rows])
    assert any(torch.equal(tokens, x[8:]) for tokens in seen[1:])


@pytest.mark.parametrize("options, message", [
    ("--n_samples 1", "--n_samples 1: at least 2 are needed"),
    ("--n_layers -1", "--n_layers -1: 0 or more are needed"),
    ("--batch_size 0", "argument --batch_size: invalid positive int value: '0'")])
def test_a_likely_mistake_in_parity_gives_one_sentence(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("parity.py", "--out_dir", tmp_path, *options.split())
    assert message in capsys.readouterr().err + str(stop.value.code)
    assert not list(tmp_path.iterdir())


# The smallest networks. They are in assets, as `python parity.py --sweep` saved them.
@pytest.mark.parametrize("params, n_right", [(20, 968), (32, 1023), (46, 1024), (58, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_networks_are_right_on_as_many_strings_as_claimed(params, n_right, dtype):
    path = os.path.join(HERE, "assets", f"parity_{params}.pt")
    saved = torch.load(path, weights_only=True)
    model = parity.TransformerClassifier(*saved["sizes"])
    model.load_state_dict(saved["weights"])
    assert sum(p.numel() for p in model.parameters()) == params
    found, smallest = parity.check_on_all_strings(model.to(dtype), 10)
    assert found == n_right
    assert smallest > 0.1


@pytest.mark.parametrize("width", [2, 3, 4])
def test_without_a_block_the_classifier_gets_a_point_on_a_line(width):
    x, _ = parity.classifier_input(parity.straight_model(width), 10)
    assert torch.allclose(x, torch.linspace(-1, 1, 11, dtype=torch.double))


def test_the_block_folds_the_line_of_counts_in_its_middle():
    x, u = parity.classifier_input(parity.folding_model(), 10)
    assert torch.allclose(x, torch.linspace(-1, 1, 11, dtype=torch.double).abs(), atol=1e-5)
    assert torch.allclose(u, torch.tensor([1.0, -1.0]).double(), atol=1e-5)


def test_after_the_folding_block_tokens_of_the_majority_are_1_and_the_others_minus_1():
    strings = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    feature = parity.token_vectors(parity.folding_model(), strings)[:, :, 0]
    majority = torch.tensor([[1, 1, 1, 1, -1, -1], [-1, -1, 1, 1, 1, 1]]).double()
    assert torch.allclose(feature, majority, atol=1e-4)


@pytest.mark.parametrize("width", [2, 3])
def test_the_classifier_computes_the_f_that_is_written_into_it(width):
    model = parity.straight_model(width)
    x, u = parity.classifier_input(model, 10)
    w = torch.randn(width).double()
    b = torch.randn(width).double()
    a = torch.randn(width + 1).double()
    parity.set_classifier(model, u, w, b, a)
    _, _, f = parity.exact_accuracy(model, 10)
    for c in range(11):
        u = w * (2 * c / 10 - 1) + b                                       # (width,)
        expected = a[-1] + (a[:-1] * u / (1 + (-u).exp())).sum()
        assert f[c] == pytest.approx(expected.item())


def test_the_search_returns_the_least_squares_solution_for_its_units():
    x = torch.linspace(-1, 1, 7).double()
    targets = torch.tensor([1.0, -1, 1, -1, 1, 1, -1]).double()
    w, b, a = parity.search(x, targets, width=2, n_starts=50, n_rounds=2, n_steps=20)
    units = parity.hidden_units(x, w, b)
    residual = units @ a - targets
    assert (units.T @ residual).abs().max() < 1e-6                         # orthogonal to all
    assert residual.square().sum() < targets.square().sum()


def test_more_rounds_of_the_search_get_nearer_to_the_targets():
    x = torch.linspace(-1, 1, 11, dtype=torch.double)
    targets = torch.tensor([-1.0, 1] * 5 + [-1]).double()
    distances = {1: 0.0, 6: 0.0}
    for n_rounds in distances:
        for seed in range(3):
            torch.manual_seed(seed)
            w, b, a = parity.search(x, targets, 4, n_starts=100, n_rounds=n_rounds, n_steps=20)
            residual = parity.hidden_units(x, w, b) @ a - targets
            distances[n_rounds] += residual.square().sum().item()
    assert distances[6] < 0.9 * distances[1]


def test_a_search_that_misses_is_started_again(monkeypatch):
    wrong = (torch.ones(2), torch.ones(2), torch.ones(3))
    x = torch.linspace(-1, 1, 3, dtype=torch.double)
    right = parity.search(x, torch.tensor([-1.0, 1.0, -1.0]).double(), width=2)
    results = [wrong, wrong, right, wrong]
    monkeypatch.setattr(parity, "search", lambda *options: results.pop(0))
    model = parity.find_network(2, 0, [], seq_len=2)
    assert len(results) == 1
    assert parity.check_on_all_strings(model, 2)[0] == 4


def test_the_sweep_saves_and_draws_what_it_finds(tmp_path, capsys):
    networks = [(2, 0, []), (2, 1, [])]
    assert parity.sweep(tmp_path, networks, seq_len=4) == {20: 16, 58: 16}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"parity_20.pt", "parity_58.pt", "parity_fold.png", "parity_smallest.png"}
    saved = torch.load(tmp_path / "parity_58.pt", weights_only=True)
    model = parity.TransformerClassifier(*saved["sizes"])
    model.load_state_dict(saved["weights"])
    assert parity.check_on_all_strings(model, 4)[0] == 16
    row = [line for line in capsys.readouterr().out.splitlines() if "|" in line][1]
    assert row.split()[:6] == ["20", "0", "2", "|", "16", "4"]


# What can be checked with numbers in assets/proof_20.md
def test_proof_two_units_can_change_sign_five_times():
    x = torch.arange(11).double()
    f = 0.09 + 1.9 * F.silu(3 * (x - 5.1)) - 0.9 * F.silu(6.5 * (x - 5.15))
    signs = "".join("+" if value > 0 else "-" for value in f)
    assert signs == "++++-+-+---"


def test_proof_five_changes_of_the_answer_get_at_most_968_strings_right():
    best = collections.Counter()
    for answers in itertools.product([0, 1], repeat=11):
        n_changes = sum(a != b for a, b in zip(answers, answers[1:]))
        n_right = sum(math.comb(10, c) for c in range(11) if answers[c] == c % 2)
        best[n_changes] = max(best[n_changes], n_right)
    assert best[5] == 968
    assert best[9] == 1023
    assert best[10] == 1024
    assert max(best[n] for n in range(5)) < 968


@pytest.mark.parametrize("seed", range(20))
def test_proof_step_1_six_zeros_force_the_signs_of_inequality_3(seed):
    """Random exponents and zeros; the 7 coefficients follow from the 6 zeros, up to a factor."""
    torch.manual_seed(seed)
    directions = 2 * torch.randint(2, (2,)) - 1
    w1, w2 = directions * (0.3 + torch.rand(2))
    x = (torch.arange(6) + 0.6 * torch.rand(6)).double() - 3               # the zeros
    exponents = [0, -w1, -w2, -w1 - w2]
    columns = []
    for exponent in exponents[:3]:
        columns.append(x * (exponent * x).exp())
        columns.append((exponent * x).exp())
    columns.append((exponents[3] * x).exp())
    matrix = torch.stack(columns, dim=1)                                   # (6, 7)
    _, _, v = torch.linalg.svd(matrix)
    coefficients = v[-1]                                                   # in the null space
    assert (matrix @ coefficients).abs().max() < 1e-9
    d = coefficients[6]
    for i in range(3):
        p = coefficients[2 * i]
        assert p * d * (exponents[3] - exponents[i]) < 0


@pytest.fixture(scope="module")
def grid():
    """u, s = silu', and h = s' / s with its first two derivatives, by automatic differentiation."""
    u = torch.linspace(-25, 25, 5000, dtype=torch.double, requires_grad=True)
    s, = torch.autograd.grad(F.silu(u).sum(), u, create_graph=True)
    ds, = torch.autograd.grad(s.sum(), u, create_graph=True)
    h = ds / s
    dh, = torch.autograd.grad(h.sum(), u, create_graph=True)
    ddh, = torch.autograd.grad(dh.sum(), u)
    return u.detach(), s.detach(), h.detach(), dh.detach(), ddh


M = 1.2784645427610738  # where silu' is zero: u = -M, and M = 1 + e^-M


def test_proof_step_2_the_formula_for_s_and_its_only_zero(grid):
    u, s, _, _, _ = grid
    E = u.exp()
    assert torch.allclose(s, E * (1 + E + u) / (1 + E) ** 2)
    assert M == pytest.approx(1 + math.exp(-M), abs=1e-12)
    assert ((s > 0) == (u > -M)).all()


def test_proof_step_2_the_formula_for_h(grid):
    u, _, h, _, _ = grid
    E = u.exp()
    r = (1 + E) / (1 + E + u)
    assert torch.allclose(h, 1 + r - 2 * u.sigmoid(), atol=1e-6)


def test_proof_fact_i_left_of_minus_m_h_falls_and_is_concave(grid):
    u, _, _, dh, ddh = grid
    left = u < -M
    assert (dh[left] < 0).all()
    assert (ddh[left] < 0).all()


def test_proof_fact_ii_right_of_minus_m_h_falls_convexly_and_then_rises(grid):
    u, _, h, dh, ddh = grid
    right = u > -M
    falls = dh[right] < 0
    n_falls = falls.sum()
    u0 = u[right][n_falls]
    assert u0 > M
    assert falls[:n_falls].all()                                           # one change only
    assert (ddh[right][:n_falls] > 0).all()
    assert h[-1].abs() < 1e-8


def test_proof_fact_iii_the_bounds_on_h_and_s(grid):
    u, s, h, _, _ = grid
    assert (h[u > -M] > -1).all()
    middle = (u > -M) & (u <= 0)
    assert (h[middle] >= 1).all()
    assert (s[middle] <= 0.5).all()
    negative = (u > -M) & (h < 0)
    assert (s[negative] > 1).all()
    assert (h[u >= u[negative].min()] < 0).all()                           # and it stays negative


# --------------------------------------------------------------------------------------------------
# counting.py

def one_hot(*digits):
    """One sequence of digits 0, 1, 2, one-hot (1, T, 3), in float64."""
    return F.one_hot(torch.tensor([digits]), 3).double()


def wild_counter(*options, std=2.0):
    """A counting model for digits 0, 1, 2 with large random weights, in float64."""
    return wild(counting.CountingModel(3, *options).double(), std)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_counting_model_is_the_plain_formula(activation):
    model = wild_counter(6, 4, activation)
    digits = [2, 0, 0, 1, 2]
    logits, weights = model(one_hot(*digits))
    p = {name: value.detach() for name, value in model.named_parameters()}
    keys = [p["key.weight"][:, d] + p["key.bias"] for d in digits]
    values = [p["value.weight"][:, d] + p["value.bias"] for d in digits]
    for v, query in enumerate(p["query"][0]):
        scores = [query @ key / math.sqrt(4) for key in keys]
        row = torch.tensor([1 / (1 + math.exp(-score)) for score in scores]).double()
        if activation == "softmax":
            exponentials = torch.tensor([math.exp(score) for score in scores]).double()
            row = exponentials / exponentials.sum()
        assert torch.allclose(weights[0, v], row)
        x = query.clone()
        for weight, value in zip(row, values):
            x += weight * value
        deviation = (x.var(correction=0) + 1e-5).sqrt()
        x = (x - x.mean()) / deviation
        x = x * p["norm.weight"] + p["norm.bias"]
        expected = p["out.weight"] @ x + p["out.bias"]
        assert torch.allclose(logits[0, v], expected)


def test_under_softmax_a_sequence_written_twice_has_the_same_logits():
    model = wild_counter(10, 8, "softmax")
    once, _ = model(one_hot(0, 1, 1, 2, 1))
    twice, _ = model(one_hot(0, 1, 1, 2, 1, 0, 1, 1, 2, 1))
    assert torch.allclose(once, twice)


def test_under_sigmoid_a_sequence_written_twice_has_other_logits():
    model = wild_counter(10, 8, "sigmoid")
    once, _ = model(one_hot(0, 1, 1, 2, 1))
    twice, _ = model(one_hot(0, 1, 1, 2, 1, 0, 1, 1, 2, 1))
    assert (once - twice).abs().max() > 1


def test_the_order_of_the_digits_has_no_effect():
    model = wild_counter(10, 8)
    logits, _ = model(one_hot(0, 1, 1, 2, 1))
    other_order, _ = model(one_hot(1, 2, 1, 0, 1))
    assert torch.allclose(logits, other_order)


def test_weights_half_as_large_with_values_twice_as_large_give_the_same_logits(monkeypatch):
    model = wild_counter(10, 8, std=0.5)
    expected, weights = model(one_hot(0, 1, 1, 2, 1))

    def half(q, k, v, activation):
        _, weights = attention(q, k, v, activation=activation)
        return weights / 2 @ v, weights / 2

    monkeypatch.setattr(counting, "attention", half)
    with torch.no_grad():
        model.value.weight.mul_(2)
        model.value.bias.mul_(2)
    logits, halves = model(one_hot(0, 1, 1, 2, 1))
    assert torch.allclose(logits, expected)
    assert torch.allclose(2 * halves, weights)


def test_softmax_without_layernorm_makes_logits_linear_in_the_weight_of_the_0s_with_one_slope():
    model = wild_counter(10, 8, "softmax")
    model.norm = nn.Identity()
    slopes = []
    for n_zeros in range(10):
        digits = [0] * n_zeros + [1] * (10 - n_zeros)
        logits, weights = model(one_hot(*digits))
        digits[n_zeros] = 0  # one more
        more, more_weights = model(one_hot(*digits))
        # (3, 1), one for each query
        w = weights[0, :, :n_zeros].sum(dim=1, keepdim=True)
        more_w = more_weights[0, :, :n_zeros + 1].sum(dim=1, keepdim=True)
        assert (more_w > w).all()
        slope = (more - logits)[0] / (more_w - w)
        steep = (more_w - w).flatten() > 1e-3  # skip a division by almost 0
        slopes.append(slope[steep])  # (n, 11)
    slopes = torch.cat(slopes)
    assert len(slopes) > 5
    assert torch.allclose(slopes, slopes[:1].expand_as(slopes))


def softmax_that_counts():
    """
    Softmax parameters, written by hand, that count all sequences of length 10.

    All keys are 0, so every weight is 1 / 10, and the output is the sum of fraction * value.
    The query of a digit is 20 * common + 20 * value of the digit. So the squared length of the
    vector before LayerNorm grows with the count of the digit, and LayerNorm, which divides by
    the length, makes the coordinate along `common` smaller.
    """
    # rows of length 1, orthogonal to each other
    # basis[0] is constant, so the mean of the numbers of all others is 0
    columns = torch.cat([torch.ones(16, 1), torch.randn(16, 15)], dim=1)
    basis = torch.linalg.qr(columns)[0].T
    common = basis[1]
    values = basis[2:5]
    # fraction of the digit; the others have equal parts
    fraction = torch.arange(11) / 10
    along_value = 20 + fraction
    length = (400 + along_value ** 2 + (1 - fraction) ** 2 / 2).sqrt()
    height = 4 * 20 / length  # along `common`, after LayerNorm
    model = counting.CountingModel(3, 10, 16, "softmax")
    with torch.no_grad():
        model.key.weight.zero_()
        model.key.bias.zero_()
        model.value.weight.copy_(values.T)
        model.value.bias.zero_()
        model.query.copy_(20 * common + 20 * values)
        # logit: -1e4 * (y - height)^2 without its y^2, which is the same for all counts
        model.out.weight.copy_(2e4 * height.unsqueeze(1) * common)
        model.out.bias.copy_(-1e4 * height ** 2)
    return model, height


def test_with_layernorm_hand_written_softmax_parameters_count_all_sequences_of_length_10():
    model, _ = softmax_that_counts()
    sequences = counting.all_sequences(10, 3)
    assert counting.accuracy(model, sequences, 3) == 1


def test_these_parameters_are_as_far_from_the_start_of_training_as_the_appendix_says():
    model, height = softmax_that_counts()
    start = torch.cat([counting.CountingModel(3, 10, 16).query for _ in range(100)])
    start_length = start.norm(dim=-1).mean()
    ratio = model.query.norm(dim=-1).mean() / start_length
    assert 6.5 < ratio < 7.5  # seven times as long
    steps = height[:-1] - height[1:]
    assert (steps * 1000).round().tolist() == [7] * 10  # 0.007 apart
    assert model.out.weight.abs().max() > 10_000


def test_all_combinations_of_counts_are_equally_frequent():
    sequences = counting.make_sequences(66_000, 10, 3)
    counts = F.one_hot(sequences, 3).sum(dim=1)  # (66000, 3)
    _, frequency = counts.unique(dim=0, return_counts=True)
    assert len(frequency) == 66
    assert 850 < frequency.min()
    assert frequency.max() < 1150


def test_all_sequences_are_all_sequences():
    expected = [list(digits) for digits in itertools.product(range(3), repeat=4)]
    assert sorted(counting.all_sequences(4, 3).tolist()) == expected
    assert counting.all_sequences(1, 3).tolist() == [[0], [1], [2]]


def test_of_too_many_sequences_there_is_a_sample():
    assert counting.all_sequences(10, 10).shape == (20_000, 10)


# options of counting.py, for sequences of up to 5 digits
SHORT = ["--sequence_length", 5, "--steps", 400]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A short training: its folder, its global variables and what it printed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("counting")
    values, output = run("counting.py", *SHORT, "--out_dir", folder)
    return folder, values, output


def test_a_short_training_counts_right_at_all_lengths(counted):
    _, values, output = counted
    assert values["scores"] == [1.0] * 5
    result = result_of(output)
    assert result["accuracy_all"] == 1
    assert result["params"] == 310


def test_the_accuracy_is_the_fraction_of_sequences_with_every_count_right(counted):
    _, values, _ = counted
    model = copy.deepcopy(values["model"])
    with torch.no_grad():
        model.out.bias[2] -= 1000  # it never answers 2, and counts all else right
    n_right = 0
    for digits in itertools.product(range(3), repeat=4):
        counts = [digits.count(digit) for digit in range(3)]
        n_right += 2 not in counts
    sequences = counting.all_sequences(4, 3)
    assert counting.accuracy(model, sequences, 3) == n_right / 81


def test_each_query_attends_to_its_own_digit(counted):
    _, values, _ = counted
    weights = values["weights"][0]  # one query a row, one digit a column
    own = weights.diagonal()
    others = weights[~torch.eye(3, dtype=torch.bool)]
    assert 0.2 < own.min()
    assert own.max() < 0.7
    assert others.max() < 0.1


def test_the_vectors_of_the_counts_form_an_arc_whatever_the_other_digits_are(counted):
    _, values, _ = counted
    ones = counting.angles(values["model"], 1, 5)
    twos = counting.angles(values["model"], 2, 5)
    assert ones[0] < 0.1
    assert ones.diff().min() > 3
    assert (ones - twos).abs().max() < 5


def test_the_angles_are_those_of_the_normalized_vectors_of_the_query_for_0():
    model = wild(counting.CountingModel(3, 4, 6))
    with torch.no_grad():
        model.query += 2  # LayerNorm subtracts the mean again
    digits = torch.tensor([[2, 2, 2, 2], [0, 0, 2, 2]])
    x = F.one_hot(digits, 3).float()
    key = model.key(x)
    value = model.value(x)
    output, _ = attention(model.query, key, value, activation="sigmoid")
    vectors = (output + model.query)[:, 0]
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    cosine = F.cosine_similarity(vectors[0], vectors[1], dim=0)
    expected = torch.rad2deg(torch.acos(cosine))
    angle = counting.angles(model, 2, 4)[2]
    assert abs(angle - expected) < 0.1


def test_a_sequence_is_counted_with_the_saved_model(counted, capsys):
    folder, _, _ = counted
    _, output = run("counting.py", *SHORT, "--sequence", "2, 1 2", "--out_dir", folder)
    assert "sequence: 2 1 2  true counts: 0 1 2\nsigmoid: counts 0 1 2\n" in output
    assert "step 0" not in output
    loaded = f"loaded {folder / 'counting_sigmoid.pt'}, trained for 400 steps\n"
    assert capsys.readouterr().err == loaded


def test_a_sequence_may_contain_all_digits(counted):
    folder, _, _ = counted
    _, output = run("counting.py", *SHORT, "--sequence", "0 1 2", "--out_dir", folder)
    assert "sequence: 0 1 2  true counts: 1 1 1\nsigmoid: counts 1 1 1\n" in output


def test_a_sequence_may_have_the_maximum_length(counted):
    folder, _, _ = counted
    _, output = run("counting.py", *SHORT, "--sequence", "2 2 2 2 2", "--out_dir", folder)
    assert "sequence: 2 2 2 2 2  true counts: 0 0 5\nsigmoid: counts 0 0 5\n" in output


def test_softmax_has_weights_of_its_own_and_is_trained_first(counted):
    folder, _, _ = counted
    saved = (folder / "counting_sigmoid.pt").read_bytes()
    options = ["--sequence_length", 5, "--steps", 2, "--activation", "softmax"]
    _, output = run("counting.py", *options, "--sequence", 0, "--out_dir", folder)
    assert "step 0/2: loss" in output
    assert (folder / "counting_softmax.pt").exists()
    assert (folder / "counting_sigmoid.pt").read_bytes() == saved


@pytest.mark.parametrize("option", ["--vocab_size 4", "--hidden 8", "--sequence_length 6"])
def test_weights_of_other_options_are_named_and_kept(counted, option):
    folder, _, _ = counted
    path = folder / "counting_sigmoid.pt"
    saved = path.read_bytes()
    trained = "--vocab_size 3 --sequence_length 5 --hidden 16"
    options = [*SHORT, "--sequence", "2", *option.split(), "--out_dir", folder]
    with pytest.raises(SystemExit, match=f"{path} was trained with {trained}"):
        run("counting.py", *options)
    assert path.read_bytes() == saved


DAMAGES = {
    "empty": lambda x: b"",
    "the first part": lambda x: x[:1000],
    "without the end": lambda x: x[:-1000],
    "something before it": lambda x: b"<html>" + x,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_weights_give_one_sentence_and_are_kept(counted, damage, tmp_path):
    folder, _, _ = counted
    path = tmp_path / "counting_sigmoid.pt"
    intact = (folder / "counting_sigmoid.pt").read_bytes()
    damaged = damage(intact)
    path.write_bytes(damaged)
    with pytest.raises(SystemExit, match=f"cannot load {path} .*: delete it and train again"):
        run("counting.py", *SHORT, "--sequence", "0", "--out_dir", tmp_path)
    assert path.read_bytes() == damaged


def test_one_length_trains_on_sequences_of_that_length_only(monkeypatch):
    lengths = []
    make_sequences = counting.make_sequences

    def recorded(n, T, *rest):
        lengths.append(T)
        return make_sequences(n, T, *rest)

    monkeypatch.setattr(counting, "make_sequences", recorded)
    sizes = {"vocab_size": 3, "sequence_length": 4, "hidden": 4}
    args = argparse.Namespace(**sizes, device="cpu", lr=0.01, steps=40, batch_size=2)
    counting.train(args, "sigmoid", all_lengths=False)
    assert lengths == [4] * 80
    lengths.clear()
    counting.train(args, "sigmoid", all_lengths=True)
    assert lengths[::2] == [4] * 40
    assert set(lengths[1::2]) == {1, 2, 3, 4}


def optimizer_steps(monkeypatch):
    """
    Train for 100 steps.

    Returns the model, the groups of parameters that Adam gets and the learning rate of each step.
    """
    groups = []
    rates = []

    class Adam(torch.optim.Adam):
        def step(self, *arguments):
            groups[:] = self.param_groups
            rates.append(self.param_groups[0]["lr"])
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    sizes = {"vocab_size": 3, "sequence_length": 4, "hidden": 4}
    args = argparse.Namespace(**sizes, device="cpu", lr=0.03, steps=100, batch_size=2)
    model = counting.train(args, "sigmoid")
    return model, groups, rates


def test_the_learning_rate_rises_and_falls_and_is_half_its_peak_on_average(monkeypatch):
    _, _, rates = optimizer_steps(monkeypatch)
    peak = rates.index(max(rates))
    rise = rates[:peak + 1]
    fall = rates[peak:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert max(rates) == pytest.approx(0.03, rel=0.01)
    assert rates[-1] < 1e-5
    # so 1,000 steps add up to 15
    assert sum(rates) / 100 == pytest.approx(0.015, rel=0.03)


def test_only_the_key_layer_has_weight_decay(monkeypatch):
    model, groups, _ = optimizer_steps(monkeypatch)
    decay = {}
    for group in groups:
        for p in group["params"]:
            decay[id(p)] = group["weight_decay"]
    expected = {}
    for name, p in model.named_parameters():
        expected[id(p)] = 1e-3 if name.startswith("key.") else 0
    assert decay == expected


def test_the_heatmap_is_labelled_with_the_models_counts_and_marked_where_a_row_should_be_bright(
    monkeypatch,
):
    calls = []

    def plot_attention(*arguments, **options):
        calls.append((arguments, options))

    monkeypatch.setattr(counting, "plot_attention", plot_attention)
    model = counting.CountingModel(3, 4, 8)
    with torch.no_grad():
        model.out.bias[3] = 1000  # it always answers 3
    counting.show_counts([model], ["title"], [1, 1, 2], 3, "path")
    arguments, options = calls[0]
    weights = arguments[0]
    x_labels = arguments[1]
    y_labels = arguments[2]
    assert weights.shape == (1, 3, 3)
    assert x_labels == [1, 1, 2]
    assert y_labels == [["0: 3 (true 0)", "1: 3 (true 2)", "2: 3 (true 1)"]]
    assert options["marks"].int().tolist() == [[[0, 0, 0], [1, 1, 0], [0, 0, 1]]]


def compared(monkeypatch, tmp_path):
    """
    Run `compare` with models that are not trained.

    Returns what it returns, all models and those that it shows.
    """
    fake = {
        ("sigmoid", False): 0.1,
        ("sigmoid", True): 0.2,
        ("softmax", False): 0.3,
        ("softmax", True): 0.4,
    }
    models = []
    shown = []

    def train(args, *how):
        model = counting.CountingModel(3, 4, 8)
        model.how = how
        model.seed = torch.initial_seed()
        models.append(model)
        return model

    def accuracy(model, digits, V):
        return fake[model.how] + digits.size(1)

    def show_counts(models, titles, *rest):
        shown.extend(zip(models, titles))

    monkeypatch.setattr(counting, "train", train)
    monkeypatch.setattr(counting, "accuracy", accuracy)
    monkeypatch.setattr(counting, "show_counts", show_counts)
    out_dir = str(tmp_path)
    args = argparse.Namespace(vocab_size=3, sequence_length=4, seed=7, out_dir=out_dir)
    accuracies = counting.compare(args, [0, 1, 2])
    return accuracies, models, shown


def test_compare_returns_the_accuracies_of_models_trained_at_all_lengths(monkeypatch, tmp_path):
    accuracies, _, _ = compared(monkeypatch, tmp_path)
    assert accuracies == pytest.approx((4.2, 4.4))


def test_compare_trains_three_seeds_and_shows_the_first(monkeypatch, tmp_path):
    _, models, shown = compared(monkeypatch, tmp_path)
    assert [model.seed for model in models] == [7, 8, 9] * 4
    assert [(model.seed, *model.how, title) for model, title in shown] == [
        (7, "sigmoid", False, "sigmoid, trained at length 4"),
        (7, "sigmoid", True, "sigmoid, trained at lengths 1-4"),
        (7, "softmax", False, "softmax, trained at length 4"),
        (7, "softmax", True, "softmax, trained at lengths 1-4"),
    ]


def test_compare_prints_a_row_for_each_training_and_saves_a_figure_only(tmp_path):
    options = ["--sequence_length", 3, "--steps", 2, "--compare"]
    _, output = run("counting.py", *options, "--out_dir", tmp_path)
    training = r"(sigmoid|softmax) +(lengths? \S+)"
    numbers = r"(?: [01]\.\d{3}){3} \| \d of 3 seeds"
    rows = re.findall(rf"^{training} \|{numbers}$", output, re.M)
    assert rows == [
        ("sigmoid", "length 3"),
        ("sigmoid", "lengths 1-3"),
        ("softmax", "length 3"),
        ("softmax", "lengths 1-3"),
    ]
    assert set(result_of(output)) == {"accuracy_all", "accuracy_all_softmax", "seconds"}
    assert os.listdir(tmp_path) == ["counting_compare.png"]


# --------------------------------------------------------------------------------------------------
# translate.py: the model


def transformer(vocab_size=20, max_len=12, n_layers=2):
    """An untrained Transformer of width 8 with two heads and large random weights."""
    model = translate.TransformerModel(vocab_size, max_len, 8, 2, n_layers, n_layers, dropout=0.0)
    return wild(model).eval()


def copy_weights(ours, theirs):
    """Give our block the weights of one of torch's layers."""
    renamed = {"self_attn": "self_attention", "multihead_attn": "cross_attention",
               "out_proj": "w_o", "linear1": "feed_forward.0", "linear2": "feed_forward.2"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "in_proj_" in name:  # queries, keys and values are one matrix in torch
            for layer, rows in zip(("w_q.", "w_k.", "w_v."), tensor.chunk(3)):
                weights[name.replace("in_proj_", layer)] = rows
        else:
            weights[name] = tensor
    ours.load_state_dict(weights)  # an error if one is missing or left over


def test_the_encoder_block_equals_torch():
    theirs = wild(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))
    ours = translate.EncoderBlock(8, 2, 0.0)
    copy_weights(ours, theirs)
    x = torch.randn(3, 5, 8)
    real = torch.arange(5) < torch.tensor([[5], [2], [4]])
    expected = theirs(x, src_key_padding_mask=~real)
    assert torch.allclose(ours(x, real[:, None, None, :])[real], expected[real], atol=1e-5)


def test_the_decoder_block_equals_torch():
    theirs = wild(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True))
    ours = translate.DecoderBlock(8, 2, 0.0)
    copy_weights(ours, theirs)
    x = torch.randn(3, 5, 8)
    memory = torch.randn(3, 7, 8)
    causal = torch.ones(5, 5).tril().bool()
    real = torch.arange(7) < torch.tensor([[7], [2], [4]])
    expected = theirs(x, memory, tgt_mask=~causal, memory_key_padding_mask=~real)
    output, weights = ours(x, causal, memory, real[:, None, None, :])
    assert torch.allclose(output, expected, atol=1e-5)
    assert weights.shape == (3, 2, 5, 7)


def test_the_blocks_use_dropout_on_every_sublayer():
    block = translate.DecoderBlock(8, 2, dropout=1.0).train()
    x = torch.randn(1, 3, 8)
    memory = torch.randn(1, 4, 8)
    output, _ = block(x, None, memory, None)
    expected = block.norm3(block.norm2(block.norm1(x)))  # all sublayers are dropped
    assert torch.allclose(output, expected)
    block = translate.EncoderBlock(8, 2, dropout=1.0).train()
    assert torch.allclose(block(x, None), block.norm2(block.norm1(x)))


def test_the_logits_start_with_standard_deviation_1():
    model = translate.TransformerModel(500, 12, 64, 4, 2, 2).eval()
    src = torch.randint(3, 500, (8, 12))
    tgt = torch.randint(3, 500, (8, 10))
    logits, weights = model(src, tgt)
    assert logits.shape == (8, 10, 500)
    assert weights.shape == (8, 4, 10, 12)
    assert logits.std().item() == pytest.approx(1, abs=0.15)
    own = logits.gather(2, tgt.unsqueeze(-1))  # the input token's own logit is larger
    assert own.mean() > 2


def test_word_dropout_zeroes_whole_tokens_at_half_the_rate():
    model = translate.TransformerModel(20, 12, 8, 2, 1, 1, dropout=0.8).train()
    dropped = model.token_dropout(torch.ones(500, 4, 8))
    assert (dropped == dropped[..., :1]).all()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)


def test_no_token_sees_a_later_one():
    model = transformer()
    src = torch.randint(3, 20, (4, 7))
    tgt = torch.randint(3, 20, (4, 6))
    changed = tgt.clone()
    changed[:, 3:] = (tgt[:, 3:] - 2) % 17 + 3
    before, _ = model(src, tgt)
    after, _ = model(src, changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_padding_gets_no_attention_and_changes_nothing():
    model = transformer()
    src = torch.randint(3, 20, (2, 7))
    tgt = torch.randint(3, 20, (2, 6))
    src[0, 4:] = translate.PAD
    tgt[0, 3:] = translate.PAD
    logits, weights = model(src, tgt)
    alone, _ = model(src[:1, :4], tgt[:1, :3])
    assert torch.allclose(logits[:1, :3], alone, atol=1e-4)
    assert (weights[0, :, :, 4:] == 0).all()
    assert (weights[0, :, :, :4] > 0).any()


def test_decoding_with_the_cache_token_by_token_equals_decoding_at_once():
    model = transformer()
    src = torch.randint(3, 20, (3, 7))
    tgt = torch.randint(3, 20, (3, 6))
    src[1, 5:] = translate.PAD
    memory, src_mask = model.encode(src)
    expected, _ = model.decode(tgt, memory, src_mask)
    cache = {}
    logits = []
    for part in tgt.split([1, 1, 3, 1], dim=1):  # one token or several at a time
        logits.append(model.decode(part, memory, src_mask, cache)[0])
    assert torch.allclose(torch.cat(logits, dim=1), expected, atol=1e-5)
    shapes = {tuple(key.shape) for key, _ in cache.values()}
    assert shapes == {(3, 2, 6, 4), (3, 2, 7, 4)}  # T = 6 and S = 7


def test_cross_attention_computes_its_keys_only_once():
    model = transformer(n_layers=1)
    memory, src_mask = model.encode(torch.randint(3, 20, (1, 5)))
    calls = []
    model.decoder[0].cross_attention.w_k.register_forward_hook(lambda *_: calls.append(1))
    cache = {}
    for token in (1, 5, 6):
        model.decode(torch.tensor([[token]]), memory, src_mask, cache)
    assert len(calls) == 1


# --------------------------------------------------------------------------------------------------
# translate.py: the toy language

BY_HAND = """\
1 Morgen kann ein Fuchs eine junge Königin hören. | Tomorrow a fox can hear a young queen.
2 Der König repariert den Regenschirm. | The king repairs the umbrella.
3 Morgen kann die Maus einen müden König finden. | Tomorrow the mouse can find a tired king.
4 Der kluge Lehrer hat gestern ein großes Radio gefunden. | \
The clever teacher found a big radio yesterday.
5 Ein Mädchen fotografiert die Lampe. | A girl photographs the lamp.
7 Den klugen Lehrer hat der König gestern besucht. | \
The king visited the clever teacher yesterday.
9 Gestern hat das kluge Kind den Hund geweckt. | Yesterday the clever child woke the dog.
11 Eine Katze kann heute den Vogel wecken. | A cat can wake the bird today.
13 Einen klugen Mann hat das müde Kind gestern besucht. | \
The tired child visited a clever man yesterday.
16 Den jungen Fuchs jagt die Katze. | The cat chases the young fox.
17 Heute kann ein Bäcker den kleinen Regenschirm malen. | \
Today a baker can paint the small umbrella.
19 Die freundliche Frau hat gestern die neue Uhr getragen. | \
The friendly woman carried the new clock yesterday."""


def test_these_lines_were_checked_by_hand():
    for line in BY_HAND.splitlines():
        n, german, english = re.fullmatch(r"(\d+) (.+) \| (.+)", line).groups()
        assert translate.toy_pair(int(n))[:2] == (german, english)


@pytest.fixture(scope="module")
def toy():
    """Many lines of the toy language."""
    return [translate.toy_pair(n) for n in range(1, 30_000)]


def test_every_german_sentence_has_one_translation(toy):
    translations = {}
    for german, english, _ in toy:
        assert translations.setdefault(german, english) == english


def test_der_and_den_alone_decide_who_does_what(toy):
    translations = {german: english for german, english, _ in toy}
    n_compared = 0
    for german, english in translations.items():
        match = re.fullmatch(r"Den (\w+) (\w+) der (\w+)\.", german)
        exchanged = match and translations.get("Der {} {} den {}.".format(*match.groups()))
        if exchanged:
            the, a, verb, _, b = english.rstrip(".").split()
            assert exchanged == f"{the} {b} {verb} the {a}."
            n_compared += 1
    assert n_compared > 10


def test_the_alignment_is_that_of_a_dictionary(toy):
    meaning = {"gestern": "yesterday", "heute": "today", "morgen": "tomorrow", "kann": "can"}
    for nouns in translate.NOUNS.values():
        meaning.update({german: english for german, _, english in nouns})
    for verb in translate.VERBS:
        meaning[verb[1]] = verb[3]  # infinitive
        if verb[0] != verb[2]:      # "besucht" is the finite form and the participle
            meaning[verb[0]] = verb[4]
    for german, english, alignment in toy[:5000]:
        german = german.removesuffix(".").split() + ["."]
        english = english.removesuffix(".").split() + ["."]
        assert len(alignment) == len(english)
        every_index = sorted(itertools.chain(*alignment))
        assert every_index == list(range(len(german)))  # every German word exactly once
        for word, indices in zip(english, alignment):
            source = german[indices[-1]]
            expected = meaning.get(source, meaning.get(source.lower(), word.lower()))
            assert word.lower() == expected


def test_no_held_out_toy_sentence_occurs_in_training_and_line_7_is_held_out():
    parts = {}
    for part in ("train", "val", "test"):
        parts[part] = {german for german, _, _ in translate.toy_lines(part, 5000)}
        assert len(parts[part]) > 100
    assert translate.toy_pair(7)[0] in parts["test"]
    assert not parts["train"] & (parts["val"] | parts["test"])
    assert not parts["val"] & parts["test"]


# --------------------------------------------------------------------------------------------------
# translate.py: everyday sentences, captions and text files


@pytest.mark.parametrize("text", [
    "Ein  Hund   läuft durch den Schnee.", " Ein Hund läuft durch den Schnee.\r\n",
    "Ein Hund la\u0308uft durch den Schnee.", "Ein\u00a0Hund\tläuft durch den Schnee."])
def test_white_space_and_composed_characters_make_no_difference(text):
    assert translate.normalize(text) == "Ein Hund läuft durch den Schnee."


@pytest.mark.parametrize("careless", ["für das mädchen an der straße, öfter",
                                      "FÜR DAS MÄDCHEN AN DER STRASSE, ÖFTER",
                                      "Fuer das Maedchen an der Strasse, oefter"])
def test_careless_typing_gives_the_same_source_tokens(careless):
    tokenizer = translate.Tokenizer([])
    expected = translate.encode_source(tokenizer, "Für das Mädchen an der Straße, öfter")
    assert translate.encode_source(tokenizer, careless) == expected


def test_multi30k_is_read_from_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("data/multi30k")
    sums = {}
    for language, text in (("de", "Ein  Hund.\nZwei Äpfel.\n"), ("en", "A dog.\nTwo apples.\n")):
        data = gzip.compress(text.encode("utf-8"))
        (tmp_path / f"data/multi30k/val.{language}.gz").write_bytes(data)
        sums[f"val.{language}.gz"] = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(translate, "MULTI30K_SHA256", sums)
    expected = [("Ein Hund.", "A dog."), ("Zwei Äpfel.", "Two apples.")]
    assert translate.load_pairs("multi30k", "val") == expected


def test_everyday_sentences_are_read_from_their_zip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("data/tatoeba")
    with zipfile.ZipFile("data/tatoeba/deu-eng.zip", "w") as archive:
        archive.writestr("deu.txt", "Hi.\tHallo!\nRun!\tLauf!\n")
    data = (tmp_path / "data/tatoeba/deu-eng.zip").read_bytes()
    monkeypatch.setattr(translate, "TATOEBA_SHA256", hashlib.sha256(data).hexdigest())
    assert translate.read_file("tatoeba") == [("Hallo!", "Hi."), ("Lauf!", "Run!")]


def test_each_part_gets_its_fraction_of_the_sentences():
    parts = collections.Counter(translate.part_of(f"Satz {n}") for n in range(32_000))
    assert parts["test"] == pytest.approx(1000, abs=150)
    assert parts["val"] == pytest.approx(1000, abs=150)


def test_held_out_pairs_have_neither_sentence_in_training_and_count_once():
    # every German sentence has two spellings and two translations, every English one three sources
    pairs = []
    for n in range(3000):
        for german in (f"Deutsch {n}", f"deutsch {n}!"):
            pairs += [(german, f"English {n // 3}"), (german, f"english, {n // 3}?")]
    train = translate.split_pairs(pairs, "train")
    test = translate.split_pairs(pairs, "test")
    val = translate.split_pairs(pairs, "val")
    plain = {re.sub(r"\W", "", text.lower()) for pair in train for text in pair}
    for german, english in test + val:
        assert re.sub(r"\W", "", german.lower()) not in plain
        assert re.sub(r"\W", "", english.lower()) not in plain
        assert not english.startswith("english")  # the first translation
    assert len({german for german, _ in test}) == len(test)
    assert not set(test) & set(val)
    assert set(train) == {pair for pair in pairs if translate.part_of(pair[0]) == "train"}


@pytest.mark.parametrize("content, message", [
    (b"A dog.\tEin Hund.\nno tab\n", "line 2: expected English, a tab"),
    (b"", "line 1"), (b"\xff", "cannot read .*utf-8"), (b"A dog.\tEin Hund.\n", "part is empty")])
def test_a_bad_text_file_gives_one_clear_sentence(content, message, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        translate.load_pairs(path, "val")
        translate.load_pairs(path, "test")


def test_a_byte_order_mark_and_more_columns_are_ignored(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffA dog.\tEin Hund.\tCC-BY\r\nTwo.\tZwei.\tCC-BY\r\n".encode())
    assert translate.read_file(path) == [("Ein Hund.", "A dog."), ("Zwei.", "Two.")]


def test_long_pairs_are_left_out_and_counted(capsys):
    tokenizer = translate.Tokenizer([])
    limit = "x" * (translate.MAX_LEN - 1)
    pairs = [("kurz", "short"), (limit, limit), (limit + "x", "short"), ("kurz", limit + "x")]
    assert translate.drop_long(tokenizer, pairs, "test") == pairs[:2]
    assert "test part: 2 pairs of 100 tokens or more are left out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="every pair of the val part"):
        translate.drop_long(tokenizer, pairs[2:], "val")


# --------------------------------------------------------------------------------------------------
# translate.py: tokens, batches, loss, learning rate


@pytest.mark.parametrize("n_merges", [0, 5, 500])
def test_encoding_loses_nothing(n_merges):
    texts = ["Der Hund läuft durch den Schnee.", "  two  spaces\n\ttab ", "", "日本語 🙂",
             "aaaa a aa", "\x00\r\n"]
    tokenizer = translate.Tokenizer(translate.learn_merges(texts * 2, n_merges))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_is_not_unicode_is_replaced():
    tokenizer = translate.Tokenizer([])
    assert tokenizer.decode([translate.EOS, 258, translate.PAD]) == "\ufffd"  # byte 255
    assert tokenizer.decode(tokenizer.encode("\ud800")) == "?"                # half a pair


def test_the_three_merges_of_the_comment():
    merges = translate.learn_merges(["hund", "hunde", "hunger", "hand", "bund"], 3)
    pieces = translate.Tokenizer(merges).pieces
    assert pieces[-3:] == [b"nd", b"hu", b"hund"]


def test_incremental_merges_are_those_of_counting_all_pairs_again():
    texts = [" ".join(translate.toy_pair(n)[:2]) for n in range(1, 60)]
    words = []
    for text in texts:
        for word in translate.WORD.findall(text):
            words.append([3 + byte for byte in word.encode()])
    expected = []
    for n in range(80):
        counts = collections.Counter()
        for word in words:
            counts.update(zip(word, word[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(pair)
        words = [translate.merge(word, pair, translate.FIRST_BYTE + 256 + n) for word in words]
    assert translate.learn_merges(texts, 80) == expected


def test_merging_stops_when_no_pair_occurs_twice():
    assert len(translate.learn_merges(["abc", "abd"], 50)) == 1


def test_an_epoch_has_every_sentence_once_and_little_padding():
    rng = random.Random(0)
    examples = []
    for _ in range(3000):
        n = rng.randint(5, 30)
        examples.append(([5] * n, [5] * (n + rng.randint(0, 3))))
    batches = translate.make_batches(examples, 1000, seed=0)
    seen = []
    while len(seen) < 3000:
        batch = next(batches)
        lengths = [len(examples[i][0]) + len(examples[i][1]) for i in batch]
        assert max(lengths) * len(batch) <= 1000
        assert sum(lengths) > 0.5 * max(lengths) * len(batch)
        seen += batch
    assert sorted(seen) == list(range(3000))


def test_every_epoch_and_every_seed_has_other_batches():
    examples = [([5] * (n % 20 + 1), [5] * (n % 20 + 1)) for n in range(100)]
    batches = translate.make_batches(examples, 10_000, seed=0)  # one batch is one epoch
    first, second = next(batches), next(batches)
    assert sorted(first) == sorted(second) and first != second
    assert next(translate.make_batches(examples, 10_000, seed=5)) != first


def test_label_smoothing_is_the_formula_and_padding_has_no_loss():
    model = transformer()
    examples = [([5, 6, 2], [1, 7, 8, 9, 2]), ([5, 2], [1, 4, 2])]
    for smoothing in (0.1, 0.0):
        expected = 0.0
        for src, tgt in examples:
            logits, _ = model(torch.tensor([src]), torch.tensor([tgt[:-1]]))
            log_probs = logits[0].log_softmax(dim=-1)
            one_hot = F.one_hot(torch.tensor(tgt[1:]), 20)
            targets = (1 - smoothing) * one_hot + smoothing / 20
            expected -= (targets * log_probs).sum().item()
        loss = translate.batch_loss(model, examples, "cpu", smoothing)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
    val_loss = translate.validation_loss(model, examples, "cpu")
    assert val_loss == pytest.approx(expected / 6, rel=1e-4)  # 6 targets


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_zero():
    rates = [translate.learning_rate(step, 10_000, 0.5) for step in range(10_000)]
    assert rates[0] == pytest.approx(0.5 / 1000)
    assert rates[499] == pytest.approx(0.25)
    assert rates[999] == rates[1000] == 0.5
    assert rates[1000 + 9000 // 3] == pytest.approx(0.5 * 0.75)  # (1 + cos 60°) / 2
    assert rates[1000 + 9000 // 2] == pytest.approx(0.25)
    assert 0 < rates[-1] < 1e-6
    assert translate.learning_rate(0, 1, 0.5) == 0.5


# --------------------------------------------------------------------------------------------------
# translate.py: decoding and BLEU


def plain_beam_search(model, src, beam, length_penalty):
    """Beam search for one sentence with lists and without a cache."""
    hypotheses = [([translate.BOS], 0.0, 0.0)]  # tokens, score, score / length ** length_penalty
    while True:
        extended = []
        for tokens, score, ranking in hypotheses:
            if tokens[-1] == translate.EOS:
                extended.append((tokens, score, ranking))
                continue
            logits, _ = model(src, torch.tensor([tokens]))
            log_probs = logits[0, -1].log_softmax(dim=-1).tolist()
            for t in range(1, len(log_probs)):  # all but PAD
                s = score + log_probs[t]
                extended.append((tokens + [t], s, s / len(tokens) ** length_penalty))
        extended.sort(key=lambda hypothesis: -hypothesis[2])
        hypotheses = extended[:beam]
        lengths = {len(tokens) for tokens, _, _ in hypotheses if tokens[-1] != translate.EOS}
        if not lengths or max(lengths) == model.max_len:
            return hypotheses[0][0][1:]


@torch.no_grad()
@pytest.mark.parametrize("beam, length_penalty", [(1, 1.0), (2, 1.0), (5, 1.0), (3, 0.0)])
def test_beam_search_equals_a_plain_one_without_cache_and_batches(beam, length_penalty):
    model = transformer(12, 8, n_layers=1)
    src = torch.randint(3, 12, (12, 6))
    src[::2, 3:] = translate.PAD
    results = translate.beam_search(model, src, beam, length_penalty).tolist()
    for row, tokens in zip(src, results):
        expected = plain_beam_search(model, row[row != 0][None], beam, length_penalty)
        assert tokens == expected + [translate.PAD] * (len(tokens) - len(expected))


def test_greedy_decoding_is_beam_search_with_one_hypothesis():
    model = transformer(12, 8, n_layers=1)
    src = torch.randint(3, 12, (40, 6))
    tokens = translate.greedy(model, src)
    assert torch.equal(tokens, translate.beam_search(model, src, beam=1))
    assert (tokens == translate.EOS).any() and (tokens[:, -1] > translate.EOS).any()


def test_a_larger_beam_finds_more_probable_translations():
    model = transformer(12, 8, n_layers=1)
    src = torch.randint(3, 12, (30, 6))
    scores = []
    for beam in (1, 5):
        tokens = translate.beam_search(model, src, beam, length_penalty=0.0)
        examples = []
        for source, row in zip(src.tolist(), tokens.tolist()):
            examples.append((source, [translate.BOS] + [t for t in row if t != translate.PAD]))
        scores.append(-translate.batch_loss(model, examples, "cpu").item())
    assert scores[1] > scores[0]


def test_translate_keeps_the_order_and_an_empty_line_stays_empty():
    tokenizer = translate.Tokenizer([])
    model = translate.TransformerModel(len(tokenizer.pieces), 30, 8, 2, 1, 1).eval()
    sentences = ["x" * (7 * n % 23) for n in range(70)]
    together = translate.translate(model, tokenizer, sentences, beam=1)
    assert together[0] == ""
    assert all(together[1:20])
    for n in (3, 4, 5):
        assert translate.translate(model, tokenizer, [sentences[n]], beam=1) == [together[n]]


def test_a_text_that_is_too_long_is_named():
    tokenizer = translate.Tokenizer([])
    model = translate.TransformerModel(len(tokenizer.pieces), 30, 8, 2, 1, 1).eval()
    translate.translate(model, tokenizer, ["x" * 29], beam=1)
    with pytest.raises(SystemExit, match="at most 29 tokens, this one has 30: xxx"):
        translate.translate(model, tokenizer, ["x" * 30], beam=1)


HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]


@pytest.mark.parametrize("translations, references, expected", [
    (HYPOTHESES, REFERENCES, 45.067506),
    (REFERENCES, HYPOTHESES, 45.067506),
    (REFERENCES, REFERENCES, 100.0),
    (["A man's $5.50 bag."], ["A man's $ 5.50 bag, e.g. red."], 29.256375),
    (["x y z"], ["x y z"], 0.0),
    (["the cat sat on the mat today"], ["a cat is on the mat now"], 26.269099),
    (["x y z w"], ["a b c d"], 0.0),
    (["x b c d e"], ["a b q d e"], 23.643540),
    ([""], ["a b"], 0.0),
    (["&quot;Hi&quot; it's 3-4, 1,000 <skipped>bags (e.g. blue/green)"],
     ['"Hi" it is 3-4, 1,000 bags (e.g. blue/green)!'], 76.438381)])
def test_bleu_has_the_values_that_sacrebleu_prints(translations, references, expected):
    assert translate.bleu(translations, references) == pytest.approx(expected, abs=0.005)


# --------------------------------------------------------------------------------------------------
# translate.py: looking inside


@pytest.fixture(scope="module")
def toy_model():
    """The shipped model of the toy language, its tokenizer, and lines that it has not seen."""
    model, tokenizer = translate.load_model("toy", "no_such_folder", "cpu")
    return model, tokenizer, translate.toy_lines("test", 3000)


def test_the_alignment_accuracy_is_that_of_a_plain_loop(toy_model):
    model, tokenizer, lines = toy_model
    n_words = hits = chance = diagonal = 0
    for german, english, alignment in lines[:30]:
        src = torch.tensor([translate.encode_source(tokenizer, german)])
        tgt = torch.tensor([[translate.BOS] + tokenizer.encode(english)])
        _, weights = model(src, tgt)
        n_source_words = src.size(1) - 1
        for t in range(len(alignment) - 1):  # without the full stop
            produces = weights[0, :, t, :n_source_words].argmax(dim=-1)  # of every head
            hits += torch.tensor([s in alignment[t] for s in produces.tolist()]).int()
            chance += len(alignment[t]) / n_source_words
            diagonal += t in alignment[t]
            n_words += 1
    accuracies = translate.alignment_accuracy(model, tokenizer, lines[:30])
    assert torch.allclose(accuracies[0][0, -1], hits / n_words)
    assert accuracies[1].item() == pytest.approx(chance / n_words)
    assert accuracies[2].item() == pytest.approx(diagonal / n_words)


def test_the_gradient_accuracy_is_that_of_finite_differences(toy_model):
    model, tokenizer, lines = toy_model
    model = copy.deepcopy(model).double()
    german, english, alignment = lines[0]
    src = torch.tensor([translate.encode_source(tokenizer, german)])
    tgt = torch.tensor([[translate.BOS] + tokenizer.encode(english)])
    embedded = model.embed(src)
    norms = torch.zeros(len(alignment) - 1, src.size(1) - 1)
    for s in range(norms.size(1)):
        for i in range(embedded.size(2)):
            values = []
            for change in (1e-5, -1e-5):
                x = embedded.clone()
                x[0, s, i] += change
                for block in model.encoder:
                    x = block(x, None)
                logits, _ = model.decode(tgt, x, None)
                values.append(logits.log_softmax(dim=-1)[0])
            for t in range(norms.size(0)):
                slope = (values[0] - values[1])[t, tgt[0, t + 1]] / 2e-5
                norms[t, s] += slope ** 2
    guess = norms.argmax(dim=-1).tolist()
    right = [guess[t] in alignment[t] for t in range(len(guess))]
    accuracy = translate.gradient_accuracy(model, tokenizer, lines[:1])
    assert accuracy.item() == pytest.approx(sum(right) / len(right))


def test_attention_and_gradient_find_the_source_word_more_often_than_the_diagonal(toy_model):
    model, tokenizer, lines = toy_model
    accuracy, chance, diagonal = translate.alignment_accuracy(model, tokenizer, lines)
    gradient = translate.gradient_accuracy(model, tokenizer, lines[:40])
    assert accuracy.max() > 0.9
    assert gradient > 0.85
    assert 0.85 > diagonal > chance


# --------------------------------------------------------------------------------------------------
# translate.py: the script

TINY = ("--d_model 16 --n_heads 2 --n_enc_layers 1 --n_dec_layers 1 --merges 50 --lr 0.01 "
        "--batch_tokens 300 --beam 1").split()


@pytest.fixture
def pairs_file(tmp_path):
    """A small text file of sentence pairs."""
    path = tmp_path / "pairs.tsv"
    lines = ["{1}\t{0}\n".format(*translate.toy_pair(n)) for n in range(1, 300)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def weights_of(folder, name="translate_pairs.tsv.pt"):
    """The saved weights of a training."""
    return torch.load(folder / name, map_location="cpu", weights_only=True)["weights"]


def test_the_script_learns_and_its_weights_translate(pairs_file, tmp_path, capsys):
    values, output = run("translate.py", *TINY, "--data", pairs_file, "--steps", 40,
                         "--out_dir", tmp_path)
    line = re.search(r"step 0/40: loss ([\d.]+), uniform prediction ln \d+ = ([\d.]+)", output)
    first, uniform = float(line[1]), float(line[2])
    assert abs(first - uniform) < 1
    assert values["loss"] < first - 1.5
    assert "step 40/40: loss" in output
    assert set(result_of(output)) == {"exact", "bleu", "params", "seconds"}
    _, output = run("translate.py", "--data", pairs_file, "--line", 2, "--plot",
                    "--out_dir", tmp_path)
    assert output.startswith("source:      Der König repariert den Regenschirm.\n"
                             "reference:   The king repairs the umbrella.\ntranslation: ")
    assert "held out:    no" in output
    assert (tmp_path / "translate_pairs.tsv.png").exists()
    assert not list(tmp_path.glob("*checkpoint*"))
    _, output = run("translate.py", "--data", pairs_file, "--test", "--out_dir", tmp_path)
    assert set(result_of(output)) == {"exact", "bleu", "params", "seconds"}
    errors = capsys.readouterr().err
    assert f"weights from {tmp_path / 'translate_pairs.tsv.pt'}, trained for 40 steps" in errors


def test_a_killed_training_is_resumed_bit_for_bit_and_never_overwritten(pairs_file, tmp_path):
    options = [*TINY, "--dropout", "0.1", "--data", str(pairs_file), "--steps", "10"]
    run("translate.py", *options, "--out_dir", tmp_path / "whole")
    killed = ["--out_dir", str(tmp_path / "killed")]
    command = [sys.executable, os.path.join(HERE, "translate.py"), *options, *killed]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert any(line.startswith("step 5/10:") for line in process.stdout)
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
    options = [*TINY, "--dropout", "0", "--data", str(pairs_file), "--steps", "3"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port}
    folder = ["--out_dir", str(tmp_path / "two")]
    command = [sys.executable, os.path.join(HERE, "translate.py"), *options, *folder]
    other = subprocess.Popen([*command, "--device", "cpu"],
                             env={**os.environ, **group, "RANK": "1", "OMP_NUM_THREADS": "1"})
    try:
        one, _ = run("translate.py", *options, "--out_dir", tmp_path / "one")
        for name, value in {**group, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        two, _ = run("translate.py", *options, *folder)
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
    # before clipping: a wrong factor in front of the loss would show here
    assert two["grad_norm"].item() == pytest.approx(one["grad_norm"].item(), rel=1e-3)
    weights, weights_of_two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in weights:
        if not name.endswith("w_k.bias"):  # changes no softmax, so its gradient is only rounding
            assert torch.allclose(weights[name].float(), weights_of_two[name].float(), atol=2e-3)


def test_a_rank_in_the_environment_changes_nothing(pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run("translate.py", *TINY, "--data", pairs_file, "--steps", 1, "--out_dir", tmp_path)
    assert (tmp_path / "translate_pairs.tsv.pt").exists()


def stdin_of(content):
    """Standard input that holds these bytes."""
    return io.TextIOWrapper(io.BytesIO(content))


def test_lines_of_standard_input_are_translated_in_order(tmp_path, monkeypatch):
    content = "\ufeffEin Hund rennt.\r\n\r\nZwei  Männer spielen Fußball.".encode()
    monkeypatch.setattr(sys, "stdin", stdin_of(content))
    _, output = run("translate.py", "--text", "-", "--out_dir", tmp_path)
    assert re.fullmatch(r"A dog .*\n\nTwo men .*\n", output)


def test_standard_input_that_is_not_utf8_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin_of("Hallo!\nMädchen\n".encode("latin-1")))
    with pytest.raises(SystemExit, match="line 2 of standard input is not UTF-8"):
        run("translate.py", "--text", "-", "--out_dir", tmp_path)


def test_at_a_terminal_every_line_is_answered_at_once(monkeypatch, tmp_path, capsys):
    answered = []

    class Terminal:
        """Two typed lines; notes what had been printed when each was read."""

        def isatty(self):
            return True

        @property
        def buffer(self):
            for line in (b"Der Mann sieht den Hund.\n", b"Der Hund jagt die Maus.\n"):
                answered.append(capsys.readouterr().out.count("\n"))
                yield line

    monkeypatch.setattr(sys, "stdin", Terminal())
    args = argparse.Namespace(data="toy", out_dir=str(tmp_path), device="cpu", text=["-"],
                              beam=1, plot=False)
    translate.translate_texts(args)
    assert answered == [0, 1]


def test_the_shipped_weights_translate_captions(tmp_path):
    _, output = run("translate.py", "--out_dir", tmp_path,
                    "--text", "Zwei Männer spielen Fußball.", "Ein Hund läuft durch den Schnee.")
    assert re.fullmatch(r"Two men .*play.* soccer\.\nA dog .*run.* through the snow\.\n", output)


def test_the_shipped_weights_translate_line_7_of_the_toy_language(tmp_path):
    _, output = run("translate.py", "--test", "--line=7", "--plot", "--out_dir", tmp_path)
    assert "translation: The king visited the clever teacher yesterday.\n" in output
    assert "held out:    yes" in output
    assert (tmp_path / "translate_toy.png").exists()


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
def short_saliency_training(tmp_path_factory):
    """The globals, the output and the folder of a training of three steps."""
    folder = tmp_path_factory.mktemp("saliency")
    values, output = run("saliency.py", "--steps", 3, "--batch_size", 8, "--n_images", 20,
                         "--out_dir", folder)
    return values, output, folder


def test_the_saved_weights_are_those_of_the_training(short_saliency_training):
    values, _, folder = short_saliency_training
    loaded = saliency.load_model(folder / "saliency.pt").state_dict()
    assert all(torch.equal(value, loaded[name])
               for name, value in values["model"].state_dict().items())


def test_a_training_draws_three_figures(short_saliency_training):
    _, _, folder = short_saliency_training
    figures = ["saliency_adversarial.png", "saliency_mean.png", "saliency_samples.png"]
    assert sorted(path.name for path in folder.glob("*.png")) == figures


def test_loading_the_weights_prints_and_draws_what_training_did(short_saliency_training, tmp_path):
    _, trained, folder = short_saliency_training
    _, loaded = run("saliency.py", "--load", folder / "saliency.pt", "--n_images", 20,
                    "--out_dir", tmp_path)
    assert loaded.startswith("20 new images")
    assert loaded[:loaded.index("saved")] in trained
    for path in folder.glob("*.png"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_loss_of_step_0_is_nearly_that_of_a_uniform_prediction(short_saliency_training):
    _, output, _ = short_saliency_training
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


# --------------------------------------------------------------------------------------------------
# All scripts, and the README

SCRIPTS = ["attention.py", "parity.py", "counting.py", "translate.py", "saliency.py"]
NO_DEVICE = "mps" if torch.cuda.is_available() else "cuda"
LIKELY_MISTAKES = [
    ("parity.py", "--d_model 0", "argument --d_model: invalid positive int value: '0'"),
    ("parity.py", "--lr nan", "argument --lr: invalid positive float value: 'nan'"),
    ("parity.py", "--steps -5", "argument --steps: invalid positive int value: '-5'"),
    ("parity.py", f"--device {NO_DEVICE}", "no such device on this machine"),
    ("parity.py", "--n_samples 1", "--n_samples"),
    ("counting.py", "--sequence=", "--sequence: expected 1 to 10 digits from 0 to 2"),
    ("counting.py", "--sequence=0,1,3", "--sequence: expected 1 to 10 digits from 0 to 2"),
    ("counting.py", f"--sequence={'0,' * 11}", "--sequence: expected 1 to 10 digits from 0 to 2"),
    ("translate.py", "--line 0", "--line 0: toy has lines 1 to 209773"),
    ("translate.py", "--line 209774", "--line 209774: toy has lines 1 to 209773"),
    ("translate.py", "--n_heads 3", "--n_heads 3 does not divide --d_model 64"),
    ("translate.py", "--plot", "--plot needs --line or --text"),
    ("translate.py", "--resume", "there is nothing to resume"),
    ("translate.py", "--data missing.tsv", "cannot read missing.tsv: [Errno 2]"),
    ("translate.py", "--data missing.tsv --test", "no weights for missing.tsv: train them with"),
    ("translate.py", f"--text {'x' * 300}", "a text can have at most 99 tokens, this one has"),
    ("saliency.py", "--eps=-0.1", "argument --eps: invalid positive float value: '-0.1'"),
    ("saliency.py", "--image photo.jpg", "--image needs --weights"),
    ("saliency.py", "--load missing.pt", "missing.pt"),
]


@pytest.mark.parametrize("script, options, message", LIKELY_MISTAKES)
def test_a_likely_mistake_gives_one_clear_sentence_and_leaves_no_file(
        script, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--out_dir", tmp_path, *options.split())
    assert message in capsys.readouterr().err + str(stop.value.code)
    # argparse exits with status 2; sys.exit("...") prints the text and exits with status 1
    assert stop.value.code == 2 or isinstance(stop.value.code, str)
    assert not list(tmp_path.iterdir())


class Code:
    """What a pickle can contain: a function call, executed when the file is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("script, option, name", [
    ("counting.py", "--sequence=0", "counting_sigmoid.pt"),
    ("translate.py", "--line=7", "translate_toy.pt"),
    ("saliency.py", "--load=saliency.pt", "saliency.pt")])
def test_weights_that_contain_code_are_refused_and_not_executed(
        script, option, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Code(), name)
    with pytest.raises(SystemExit, match=name):
        run(script, option, "--out_dir", tmp_path)
    assert not os.path.exists("executed")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_torch_matplotlib_the_standard_library_and_five_shared_names(script):
    modules = set()
    shared = set()
    for node in ast.walk(ast.parse(read(script))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
            if node.module == "attention":
                shared |= {alias.name for alias in node.names}
    assert modules - set(sys.stdlib_module_names) <= {"torch", "matplotlib", "attention"}
    assert shared <= {"attention", "plot_attention", "parse_args", "positive", "download"}


@pytest.fixture(scope="module")
def help_texts():
    """What every script prints with --help."""
    texts = {}
    for script in SCRIPTS:
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setenv("COLUMNS", "200")
            patch.setattr(sys, "argv", [script, "--help"])
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(os.path.join(HERE, script), run_name="__main__")
        texts[script] = output.getvalue()
    return texts


def test_every_command_in_the_readme_uses_options_that_exist(help_texts):
    commands = re.findall(r"(?:python|torchrun --nproc_per_node \d+) (\w+\.py)([^`\n|]*)",
                          read("README.md"))
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, options in commands:
        for option in re.findall(r"--\w+", options):
            assert re.search(rf"{option}\b", help_texts[script]), (script, option)


def test_every_file_that_the_readme_links_to_exists_and_every_figure_is_shown():
    readme = read("README.md")
    for path in re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme):
        assert os.path.exists(os.path.join(HERE, path)), path
    figures = {name for name in os.listdir(os.path.join(HERE, "assets")) if name.endswith(".png")}
    assert figures == set(re.findall(r"assets/(\w+\.png)", readme))


def test_every_function_that_the_readme_names_for_the_exercise_sheets_exists():
    section = read("README.md").split("## The exercise sheets")[1].split("## Exercises")[0]
    names = re.findall(r"`(\w+)`", section)
    source = "".join(read(script) for script in SCRIPTS)
    assert len(names) > 10
    for name in names:
        assert re.search(rf"(def|class) {name}\b|\b{name} = ", source), name


def test_the_worked_example_in_the_readme_is_what_attention_prints(tmp_path):
    _, output = run("attention.py", "--steps", 1, "--out_dir", tmp_path)
    assert output[:output.index("step 0")] in read("README.md")


def test_the_five_line_attention_of_the_readme_is_that_of_attention_py():
    code = re.search(r"```python\n(.*?)```", read("README.md"), re.S)[1]
    names = {"math": math}
    exec(code, names)
    q, k, v = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 2)
    for ours, theirs in zip(names["attention"](q, k, v), attention(q, k, v)):
        assert torch.allclose(ours, theirs, atol=1e-6)
