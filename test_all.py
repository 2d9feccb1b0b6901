"""Tests of what the scripts and the README claim, in the order of the scripts. Run with: pytest test_all.py"""

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


def test_the_same_seed_trains_the_same_model(tmp_path):
    options = ["--seq_len", 4, "--steps", 5, "--batch_size", 20, "--out_dir", tmp_path]
    first, _ = run("parity.py", *options)
    second, _ = run("parity.py", *options)
    for p, q in zip(first["model"].parameters(), second["model"].parameters()):
        assert torch.equal(p, q)


def test_the_validation_strings_are_not_trained_on(tmp_path, monkeypatch):
    """Seen by the first embedding: 8 of 10 strings in each step, the other 2 once, at the end."""
    batches = []
    embed = nn.Embedding.forward

    def _embed(self, tokens):
        batches.append(tokens)
        return embed(self, tokens)
    monkeypatch.setattr(nn.Embedding, "forward", _embed)
    values, _ = run("parity.py", "--n_samples", 10, "--steps", 1, "--out_dir", tmp_path)
    x = values["x"]
    assert any(torch.equal(tokens, x[:8]) for tokens in batches)
    assert any(torch.equal(tokens, x[8:]) for tokens in batches)
    assert {len(tokens) for tokens in batches} == {8, 2, 11}               # 11: one for each count


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
    assert (units.T @ residual).abs().max() < 1e-6                         # orthogonal to every unit
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


# ----------------------------------------------------------------------------------------------------------------------
# saliency.py
def small_network(dtype=torch.float32):
    """A small network with random weights whose BatchNorms are not the identity."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), saliency.BasicBlock(4, 8, 2),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)).to(dtype)
    for _ in range(5):
        model(torch.rand(8, 3, 8, 8, dtype=dtype))
    return model


def test_the_jacobian_equals_jacrev():
    model, x, target = small_network(torch.float64), torch.rand(3, 3, 8, 8).double(), torch.tensor([0, 5, 2])
    gradient, logits = saliency.calculate_jacobian(model, x, target)
    model.eval()
    assert torch.equal(logits, model(x))
    jacobian = torch.func.jacrev(lambda x: F.cross_entropy(model(x), target, reduction="none"))(x)   # (3, 3, 3, 8, 8)
    assert torch.allclose(gradient, jacobian[range(3), range(3)], atol=1e-12) and gradient.abs().max() > 1e-3


def test_the_jacobian_changes_neither_the_model_nor_the_images():
    model, x = small_network().train(), torch.rand(2, 3, 8, 8)
    before = model[1].running_mean.clone()
    gradient, logits = saliency.calculate_jacobian(model, x, torch.tensor([0, 1]))
    assert model.training and torch.equal(model[1].running_mean, before) and not x.requires_grad
    assert all(p.grad is None for p in model.parameters()) and not gradient.requires_grad and not logits.requires_grad


def test_a_confident_prediction_keeps_its_gradient():
    """With a margin of 30 the gradient is exp(-30) times the difference of two rows; float32 loses one of them."""
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)), torch.full((1, 3, 2, 2), 0.5)
    with torch.no_grad():
        model[1].weight[0] += 5 - (model[1].weight[0] - model[1].weight[1]).mean()         # 12 * 0.5 * 5 = 30
    difference = (model[1].weight[1] - model[1].weight[0]).detach()
    gradient, _ = saliency.calculate_jacobian(model, x, torch.tensor([0]))
    assert torch.allclose(gradient.flatten() * math.exp(30), difference, rtol=1e-2)


def test_saliency_is_the_norm_over_colors_rescaled():
    gradient = torch.randn(3, 3, 4, 5)
    gradient[1] *= 1e-30                                                 # the squares of these are 0 in float32
    gradient[2] = 7.0
    for g, s in zip(gradient[:2].double(), saliency.saliency_map(gradient)[:2].double()):
        norm = g.square().sum(dim=0).sqrt()
        assert torch.allclose(s, (norm - norm.min()) / (norm.max() - norm.min()), atol=1e-5)
    assert (saliency.saliency_map(gradient)[2] == 0).all()


@pytest.mark.parametrize("eps, steps", [(0.03, 1), (0.03, 4), (1.0, 1)])
def test_adversarial_examples_stay_within_eps_and_within_0_and_1(eps, steps):
    model, x, target = small_network(), torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2])
    x[0, :, :4], x[1, :, :4] = 1.0, 0.0
    attacks = saliency.all_attacks(model, x, target, eps, steps)
    del attacks["unscaled Jacobian"]
    for adversarial in attacks.values():
        assert 0 < (adversarial - x).abs().max() <= eps + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1


def test_one_step_is_the_sign_and_several_steps_increase_the_loss_further():
    model, x, target = small_network(), torch.rand(20, 3, 8, 8) * 0.5 + 0.25, torch.arange(20) % 6
    gradient, _ = saliency.calculate_jacobian(model, x, target)
    assert torch.allclose(saliency.adversarial_example(model, x, target, 0.1), x + 0.1 * gradient.sign(), atol=1e-6)
    changed = [x, *(saliency.adversarial_example(model, x, target, 0.1, steps) for steps in (1, 10))]
    losses = [F.cross_entropy(saliency.calculate_jacobian(model, x, target)[1], target).item() for x in changed]
    assert losses[0] < losses[1] < losses[2]


def test_resnet18_has_the_keys_shapes_and_sizes_of_torchvision():
    """The checksum is that of torchvision 0.28: a line `name shape` for each entry of resnet18().state_dict()."""
    model = saliency.resnet18()
    lines = [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items()]
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 and len(lines) == 122
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == \
        "84fb10d9c6905a1cbb020b284537dc97c4f4ec55fb2a780a41152a23a2dd0e9d"
    sizes = []
    for module in (model.conv1, model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4):
        module.register_forward_hook(lambda module, x, y: sizes.append(tuple(y.shape[1:])))
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 3, 224, 224)).shape == (1, 1000)
    assert sizes == [(64, 112, 112), (64, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A copy of saliency.py that evaluates fewer images."""
    (tmp_path / "saliency.py").write_text(read("saliency.py").replace("make_images(1000)", "make_images(120)"), "utf-8")
    monkeypatch.syspath_prepend(HERE)
    return tmp_path / "saliency.py"


def test_the_shipped_network_is_accurate_points_at_the_shape_and_is_fooled(script, tmp_path):
    path = os.path.join(HERE, "assets", "saliency.pt")
    assert os.path.getsize(path) <= 200_000
    values, output = run(script, "--load", path, "--out_dir", tmp_path / "out")
    result = result_of(output)
    assert result["accuracy"] >= 0.99 and result["pointing"] >= 0.95 > 0.8 > result["accuracy_attacked"]
    sign, scaled, unscaled, noise = values["rows"][2]                    # eps = 8/255
    assert sign < scaled < noise
    assert {name[9:-4] for name in os.listdir(tmp_path / "out")} == {"accuracy", "samples", "adversarial"}


def test_a_short_training_writes_weights_that_load(script, tmp_path):
    values, output = run(script, "--steps", 12, "--batch_size", 16, "--out_dir", tmp_path)
    model = saliency.small_resnet(5)
    saliency.load_weights(model, tmp_path / "saliency.pt")
    assert all(torch.equal(p, q.half().float()) for p, q in zip(model.parameters(), values["model"].parameters()))


@pytest.mark.parametrize("shape", [(300, 400, 3), (40, 30, 3), (300, 400), (300, 257, 4)])
def test_images_in_color_in_gray_and_with_alpha_are_read_as_224_by_224(shape, tmp_path):
    pixels = torch.rand(shape) * 0.2 + 0.4
    if shape[-1] == 4:
        pixels[..., 3] = 0.0                                             # fully transparent: white
    matplotlib.image.imsave(tmp_path / "image.png", pixels.numpy(), cmap="gray", vmin=0, vmax=1)
    image = saliency.read_image(tmp_path / "image.png")
    assert image.shape == (3, 224, 224) and (image[..., :3].mean() - (1.0 if shape[-1] == 4 else 0.5)).abs() < 0.1


def test_photographs_with_weights_from_a_file_and_names_in_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    with open("data/imagenet_classes.txt", "w", encoding="utf-8") as file:
        file.write("\n".join(f"name {n}" for n in range(1000)))
    torch.save(saliency.resnet18().state_dict(), "resnet18.pth")
    matplotlib.image.imsave("photo.png", torch.rand(260, 300, 3).numpy())
    _, output = run("saliency.py", "--weights", "resnet18.pth", "--image", "photo.png", "--out_dir", "out")
    assert "photo.png: name " in output and set(result_of(output)) >= {"accuracy_attacked", "params", "seconds"}
    assert sorted(os.listdir("out")) == ["saliency_photographs.png", "saliency_photographs_adversarial.png"]


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
