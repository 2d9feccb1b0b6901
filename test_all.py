"""Is all of it true? Every claim of the scripts, in their order: `pytest test_all.py` reads like a list of them."""

import argparse
import hashlib
import http.server
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

matplotlib.use("Agg")  # no window, whatever the machine

import attention as attention_script  # noqa: E402
import counting  # noqa: E402
import parity  # noqa: E402
from attention import attention, download, load, number, plot_attention, progress, save  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = {"attention": attention_script, "parity": parity, "counting": counting}


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def same_start():
    """No test depends on another: each starts with the same random numbers and all threads."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


def result_of(script, arguments, capsys):
    """Run main(arguments) of a script and read the last line it prints: a dict of strings."""
    script.main(arguments)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("result: ")
    return dict(pair.split("=") for pair in last.split()[1:])


def is_png(path):
    with open(path, "rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


# ----------------------------------------------------------------------------------------------------------------------
# attention.py


def test_the_worked_example_is_what_the_docstring_shows():
    shown = attention_script.worked_example()
    assert textwrap.indent(shown, "    ") in attention_script.__doc__


def test_the_worked_example_is_right_by_hand():
    query, key, value = [[2, 0, 2, 0], [0, 0, 0, 0], [0, 4, 0, 2]], [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]], \
        [[10, 0], [0, 10], [5, 5]]
    for q, shown in zip(query, attention_script.worked_example().splitlines()[-3:]):
        exponentials = [math.exp(sum(a * b for a, b in zip(q, k)) / math.sqrt(4)) for k in key]
        output = [sum(e * v[i] for e, v in zip(exponentials, value)) / sum(exponentials) for i in range(2)]
        assert shown == "  ".join(f"{x:.2f}" for x in output)


MASKS = {"none": None,
         "causal": torch.ones(5, 7).tril().bool(),
         "one row": torch.tensor([True, False, True, True, False, True, True]),
         "padding": (torch.arange(7) < torch.tensor([7, 4])[:, None])[:, None, None, :],        # (B, 1, 1, T_k)
         "random": torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6,
         "an empty query": torch.ones(5, 7).tril(-1).bool()}                                    # query 0 sees nothing


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_attention_equals_torch(mask):
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    output, weights = attention(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.expand(2, 3, 5, 7))
    assert weights.shape == (2, 3, 5, 7)
    assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (4, 2, 3)], ids=str)
def test_the_fused_path_gives_the_same_output_and_gradients(lead, mask):
    if mask is not None and mask.ndim > 2 and len(lead) < 2:
        mask = mask[0, 0, :1]
    q, k, v = torch.randn(*lead, 5, 8), torch.randn(*lead, 7, 8), torch.randn(*lead, 7, 8)
    results = []
    for need_weights in (True, False):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        output, weights = attention(*inputs, mask, need_weights=need_weights)
        assert (weights is None) == (not need_weights)
        output.square().sum().backward()
        results.append([output, *(t.grad for t in inputs)])
    for explicit, fused in zip(*results):
        assert torch.allclose(explicit, fused, atol=1e-5)


def test_leading_dimensions_broadcast():
    q, k, v = torch.randn(5, 8), torch.randn(4, 1, 7, 8), torch.randn(3, 7, 6)
    for need_weights in (True, False):
        output, _ = attention(q, k, v, need_weights=need_weights)
        assert output.shape == (4, 3, 5, 6)
        assert torch.allclose(output[2, 1], attention(q, k[2, 0], v[1])[0], atol=1e-6)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("activation, need_weights", [("softmax", True), ("softmax", False), ("sigmoid", True)])
def test_a_query_with_nothing_to_attend_to_gets_zeros_and_finite_gradients(activation, need_weights):
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    with torch.autograd.detect_anomaly(check_nan=True):   # not even an intermediate gradient is NaN
        output, weights = attention(q, k, v, mask, activation, need_weights)
        output.sum().backward()
    assert (output[..., 2, :] == 0).all() and (output[..., 1, :] != 0).any()
    assert weights is None or (weights[..., 2, :] == 0).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_softmax_rows_sum_to_one_and_sigmoid_keys_do_not_compete():
    q, k, v = torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 8)
    assert torch.allclose(attention(q, k, v)[1].sum(-1), torch.ones(5))
    weights = attention(q, k, v, activation="sigmoid")[1]
    assert torch.equal(weights, torch.sigmoid(q @ k.T / math.sqrt(8)))
    assert torch.equal(weights[:, :3], attention(q, k[:3], v[:3], activation="sigmoid")[1])
    assert not torch.allclose(attention(q, k, v)[1][:, :3], attention(q, k[:3], v[:3])[1])


def test_the_mask_means_the_opposite_in_nn_multihead_attention():
    module = nn.MultiheadAttention(8, 1, bias=False)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(8))
    x, may_attend = torch.randn(5, 8), torch.ones(5, 5).tril().bool()
    assert torch.allclose(attention(x, x, x, may_attend)[0], module(x, x, x, attn_mask=~may_attend)[0], atol=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_gradient_is_right_by_finite_differences(activation):
    q, k, v = (torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True) for T in (4, 5, 5))
    mask = torch.ones(4, 5).tril(-1).bool()
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask, activation), (q, k, v))


@pytest.mark.parametrize("shapes", [((5, 8), (7, 4), (7, 8)), ((5, 8), (7, 8), (6, 8)), ((8,), (7, 8), (7, 8)),
                                    ((2, 5, 8), (3, 7, 8), (3, 7, 8)), ((5, 0), (7, 0), (7, 8))])
def test_wrong_shapes_are_shown(shapes):
    with pytest.raises(ValueError) as error:
        attention(*map(torch.zeros, shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize("mask", [torch.ones(5, 7), torch.ones(7, 5).bool(), torch.ones(2, 5, 7).bool()])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_mask_that_does_not_fit_is_refused(mask, need_weights):
    with pytest.raises(ValueError, match="mask"):
        attention(torch.zeros(5, 8), torch.zeros(7, 8), torch.zeros(7, 8), mask, need_weights=need_weights)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="tanh"):
        attention(torch.zeros(5, 8), torch.zeros(7, 8), torch.zeros(7, 8), activation="tanh")


@pytest.mark.parametrize("lead", [(), (4,), (1, 4), (1, 2, 2)], ids=str)
def test_the_fused_kernel_removes_the_quadratic_memory_for_any_number_of_dimensions(lead):
    def kept(T, need_weights):
        q, k, v = (torch.randn(*lead, T, 16, requires_grad=True) for _ in range(3))
        return attention_script.memory_of_attention(q, k, v, need_weights)
    assert kept(256, True) > 3.5 * kept(128, True)      # quadruples with every doubling of T
    assert kept(256, False) <= 2.1 * kept(128, False)   # doubles


def test_the_dictionary_is_learned_and_drawn(tmp_path, capsys):
    result = result_of(attention_script, ["--out_dir", str(tmp_path), "--device", "cpu", "--steps", "250"], capsys)
    assert float(result["accuracy"]) > 0.99 and int(result["params"]) == 2 * 32 * 32 and float(result["seconds"]) > 0
    assert is_png(tmp_path / "attention_dictionary.png")


def test_plot_attention_takes_one_or_many_heads_and_any_label(tmp_path):
    tokens = [f"tok{i}" for i in range(28)] + ["$x$", "_ü"]
    plot_attention(torch.rand(30, 30), tokens, tokens, tmp_path / "one.png")
    plot_attention(torch.rand(5, 4, 3), list("abc"), list("defg"), tmp_path / "five.png", titles=list("12345"))
    assert is_png(tmp_path / "one.png") and is_png(tmp_path / "five.png")


# ----------------------------------------------------------------------------------------------------------------------
# attention.py: the helpers


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "weights.pt"
    save(path, lambda temporary: torch.save([1], temporary))

    def half(temporary):
        with open(temporary, "w") as file:
            file.write("half a fi")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        save(path, half)
    assert torch.load(path, weights_only=True) == [1] and os.listdir(tmp_path) == ["weights.pt"]


@pytest.mark.parametrize("kind, text", [(int, "0"), (int, "11"), (int, "1.5"), (int, "ten"), (int, ""),
                                        (int, "9" * 5000), (float, "nan"), (float, "inf"), (float, "-1"),
                                        (float, "1e400")])
def test_numbers_out_of_range_are_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 10"):
        number(kind, 1, 10)(text)


@pytest.fixture
def server():
    """A web server on 127.0.0.1: /file is whole, /cut ends too early, anything else is missing."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/file", "/cut") else 404)
            self.send_header("Content-Length", "7" if self.path == "/file" else "9")
            self.end_headers()
            self.wfile.write(b"content" if self.path in ("/file", "/cut") else b"not found")

        def log_message(self, *arguments):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


CONTENT_SHA256 = hashlib.sha256(b"content").hexdigest()


def test_a_download_is_checked_and_kept(server, tmp_path):
    path = tmp_path / "data" / "deep" / "file"
    assert download(f"{server}/file", path, CONTENT_SHA256) == b"content"
    assert path.read_bytes() == b"content" and os.listdir(path.parent) == ["file"]
    assert download("http://127.0.0.1:1/never asked", path, CONTENT_SHA256) == b"content"      # from the disk now


@pytest.mark.parametrize("page, sha256", [("/file", "0" * 64), ("/cut", CONTENT_SHA256), ("/no", CONTENT_SHA256)])
def test_a_bad_download_is_one_line_and_leaves_nothing(server, page, sha256, tmp_path, capsys):
    path = tmp_path / "data" / "file"
    with pytest.raises(SystemExit) as stop:
        download(server + page, path, sha256)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and server in error
    assert not path.exists() and not list(tmp_path.glob("data/*"))


def test_without_a_network_the_line_says_where_to_put_the_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        download("https://127.0.0.1:1/file", tmp_path / "file", CONTENT_SHA256)      # nobody listens there
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(tmp_path / "file") in error


def test_a_file_on_the_disk_that_differs_is_named(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(SystemExit) as stop:
        download("https://127.0.0.1:1/file", tmp_path / "file", CONTENT_SHA256)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(tmp_path / "file") in error


class Code:
    """What a pickle can hide: a call that is made while it is being read."""
    def __reduce__(self):
        return print, ("the pickle ran its code",)


def test_load_takes_weights_and_nothing_else(tmp_path, capsys):
    weights = {"sizes": (1, 2), "weights": {"w": torch.randn(3)}}
    torch.save(weights, tmp_path / "good")
    assert torch.equal(load(tmp_path / "good")["weights"]["w"], weights["weights"]["w"])
    torch.save(Code(), tmp_path / "code")
    whole = (tmp_path / "good").read_bytes()
    for name, content in (("empty", b""), ("cut", whole[:len(whole) // 2]), ("text", b"hello"), ("zeros", bytes(99))):
        (tmp_path / name).write_bytes(content)
    for name in ("code", "empty", "cut", "text", "zeros", "missing", "."):
        with pytest.raises(SystemExit) as stop:
            load(tmp_path / name)
        shown = capsys.readouterr()
        assert stop.value.code == 2 and shown.err.count("\n") == 1 and str(tmp_path / name) in shown.err
        assert not shown.out                                               # the code did not run


def test_progress_prints_the_last_step_and_not_every_one(capsys):
    report = progress(1000)
    for step in range(1, 1001):
        report(step, loss=1 / step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("step 1000/1000  loss 0.0010  ") and "s left" in lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# parity.py: the model


def test_the_exercise_shapes():
    x = torch.randn(4, 10, 16)
    assert parity.SelfAttention(16, 8)(x).shape == (4, 10, 16)
    assert parity.MultiHeadSelfAttention(16, 8, 3)(x).shape == (4, 10, 16)
    assert parity.TransformerBlock(16, 8, 3)(x).shape == (4, 10, 16)
    assert parity.TransformerClassifier(2, 5, 16, 8, 3)(torch.randint(2, (4, 10))).shape == (4, 5)


def test_the_exercise_names_and_order():
    model = parity.TransformerClassifier(2, 2)
    assert [name for name, _ in model.named_children()] == ["token_embedding", "transformer_model", "final_layer_norm",
                                                            "classifier"]
    block = model.transformer_model[0]
    assert [name for name, _ in block.named_children()] == ["ln1", "attn", "ln2", "mlp"]
    assert isinstance(block.mlp[1], nn.SiLU) and isinstance(model.classifier[1], nn.SiLU)
    assert len(block.attn.heads) == 4 and block.attn.heads[0].w_v.weight.shape == (256, 256)
    assert block.attn.w_o.weight.shape == (256, 4 * 256) and block.attn.heads[0].w_k.weight.shape == (64, 256)


@pytest.mark.parametrize("sizes, params", [((8, 8, 2, 4, 2), 2426), ((3, 1, 1, 1, 1), 100), ((2, 1, 1, 1, 1), 58),
                                           ((8, 1, 1, 1, 0), 122), ((5, 1, 1, 1, 0), 62)])
def test_parameter_counts(sizes, params):
    assert sum(p.numel() for p in parity.TransformerClassifier(2, 2, *sizes).parameters()) == params


def copy_heads(ours, theirs):
    """Give our MultiHeadSelfAttention the weights of an nn.MultiheadAttention.

    Torch's heads return d_model / n_heads numbers, ours d_model: fill up with zeros, and let w_o read only the first.
    """
    n_heads, d_model = len(ours.heads), ours.w_o.out_features
    d_head = d_model // n_heads
    with torch.no_grad():
        ours.w_o.weight.zero_()
        ours.w_o.bias.copy_(theirs.out_proj.bias)
        for h, head in enumerate(ours.heads):
            rows = slice(h * d_head, (h + 1) * d_head)
            for linear, weight, bias in zip((head.w_q, head.w_k, head.w_v), theirs.in_proj_weight.chunk(3),
                                            theirs.in_proj_bias.chunk(3)):
                linear.weight.zero_()[:d_head] = weight[rows]
                linear.bias.zero_()[:d_head] = bias[rows]
            ours.w_o.weight[:, h * d_model:h * d_model + d_head] = theirs.out_proj.weight[:, rows]


@pytest.mark.parametrize("n_heads", [1, 2])
def test_multi_head_attention_equals_torch(n_heads):
    theirs = nn.MultiheadAttention(8, n_heads, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = parity.MultiHeadSelfAttention(8, 8 // n_heads, n_heads)
    copy_heads(ours, theirs)
    x = torch.randn(4, 10, 8)
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)


@pytest.mark.parametrize("n_heads", [1, 2])
def test_the_block_equals_torch_encoder_layer(n_heads):
    theirs = nn.TransformerEncoderLayer(8, n_heads, 4 * 8, dropout=0.0, activation=F.silu, batch_first=True,
                                        norm_first=True)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours = parity.TransformerBlock(8, 8 // n_heads, n_heads)
    copy_heads(ours.attn, theirs.self_attn)
    for mine, other in ((ours.ln1, theirs.norm1), (ours.ln2, theirs.norm2), (ours.mlp[0], theirs.linear1),
                        (ours.mlp[2], theirs.linear2)):
        mine.load_state_dict(other.state_dict())
    x = torch.randn(4, 10, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_the_gradients_of_the_classifier_are_right_by_finite_differences():
    model = parity.TransformerClassifier(2, 2, 3, 2, 2, 1, 2).double()
    names, values = zip(*model.named_parameters())
    tokens = torch.randint(2, (2, 4))
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(model, dict(zip(names, values)), (tokens,)), values)


def wild_classifier(*sizes):
    """A classifier with large random weights in float64: it has opinions, though no right ones."""
    model = parity.TransformerClassifier(2, 2, *sizes).double()
    for p in model.parameters():
        nn.init.normal_(p, std=2.0)
    return model


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_the_order_of_the_bits_is_invisible(n_layers):
    model, strings = wild_classifier(8, 4, 2, 4, n_layers), torch.randint(2, (20, 10))
    shuffled = strings[:, torch.randperm(10)]
    assert not torch.equal(strings, shuffled)
    assert torch.allclose(model(strings), model(shuffled), atol=1e-8)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_no_member_of_the_family_computes_parity_for_all_lengths(n_layers):
    """A string and the string written twice have equal logits; the doubled one is even, so an odd one is lost."""
    model, strings = wild_classifier(8, 4, 2, 4, n_layers), torch.randint(2, (20, 9))
    doubled = torch.cat([strings, strings], dim=1)                       # (B, 2T)
    assert torch.allclose(model(strings), model(doubled), atol=1e-8)
    assert (doubled.sum(1) % 2 == 0).all() and (strings.sum(1) % 2 == 1).any()


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_a_width_of_one_cannot_work(n_layers):
    """A LayerNorm over one feature returns its bias whatever comes in: all strings get the same logits."""
    norm = nn.LayerNorm(1)
    nn.init.normal_(norm.bias)
    assert torch.equal(norm(torch.randn(50, 1)), norm.bias.expand(50, 1))
    model = wild_classifier(1, 1, 1, 1, n_layers)
    strings, parities, shares = parity.one_string_per_count(10)
    assert (model(strings) == model(strings)[0]).all()
    assert parity.exact_accuracy(model, 10)[0] == 0.5


def test_58_parameters_are_the_fewest_with_a_block_and_a_width_above_one():
    counts = {sizes: sum(p.numel() for p in parity.TransformerClassifier(2, 2, *sizes).parameters())
              for sizes in itertools.product((2, 3), (1, 2), (1, 2), (1, 2), (1, 2))}
    assert min(counts, key=counts.get) == (2, 1, 1, 1, 1) and min(counts.values()) == 58


# ----------------------------------------------------------------------------------------------------------------------
# parity.py: data and exact accuracy


def test_strings_and_parities():
    strings, parities = parity.make_strings(1000, 10)
    assert strings.shape == (1000, 10) and parities.tolist() == [sum(string) % 2 for string in strings.tolist()]
    assert set(strings.unique().tolist()) == {0, 1} and 0.45 < strings.float().mean() < 0.55


@pytest.mark.parametrize("seq_len", [1, 6, 10])
def test_the_computed_accuracy_equals_trying_all_strings(seq_len):
    strings = torch.cartesian_prod(*[torch.arange(2)] * seq_len).view(-1, seq_len)       # (2^T, T)
    seen = set()
    for _ in range(5):
        model = wild_classifier(8, 4, 1, 1, 1)
        tried = (model(strings).argmax(1) == strings.sum(1) % 2).double().mean().item()
        accuracy, correct = parity.exact_accuracy(model, seq_len)
        assert accuracy == pytest.approx(tried, abs=1e-6) and correct.shape == (seq_len + 1,)
        seen.add(accuracy)
    assert len(seen) > 1    # not all models got the same, so the test can fail


def test_parity_is_uncorrelated_with_every_polynomial_of_the_count_below_degree_T():
    """So there is nothing for a gradient to hold on to until the model zigzags: the plateau."""
    correlation = [sum((-1) ** c * math.comb(10, c) * c ** degree for c in range(11)) for degree in range(11)]
    assert correlation[:10] == [0] * 10 and correlation[10] != 0


def test_gradients_grow_many_times_over_when_the_plateau_ends():
    """Why Adam's usual beta2 = 0.999, a memory of 1,000 steps, throws the model past the exit."""
    strings, parities, shares = parity.one_string_per_count(6)
    model = parity.TransformerClassifier(2, 2, 8, 8, 2, 4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.006, betas=(0.9, 0.9))
    norms, loss = [], math.inf
    while loss > 0.5:                                                    # the plateau is at ln 2 = 0.69
        assert len(norms) < 300
        loss = (F.cross_entropy(model(strings), parities, reduction="none") * shares).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    assert max(norms[-20:]) > 10 * min(norms[:-20])


def test_one_string_per_count():
    strings, parities, shares = parity.one_string_per_count(10)
    assert strings.sum(1).tolist() == list(range(11)) and parities.tolist() == [0, 1] * 5 + [0]
    assert shares.sum() == 1 and shares[3] * 1024 == 120


# ----------------------------------------------------------------------------------------------------------------------
# parity.py: training and the sweep

SHORT = ["--seq_len", "5", "--n_samples", "250", "--device", "cpu", "--seed", "1"]


def test_a_short_training_reaches_every_string_and_repeats_itself(tmp_path, capsys, monkeypatch):
    results = [result_of(parity, [*SHORT, "--out_dir", str(tmp_path / "a")], capsys)]
    monkeypatch.setattr(parity, "plot_training", lambda *arguments: None)     # once is enough
    monkeypatch.setattr(parity, "plot_heads", lambda *arguments: None)
    results.append(result_of(parity, [*SHORT, "--out_dir", str(tmp_path / "b")], capsys))
    assert float(results[0]["accuracy_all"]) > 0.95 and float(results[0]["accuracy_val"]) > 0.95
    assert results[0]["params"] == "2426"
    assert results[1] == {**results[0], "seconds": results[1]["seconds"]}
    first, second = (torch.load(tmp_path / folder / "parity.pt", weights_only=True)["weights"] for folder in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)      # same seed, same numbers
    assert is_png(tmp_path / "a" / "parity_training.png") and is_png(tmp_path / "a" / "parity_heads.png")


def test_the_first_loss_is_near_ln_2(tmp_path, capsys):
    parity.main([*SHORT, "--steps", "1", "--out_dir", str(tmp_path)])
    loss = float(re.search(r"before the first step: loss ([\d.]+)", capsys.readouterr().out)[1])
    assert abs(loss - math.log(2)) < 0.1


def test_small_batches_and_no_block_also_run(tmp_path, capsys):
    result = result_of(parity, [*SHORT, "--steps", "3", "--batch_size", "16", "--n_layers", "0", "--out_dir",
                                str(tmp_path)], capsys)
    assert result["params"] == "122" and not os.path.exists(tmp_path / "parity_heads.png")


def test_a_loss_that_is_nan_stops_the_run_and_loses_nothing(tmp_path, capsys):
    (tmp_path / "parity.pt").write_bytes(b"what an earlier run saved")
    with pytest.raises(SystemExit) as stop:
        parity.main([*SHORT, "--lr", "1e30", "--out_dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "nan" in error and "--lr" in error
    assert (tmp_path / "parity.pt").read_bytes() == b"what an earlier run saved"


def test_models_trained_side_by_side_do_not_disturb_one_another():
    sizes = (3, 1, 1, 1, 1)
    together, weights = parity.train_many(sizes, [5, 6], 4, 30, "cpu")
    alone, alone_weights = parity.train_many(sizes, [6], 4, 30, "cpu")
    assert together[1] == alone[0]
    assert all(torch.allclose(weights[name][1], alone_weights[name][0], atol=1e-4) for name in weights)


def test_the_sweep_saves_a_winner_that_passes_the_check(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "LADDER", [((8, 4, 1, 1, 1), 4), ((1, 1, 1, 1, 1), 2), ((8, 1, 1, 1, 0), 2)])
    monkeypatch.setattr(parity, "SWEEP_STEPS", 200)
    result = result_of(parity, ["--sweep", "--seq_len", "2", "--device", "cpu", "--out_dir", str(tmp_path)], capsys)
    assert result["params"] == "514" and float(result["accuracy_all"]) == 1.0
    winner = torch.load(tmp_path / "parity_514.pt", weights_only=True)
    model = parity.TransformerClassifier(2, 2, *winner["sizes"])
    model.load_state_dict(winner["weights"])
    assert parity.exact_accuracy(model, 2)[0] == 1.0 and is_png(tmp_path / "parity_sweep.png")


def test_the_check_on_all_strings_is_strict():
    model = wild_classifier(8, 4, 1, 1, 1)
    sizes, weights = (8, 4, 1, 1, 1), {name: value.float() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    accuracy, margin = parity.check_on_all_strings(sizes, weights, 5)
    strings = [list(string) for string in itertools.product((0, 1), repeat=5)]
    logits = [model(torch.tensor([string]))[0].tolist() for string in strings]
    assert accuracy == sum((odd > even) == sum(s) % 2 for s, (even, odd) in zip(strings, logits)) / 32
    assert margin == pytest.approx(min(abs(odd - even) for even, odd in logits))


# ----------------------------------------------------------------------------------------------------------------------
# counting.py: the model


def test_the_counting_model_has_the_parts_that_the_exercise_draws():
    model = counting.CountingModel(3, 10, 16)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "query": (1, 3, 16), "key.weight": (16, 3), "key.bias": (16,), "value.weight": (16, 3), "value.bias": (16,),
        "norm.weight": (16,), "norm.bias": (16,), "out.weight": (11, 16), "out.bias": (11,)}
    assert isinstance(model.norm, nn.LayerNorm) and model.activation == "sigmoid"


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("length", [1, 4, 10])
def test_counting_shapes_for_every_length(activation, length):
    logits, weights = counting.CountingModel(3, 10, 8, activation)(torch.rand(5, length, 3))
    assert logits.shape == (5, 3, 11) and weights.shape == (5, 3, length)


def wild_counter(*sizes):
    """A counting model with large random weights in float64."""
    model = counting.CountingModel(*sizes).double()
    for p in model.parameters():
        nn.init.normal_(p, std=2.0)
    return model


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_counting_model_is_the_plain_formula(activation):
    model, digits = wild_counter(3, 6, 4, activation), [2, 0, 0, 1, 2]
    p = {name: value.detach() for name, value in model.named_parameters()}
    logits, weights = model(F.one_hot(torch.tensor([digits]), 3).double())
    for v in range(3):
        query = p["query"][0, v]
        scores = [query @ (p["key.weight"][:, d] + p["key.bias"]) / math.sqrt(4) for d in digits]
        row = [1 / (1 + math.exp(-score)) for score in scores]
        if activation == "softmax":
            row = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        x = query + sum(weight * (p["value.weight"][:, d] + p["value.bias"]) for weight, d in zip(row, digits))
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
        assert torch.allclose(weights[0, v], torch.tensor(row).double())
        assert torch.allclose(logits[0, v], p["out.weight"] @ x + p["out.bias"])


def test_softmax_cannot_count_over_lengths_and_sigmoid_can():
    """With any weights the logits of x and of x written twice are equal under softmax, though all counts double."""
    x, counts = counting.one_hot_and_counts(torch.randint(3, (20, 5)), 3)
    twice, doubled = torch.cat([x, x], dim=1), 2 * counts                # (B, 2T, V), (B, V)
    assert torch.equal(twice.sum(dim=1), doubled.float()) and (counts != doubled).any()
    for _ in range(5):
        model = wild_counter(3, 5, 8, "softmax")
        assert torch.allclose(model(x.double())[0], model(twice.double())[0], atol=1e-8)
    model = train_counter("sigmoid", sequence_length=10, steps=200, hidden=16)
    moved = (model(x)[0] - model(twice)[0]).abs().amax(dim=2)            # (B, V)
    assert moved[counts > 0].min() > 1


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_order_of_the_digits_makes_no_difference(activation):
    model, x = wild_counter(3, 6, 8, activation), F.one_hot(torch.randint(3, (20, 6)), 3).double()
    assert torch.allclose(model(x)[0], model(x.flip(1))[0], atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# counting.py: data and exact accuracy


def test_the_example_of_the_exercise():
    x, counts = counting.one_hot_and_counts(torch.tensor([[1, 0, 2, 1, 0, 1, 1, 0, 1, 2]]), 3)
    assert counts.tolist() == [[3, 5, 2]] and x.shape == (1, 10, 3) and x.argmax(-1)[0, :4].tolist() == [1, 0, 2, 1]


def test_the_counts_are_exact():
    digits = counting.make_sequences(500, 7, 4)
    _, counts = counting.one_hot_and_counts(digits, 4)
    assert counts.tolist() == [[sequence.count(digit) for digit in range(4)] for sequence in digits.tolist()]


def test_dirichlet_digits_make_all_combinations_of_counts_equally_frequent():
    """66 combinations; with uniform digits ten equal ones come once in 3^10 / 3 = 19,683."""
    for uniform, expected in ((False, 3 / 66), (True, 1 / 19_683)):
        _, counts = counting.one_hot_and_counts(counting.make_sequences(20_000, 10, 3, uniform), 3)
        share = (counts == 10).any(dim=1).double().mean().item()
        assert abs(share - expected) < 0.006
    _, counts = counting.one_hot_and_counts(counting.make_sequences(66_000, 10, 3), 3)
    frequency = (counts[:, 0] * 11 + counts[:, 1]).bincount()
    frequency = frequency[frequency > 0]
    assert len(frequency) == 66 and 850 < frequency.min() and frequency.max() < 1150


@pytest.mark.parametrize("vocab_size, length", [(3, 5), (2, 8), (4, 3), (1, 4)])
def test_the_computed_accuracy_equals_trying_all_sequences(vocab_size, length):
    model = counting.CountingModel(vocab_size, length, 8)
    model.load_state_dict(wild_counter(vocab_size, length, 8).state_dict())
    x, counts = counting.one_hot_and_counts(
        torch.tensor(list(itertools.product(range(vocab_size), repeat=length))), vocab_size)
    right = model(x)[0].argmax(dim=-1) == counts
    accuracy, by_count, tried = counting.evaluate(model, vocab_size, length)
    assert accuracy == pytest.approx(right.all(dim=1).double().mean().item()) and f"all {len(x):,} " in tried
    for c in range(length + 1):
        if (counts == c).any():
            assert by_count[c].item() == pytest.approx(right[counts == c].double().mean().item())


def test_too_many_sequences_are_sampled_and_the_output_says_so():
    accuracy, by_count, tried = counting.evaluate(counting.CountingModel(10, 10, 8), 10, 10, 300)
    assert tried == "300 random sequences of length 10" and 0 <= accuracy <= 1 and by_count.shape == (11,)


# ----------------------------------------------------------------------------------------------------------------------
# counting.py: training


def train_counter(activation, shorter=True, weight_decay=1e-3, **changed):
    """`counting.train` with seed 0 on a task that is learned in about a second."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args = argparse.Namespace(**{"vocab_size": 3, "sequence_length": 5, "hidden": 8, "lr": 0.03, "steps": 300,
                                 "batch_size": 128, "device": "cpu", **changed})
    return counting.train(args, activation, shorter=shorter, weight_decay=weight_decay, quiet=True)


def test_counting_is_learned_exactly_saved_and_used_again(tmp_path, capsys):
    common = ["--sequence_length", "5", "--steps", "400", "--device", "cpu", "--out_dir", str(tmp_path)]
    result = result_of(counting, common, capsys)
    assert float(result["accuracy_all"]) == 1 and int(result["params"]) == 48 + 64 + 64 + 32 + 17 * 6
    assert is_png(tmp_path / "counting_weights.png")
    saved = (tmp_path / "counting.pt").read_bytes()
    counting.main([*common, "--sequence", "2, 1 2"])
    shown = capsys.readouterr().out
    assert "sequence: 2 1 2   counts: 0 1 2   true counts: 0 1 2" in shown and "before the first step" not in shown
    assert "accuracy_all=1.0 " in shown and is_png(tmp_path / "counting_sequence.png")
    assert (tmp_path / "counting.pt").read_bytes() == saved


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_same_seed_counts_the_same(activation):
    first, second = (train_counter(activation, steps=20).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class CountingWithMLP(counting.CountingModel):
    """The model with a small MLP as its readout (exercise 5 in README)."""
    def __init__(self, vocab_size, sequence_length, hidden, activation):
        super().__init__(vocab_size, sequence_length, hidden, activation)
        self.out = nn.Sequential(nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, sequence_length + 1))


def test_at_a_single_length_softmax_fails_with_a_linear_readout_and_not_with_an_mlp(monkeypatch):
    scores = []
    for model in (counting.CountingModel, CountingWithMLP):
        monkeypatch.setattr(counting, "CountingModel", model)
        trained = train_counter("softmax", shorter=False, hidden=16)
        scores.append(counting.evaluate(trained, 3, 5)[0])
    assert scores[0] < 0.9 and scores[1] > 0.98


def test_only_several_lengths_teach_to_count_what_is_there():
    scores = {}
    for shorter in (False, True):
        model = train_counter("sigmoid", shorter)
        scores[shorter] = [counting.evaluate(model, 3, length)[0] for length in range(1, 6)]
    assert min(scores[True]) > 0.98 and scores[False][-1] > 0.98 and max(scores[False][:3]) < 0.8


def test_weight_decay_brings_back_a_query_whose_sigmoids_are_all_zero(monkeypatch):
    class Dead(counting.CountingModel):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            with torch.no_grad():                  # the bias is in every key: a score of about -30, whatever is seen
                self.query[0, 0] = -30 * math.sqrt(self.query.shape[2]) * self.key.bias / self.key.bias.square().sum()
                self.key.weight *= 0.1
    x = torch.eye(3).unsqueeze(0)                                        # (1, V, V)
    dead = Dead(3, 5, 8)
    gradient, = torch.autograd.grad(dead(x)[1][0, 0].sum(), dead.query)  # (1, V, hidden) through the weights alone
    assert gradient[0, 0].abs().max() < 1e-6
    monkeypatch.setattr(counting, "CountingModel", Dead)
    highest = {}
    for weight_decay in (0.0, 1e-3):
        model = train_counter("sigmoid", weight_decay=weight_decay, steps=400)
        highest[weight_decay] = model(x)[1][0, 0].max().item()
    assert highest[0.0] < 0.001 and highest[1e-3] > 0.1


def test_comparing_prints_and_draws(tmp_path, capsys):
    result = result_of(counting, ["--compare", "--sequence_length", "2", "--steps", "3", "--hidden", "2", "--device",
                                  "cpu", "--out_dir", str(tmp_path)], capsys)
    assert {"accuracy_all", "accuracy_all_softmax", "params", "seconds"} == set(result)
    assert is_png(tmp_path / "counting_compare.png") and is_png(tmp_path / "counting_both.png")


def test_the_smallest_task_there_is(tmp_path, capsys):
    result = result_of(counting, ["--vocab_size", "1", "--sequence_length", "1", "--hidden", "2", "--steps", "2",
                                  "--batch_size", "2", "--device", "cpu", "--out_dir", str(tmp_path)], capsys)
    assert 0 <= float(result["accuracy_all"]) <= 1


def test_wrong_sequences_and_checkpoints_are_one_line_and_lose_nothing(tmp_path, capsys):
    path = tmp_path / "counting.pt"
    sizes = (3, 10, 16, "sigmoid")
    good = {"sizes": sizes, "weights": counting.CountingModel(*sizes).state_dict()}
    other = {"sizes": (4, 10, 16, "sigmoid"), "weights": counting.CountingModel(4, 10, 16).state_dict()}
    lying = {"sizes": sizes, "weights": counting.CountingModel(3, 10, 8).state_dict()}
    for content, sequence, named in ((good, "0 1 3", "'3'"), (good, "", "not 0"), (good, "0 " * 11, "not 11"),
                                     (good, "0 one", "'one'"), (good, "0 -1", "'-1'"), (good, "1.0", "'1.0'"),
                                     (other, "0 1", "(4, 10, 16, 'sigmoid')"), (lying, "0 1", "damaged"),
                                     ({**good, "sizes": 7}, "0 1", "7"), ([], "0 1", "counting.py"),
                                     ({**good, "weights": 7}, "0 1", "damaged"), (torch.ones(3), "0 1", "counting.py"),
                                     ({"sizes": sizes}, "0 1", "counting.py"), (None, "0 1", "damaged")):
        if content is None:
            path.write_bytes(b"no file of weights")
        else:
            torch.save(content, path)
        before = path.read_bytes()
        with pytest.raises(SystemExit) as stop:
            counting.main(["--sequence", sequence, "--device", "cpu", "--out_dir", str(tmp_path)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and named in error, (sequence, error)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["counting.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# Every script: wrong uses end with one line and status 2

WRONG = [("attention", ["--n_keys", "1"]), ("attention", ["--noise", "nan"]), ("attention", ["--steps", "0"]),
         ("parity", ["--d_model", "0"]), ("parity", ["--d_model", "wide"]), ("parity", ["--d_key", "-3"]),
         ("parity", ["--n_heads", "0"]), ("parity", ["--mlp_factor", "0"]), ("parity", ["--n_layers", "-1"]),
         ("parity", ["--seq_len", "0"]), ("parity", ["--steps", "0"]), ("parity", ["--batch_size", "0"]),
         ("parity", ["--steps", "1.5"]), ("parity", ["--n_samples", "1000000000000"]), ("parity", ["--n_samples", "4"]),
         ("parity", ["--n_samples", "999999999"]), ("parity", ["--lr", "-1"]), ("parity", ["--lr", "nan"]),
         ("parity", ["--weight_decay", "-1"]), ("parity", ["--seed", "-1"]), ("parity", ["--seed", "x"]),
         ("parity", ["--sweep", "--seq_len", "17"]),
         ("counting", ["--vocab_size", "0"]), ("counting", ["--sequence_length", "0"]), ("counting", ["--hidden", "0"]),
         ("counting", ["--hidden", "1"]), ("counting", ["--lr", "nan"]), ("counting", ["--steps", "0"]),
         ("counting", ["--batch_size", "1"]), ("counting", ["--activation", "tanh"]),
         ("counting", ["--compare", "--sequence", "1"])]


@pytest.mark.parametrize("script, arguments", WRONG, ids=[" ".join([script, *words]) for script, words in WRONG])
def test_a_wrong_number_is_one_line(script, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main([*arguments, "--out_dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and arguments[-2] in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_options_devices_and_folders_are_one_line(script, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    missing = "mps" if torch.cuda.is_available() else "cuda"
    for arguments, named in ((["--colour", "red"], "--colour"), (["--device", "tpu"], "--device"),
                             (["--device", missing], "--device"), (["--seed"], "--seed"), (["surplus"], "surplus"),
                             (["--out_dir", str(tmp_path / "file" / "out")], "--out_dir")):
        with pytest.raises(SystemExit) as stop:
            SCRIPTS[script].main(["--out_dir", str(tmp_path), *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and named in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_like_the_chapter_and_shows_every_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and SCRIPTS[script].__doc__.splitlines()[0] in " ".join(shown.split())
    options = re.split(r"\n  -", shown)[2:]               # after the description and -h
    assert len(options) > 8 and all("(default: " in " ".join(option.split()) for option in options)


def test_ctrl_c_ends_with_one_line_and_status_130(tmp_path):
    processes = [subprocess.Popen([sys.executable, os.path.join(HERE, f"{script}.py"), "--steps", "100000", "--lr", "0",
                                   "--device", "cpu", "--out_dir", str(tmp_path)], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True, cwd=tmp_path) for script in SCRIPTS]
    for process in processes:
        while "before the first step" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and "Ctrl-C" in error and "Traceback" not in error
    assert not os.listdir(tmp_path)      # nothing half written


# ----------------------------------------------------------------------------------------------------------------------
# README.md


def test_every_command_option_and_file_that_readme_names_exists(capsys):
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        readme = file.read()
    for name in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert os.path.exists(os.path.join(HERE, name)), name
    commands = re.findall(r"python (\w+)\.py([^\n`&|#]*)", readme)
    assert commands
    for script, arguments in commands:
        with pytest.raises(SystemExit):
            SCRIPTS[script].main(["--help"])
        known = capsys.readouterr().out
        assert all(option in known for option in re.findall(r"--\w+", arguments)), (script, arguments)
