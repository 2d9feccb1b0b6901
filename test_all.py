"""
Tests of what the scripts and the README claim, in the order of the scripts.

$ pytest test_all.py
"""

import argparse
import collections
import contextlib
import hashlib
import inspect
import io
import itertools
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import zipfile

import matplotlib
import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import attention as attention_script
import counting
import parity
import saliency
import translate
from attention import attention, download, make_folder, number

matplotlib.use("Agg")  # no display needed
HERE = os.path.dirname(os.path.abspath(__file__))
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGPIPE") if hasattr(signal, name)]
HANDLERS = [signal.getsignal(name) for name in SIGNALS]  # of pytest; scripts set their own


@pytest.fixture(autouse=True)
def same_start(monkeypatch, tmp_path):
    """Every test starts in an empty folder with the same random numbers, and on one thread.

    Afterwards, Ctrl-C stops pytest in its own way again, and sockets wait as long as before.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    for signal_number, handler in zip(SIGNALS, HANDLERS):
        signal.signal(signal_number, handler)
    socket.setdefaulttimeout(None)


def run(script, *options):
    """Run a script in this process. Returns its global variables and what it printed."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr("sys.argv", [script, "--device", "cpu", *map(str, options)])
        try:
            values = runpy.run_path(os.path.join(HERE, script), run_name="__main__")
        except SystemExit as stop:  # the end of --test, --line, --sweep, ...
            if stop.code:
                raise
            values = {}
    return values, output.getvalue()


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws. They stay open."""
    drawn = []
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    return drawn


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def result_of(output):
    """The numbers of the result line, which is the last one."""
    last = output.splitlines()[-1]
    assert last.startswith("result: ")
    numbers = {key: float(value) for key, value in re.findall(r"(\w+)=(\S+)", last)}
    assert numbers.get("seconds", 0) < 600
    return numbers


def logged_steps(output):
    """The numbers of the steps that a training printed."""
    return [int(step) for step in re.findall(r"^step (\d+)/", output, flags=re.MULTILINE)]


def wild(module, std=0.5):
    """Give a module large random weights, also biases, so no mistake hides behind a zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


# --------------------------------------------------------------------------------------------------
# attention.py
ACTIVATIONS = {"softmax": nn.Softmax(dim=-1), "sigmoid": nn.Sigmoid()}
MASKS = {
    "causal": torch.ones(5, 7).tril().bool(),
    "padding": (torch.arange(7) < torch.tensor([[7], [4]])).view(2, 1, 1, 7),
    "a query with nothing to attend to": torch.ones(5, 7).tril(-1).bool(),
}
all_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def queries_keys_values():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    k = torch.randn(2, 3, 7, 8, requires_grad=True)
    v = torch.randn(2, 3, 7, 4, requires_grad=True)
    return q, k, v


def test_loops_and_matrices_give_the_same_output():
    q = torch.randn(4, 3)
    k = torch.randn(5, 3)
    v = torch.randn(5, 2)
    loops = attention_script.attention_loops(q.tolist(), k.tolist(), v.tolist())
    output, _ = attention(q, k, v)
    assert_close(torch.tensor(loops), output)


@all_masks
def test_output_and_gradients_match_torch(mask):
    inputs = queries_keys_values()
    output, _ = attention(*inputs, mask)
    expected = F.scaled_dot_product_attention(*inputs, mask)
    assert_close(output, expected)
    with torch.autograd.set_detect_anomaly(True):  # an error at the first NaN
        ours = torch.autograd.grad(output.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    assert_close(ours, theirs)


@all_masks
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_masked_keys_get_weight_0(mask, activation):
    q, k, v = queries_keys_values()
    _, weights = attention(q, k, v, mask, activation)
    assert torch.equal(weights > 0, mask.expand(2, 3, 5, 7))


def test_half_precision_does_not_overflow():
    # 64 * 40 * 40 = 102,400, the largest float16 is 65,504
    x = torch.full((2, 64), 40.0, dtype=torch.float16)
    _, weights = attention(x, x, x)
    assert (weights == 0.5).all()


def test_undivided_scores_of_wide_vectors_give_one_key_nearly_all_weight():
    q = torch.randn(10_000, 1, 64)
    k = torch.randn(10_000, 12, 64)
    for factor, largest in [(math.sqrt(64), 0.85), (1, 0.29)]:
        _, weights = attention(factor * q, k, k)
        assert weights.amax(dim=-1).mean().item() == pytest.approx(largest, abs=0.01)


def test_the_dictionary_learns_to_compare(tmp_path):
    seed = 2 ** 63 - 1  # the largest one
    values, output = run("attention.py", "--steps", 200, "--seed", seed, "--out_dir", tmp_path)
    assert torch.initial_seed() == seed
    result = result_of(output)
    assert result["accuracy"] > 0.999
    assert values["test_target"].shape == (1000, 12)
    assert result["params"] == 2 * 32 * 32
    model = values["model"]
    product = model.w_q.weight.T @ model.w_k.weight
    inverse = values["rotation"].T
    assert F.cosine_similarity(product.flatten(), inverse.flatten(), dim=0) > 0.8
    assert logged_steps(output) == [0, 100]
    assert os.listdir(tmp_path) == ["attention_dictionary.png"]


def test_output_is_flushed_and_escaped_and_ctrl_c_ends_a_script_quietly(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(file, encoding="cp1252", newline="\n"))
    monkeypatch.setattr("sys.argv", ["script"])
    attention_script.parse_args(argparse.ArgumentParser(description="What it does"))
    print("ä \u2192")
    assert file.getvalue() == b"\xe4 \\u2192\n"
    assert [signal.getsignal(name) for name in SIGNALS] == [signal.SIG_DFL] * len(SIGNALS)


@pytest.mark.parametrize("kind, least, most, good, bad", [
    (int, 1, math.inf, ["1", "7"], ["0", "-5", "1.5", "", "x", "nan"]),
    (float, 0, math.inf, ["0", "1e30"], ["-1e-9", "nan", "inf", "-inf", "1e400"]),
    (float, 0, 1, ["0", "0.5", "1"], ["-0.5", "1.5", "nan", "inf"])])
def test_a_number_is_finite_and_in_its_range(kind, least, most, good, bad):
    parse_number = number(kind, least, most)
    assert [parse_number(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises(ValueError):
            parse_number(text)


def test_a_folder_that_exists_but_cannot_be_written_is_named(tmp_path, monkeypatch):
    def no_permission(dir):
        raise PermissionError("no permission")

    monkeypatch.setattr("tempfile.TemporaryFile", no_permission)
    with pytest.raises(SystemExit, match=f"cannot write to {tmp_path}: no permission"):
        make_folder(tmp_path)


def test_a_file_is_downloaded_and_checked_once(tmp_path):
    source = tmp_path / "file"
    source.write_bytes(b"content")
    folder = tmp_path / "data"
    path = folder / "file"
    with pytest.raises(SystemExit, match=f"^cannot download .*: try again, or save .* as {path}"):
        download(source.as_uri(), str(folder), "0" * 64)
    arguments = (source.as_uri(), str(folder), hashlib.sha256(b"content").hexdigest())
    assert download(*arguments) == str(path)
    assert path.read_bytes() == b"content"
    source.unlink()
    assert download(*arguments) == str(path)
    path.write_bytes(b"half")
    with pytest.raises(SystemExit, match=f"^{path} is not the file from .*: delete it"):
        download(*arguments)
    assert socket.getdefaulttimeout() == 30


# --------------------------------------------------------------------------------------------------
# parity.py
def classifier(*sizes):
    return wild(parity.TransformerClassifier(2, 2, *sizes).double(), 2.0)


def saved_classifier(params):
    path = os.path.join(HERE, "assets", f"parity_{params}.pt")
    saved = torch.load(path, weights_only=True)
    model = parity.TransformerClassifier(*saved["sizes"])
    model.load_state_dict(saved["weights"])
    return model


def test_the_block_is_attention_and_an_mlp_each_after_layernorm_and_added_to_its_input():
    block = wild(parity.TransformerBlock(8, 4, 3))
    tokens = torch.randn(2, 10, 8)
    x = block.ln1(tokens)
    outputs = []
    for head in block.attn.heads:
        outputs.append(F.scaled_dot_product_attention(head.w_q(x), head.w_k(x), head.w_v(x)))
    after_attention = tokens + block.attn.w_o(torch.cat(outputs, dim=-1))
    hidden = F.silu(block.mlp[0](block.ln2(after_attention)))
    expected = after_attention + block.mlp[2](hidden)
    assert_close(block(tokens), expected)


def test_the_classifier_sees_only_the_fraction_of_ones():
    model = classifier(8, 4, 2, 4, 2)
    strings = torch.randint(2, (20, 9))
    twice = torch.cat([strings, strings], dim=1)
    shuffled = twice[:, torch.randperm(18)]
    assert_close(model(strings), model(shuffled))


def test_the_exact_accuracy_is_that_of_trying_all_strings():
    model = classifier(8, 4, 2, 1, 2)
    accuracy, correct, _ = parity.exact_accuracy(model, 8)
    n_right = parity.count_right(model, 8)
    assert accuracy == n_right / 256
    assert sum(math.comb(8, c) for c in range(9) if correct[c]) == n_right


def test_powers_of_the_count_below_the_tenth_have_no_parity_component():
    counts = torch.arange(11)
    assert parity.parity_component(2 * (counts % 2) - 1) == 1
    for power in range(11):
        component = parity.parity_component(counts.double() ** power)
        assert (component == 0) == (power < 10)


def test_the_untrained_output_is_close_to_a_polynomial_of_degree_3():
    model = parity.TransformerClassifier(2, 2, 8, 8, 2, 4, 2)
    _, _, f = parity.exact_accuracy(model, 10)
    f = f.double().unsqueeze(1)
    powers = torch.linspace(-1, 1, 11).double().unsqueeze(1) ** torch.arange(4)
    nearest = powers @ torch.linalg.lstsq(powers, f).solution
    assert (f - nearest).norm() < 0.1 * (f - f.mean()).norm()


@pytest.fixture(scope="module")
def short_training(tmp_path_factory):
    """A training at length 4: the script's globals, what it printed, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("parity")
    options = ["--seq_len", 4, "--n_samples", 100, "--steps", 200]
    values, output = run("parity.py", *options, "--out_dir", folder)
    return values, output, folder


def test_a_short_training_learns_parity_and_stops_after_five_low_losses(short_training):
    values, output, folder = short_training
    result = result_of(output)
    assert (result["accuracy_val"], result["accuracy_all"]) == (1, 1)
    assert values["rows"].tolist() == list(range(80))
    assert torch.equal(values["answers"], values["y"][80:])     # of the other strings
    low = "".join("1" if loss < 0.002 else "0" for loss in values["losses"])
    assert low.index("11111") == len(low) - 5 < 195
    assert "wrong for these numbers of ones: []\n" in output
    *steps, last = logged_steps(output)
    assert steps == list(range(0, last, 50))
    assert os.listdir(folder) == ["parity_curve.png"]


def test_the_loss_falls_only_after_the_parity_component_has_grown(short_training):
    values, _, _ = short_training
    small = [abs(component) < 0.01 for component in values["components"]]
    n_small = small.index(False)
    assert n_small > 10
    assert min(values["losses"][:n_small]) > 0.6
    assert values["components"][-1] > 1


# as `python parity.py --sweep` found them; 58 is the solution of an exercise
@pytest.mark.parametrize("params, n_right", [(20, 968), (32, 1023), (46, 1024), (58, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_networks_are_right_on_as_many_strings_as_claimed(params, n_right, dtype):
    model = saved_classifier(params).to(dtype)
    assert sum(p.numel() for p in model.parameters()) == params
    assert parity.count_right(model, 10) == n_right
    _, _, f = parity.exact_accuracy(model, 10)
    assert f.abs().min() > 0.1


@torch.no_grad()
def test_the_solution_with_58_parameters_gives_the_classifier_the_folded_count():
    model = saved_classifier(58)
    strings, _, _ = parity.one_string_per_count(10)
    x = model.transformer_model(model.token_embedding(strings))
    folded = (1 - torch.arange(11) / 5).abs()
    assert_close(model.final_layer_norm(x).mean(dim=1)[:, 0], folded, rtol=0, atol=0.02)


@pytest.mark.parametrize("n_layers", [0, 1])
def test_at_width_1_all_strings_look_alike(n_layers):
    assert parity.count_right(classifier(1, 1, 1, 1, n_layers), 10) == 512


def test_a_hidden_unit_is_silu_of_w_x_plus_b():
    x = torch.tensor([2.0, 5.0])
    units = parity.hidden_units(x, torch.tensor([3.0]), torch.tensor([1.0]))
    silu = F.silu(torch.tensor([7.0, 16.0]))
    assert_close(units, torch.stack([silu, torch.ones(2)], dim=1))


def test_more_rounds_of_the_search_get_nearer_to_the_targets():
    x = torch.linspace(-1, 1, 11, dtype=torch.double)  # 2c/T - 1 for c = 0 ... 10
    targets = torch.tensor([-1.0, 1] * 5 + [-1]).double()
    distances = []
    for n_rounds in [1, 6]:
        torch.manual_seed(0)
        w, b, a = parity.search(x, targets, 4, 100, n_rounds, n_steps=20)
        distances.append((parity.hidden_units(x, w, b) @ a - targets).norm())
    assert distances[1] < 0.9 * distances[0]


def test_the_sweep_finds_networks_and_draws_every_point_on_its_curve(tmp_path, capsys, figures):
    assert parity.sweep(tmp_path, [(2, [])], seq_len=4) == {20: 16}
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["20", "2", "|", "16", "4"]
    assert os.listdir(tmp_path) == ["parity_smallest.png"]
    axis = figures[0].axes[0]
    _, curve, *points, _ = axis.lines
    low, high = axis.get_ylim()
    for line in points:
        for c, y in zip(*line.get_data()):
            assert curve.get_ydata()[250 * c] == pytest.approx(y, abs=1e-3)
            assert low < y < high


def test_the_sweep_gives_up_as_few_strings_as_its_table_says():
    right = []
    for _, may_be_wrong in parity.NETWORKS:
        right.append(2 ** 10 - sum(math.comb(10, c) for c in may_be_wrong))
    assert right == [968, 1023, 1024]
    assert [width for width, _ in parity.NETWORKS] == [2, 3, 4]


# the part of assets/proof_20.md that trying all answers can check
def test_answers_with_five_changes_get_at_most_968_strings_right():
    _, parities, fractions = parity.one_string_per_count(10)
    answers = torch.cartesian_prod(*[torch.arange(2)] * 11)                # (2048, 11)
    few_changes = answers[answers.diff().abs().sum(dim=1) <= 5]
    right = (few_changes == parities).float() @ fractions
    assert right.max() == 968 / 1024


# --------------------------------------------------------------------------------------------------
# counting.py
def one_hot(sequences):
    """Sequences of digits 0, 1, 2, one-hot (B, T, 3), in float64."""
    return F.one_hot(torch.tensor(sequences), 3).double()


def counter_that_answers_3():
    model = counting.CountingModel(3, 10, 8)
    model.out.bias.data[3] = 1000
    return model


@pytest.mark.parametrize("activation, function", ACTIVATIONS.items())
def test_the_counting_model_is_the_plain_formula(activation, function):
    model = wild(counting.CountingModel(3, 6, 4, activation).double(), 2.0)
    x = one_hot([[2, 0, 0, 1, 2], [1, 1, 1, 0, 1]])
    logits, weights = model(x)
    scores = model.query @ model.key(x).transpose(1, 2) / math.sqrt(4)
    assert_close(weights, function(scores))
    vectors = model.query + function(scores) @ model.value(x)
    assert_close(logits, model.out(model.norm(vectors)))


def test_softmax_gives_the_same_logits_to_a_sequence_written_twice_in_any_order():
    model = wild(counting.CountingModel(3, 10, 8, "softmax").double(), 2.0)
    once, _ = model(one_hot([[0, 1, 1, 2, 1]]))
    twice, _ = model(one_hot([[1, 1, 1, 1, 1, 1, 0, 2, 0, 2]]))
    assert_close(once, twice)


def test_attention_has_176_of_the_395_parameters():
    model = counting.CountingModel(3, 10, 16)
    attention_only = [model.query, *model.key.parameters(), *model.value.parameters()]
    assert sum(p.numel() for p in attention_only) == 176
    assert sum(p.numel() for p in model.parameters()) == 395


def counting_options(**changes):
    """The options of a short training, of sequences of up to five digits."""
    defaults = {"vocab_size": 3, "sequence_length": 5, "hidden": 16, "device": "cpu", "lr": 0.03,
                "steps": 400, "batch_size": 256, "seed": 7, "out_dir": "."}
    return argparse.Namespace(**{**defaults, **changes})


def test_softmax_learns_to_count_at_a_single_length():
    model = counting.train(counting_options(), "softmax", all_lengths=False)
    assert counting.accuracy(model, counting.all_sequences(5, 3), 3) > 0.95


def test_equal_weights_stay_1_half_in_training():
    model = counting.train(counting_options(steps=20), "equal weights")
    _, weights = model(F.one_hot(counting.all_sequences(5, 3), 3).float())
    assert (weights == 0.5).all()


def test_all_combinations_of_counts_are_equally_frequent():
    sequences = counting.make_sequences(66_000, 10, 3)
    counts = F.one_hot(sequences, 3).sum(dim=1)                            # (66000, 3)
    _, frequency = counts.unique(dim=0, return_counts=True)
    assert len(frequency) == 66
    assert 850 < frequency.min()
    assert frequency.max() < 1150


def test_the_accuracy_is_the_fraction_of_sequences_with_every_count_right():
    n_right = math.comb(9, 3) * math.comb(6, 3)  # three of each digit
    sequences = counting.all_sequences(9, 3)
    assert counting.accuracy(counter_that_answers_3(), sequences, 3) == n_right / 3 ** 9


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A short training: the script's global variables and what it printed."""
    folder = tmp_path_factory.mktemp("counting")
    return run("counting.py", "--sequence_length", 5, "--steps", 400, "--out_dir", folder)


def test_a_short_training_counts_right_and_each_query_attends_to_its_own_digit(counted):
    values, output = counted
    assert values["scores"] == [1.0] * 5
    assert "length 5: 1.0000 of 243 sequences; mean over lengths 1 to 5: 1.0000\n" in output
    assert result_of(output)["accuracy_all"] == 1
    assert logged_steps(output) == [0, 200]
    weights = values["weights"][0]  # one query a row, one digit a column
    assert 0.2 < weights.diagonal().min()
    assert weights.diagonal().max() < 0.7
    assert weights[~torch.eye(3).bool()].max() < 0.1


def test_the_vectors_of_the_counts_form_an_arc_whatever_the_other_digits_are(counted):
    values, output = counted
    ones = counting.angles(values["model"], 1, 5)
    twos = counting.angles(values["model"], 2, 5)
    assert ones.diff().min() > 3
    assert (ones - twos).abs().max() < 5
    assert f"the rest 2s: {' '.join(f'{angle:.0f}' for angle in twos)}\n" in output


def test_the_sequence_option_is_counted_directly_after_the_training_log():
    _, output = run("counting.py", "--sequence_length", 5, "--steps", 1, "--sequence", "2, 1 2")
    lines = output.splitlines()
    assert lines[0].startswith("step 0/1: loss")
    assert lines[1] == "sequence: 2 1 2  true counts: 0 1 2"
    assert lines[2].startswith("sigmoid: counts ")
    assert "angles" not in output
    assert "weights" not in output
    assert os.listdir("out") == ["counting_sigmoid.png"]


def test_half_of_the_batches_have_the_full_length_and_the_others_any_length(monkeypatch):
    batches = []
    make_sequences = counting.make_sequences

    def recorded(n, length, vocab_size):
        batches.append((n, length))
        return make_sequences(n, length, vocab_size)

    monkeypatch.setattr("counting.make_sequences", recorded)
    counting.train(counting_options(batch_size=2), "sigmoid")
    count = collections.Counter(batches)
    assert len(batches) == 400
    assert 210 < count[2, 5] < 270  # expected: 200 + 200/5
    for length in (1, 2, 3, 4):
        assert 20 < count[2, length] < 60  # 200/5


def test_the_heatmaps_have_weights_dots_at_the_true_digits_and_wrong_counts_in_red(figures):
    models = {"one": counter_that_answers_3(), "two": wild(counting.CountingModel(3, 10, 8))}
    counting.show_counts(models, [1, 1, 2, 1], 3, io.BytesIO())
    for axis, (title, model) in zip(figures[0].axes, models.items()):
        _, weights = model(one_hot([[1, 1, 2, 1]]).float())
        assert axis.get_title() == title
        assert_close(torch.tensor(axis.images[0].get_array()), weights[0].double())
        assert axis.images[0].get_clim() == (0, pytest.approx(weights.max().item()))
        dots = axis.collections[0].get_offsets().tolist()
        assert dots == [[0, 1], [1, 1], [2, 2], [3, 1]]
        assert [label.get_text() for label in axis.get_xticklabels()] == list("1121")
    labels = figures[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [
        "0: 3 (true 0)", "1: 3 (true 3)", "2: 3 (true 1)"]
    assert [label.get_color() for label in labels] == ["red", "black", "red"]


def test_compare_prints_the_mean_accuracy_at_each_length_and_draws_both_activations(
        capsys, figures):
    args = counting_options(sequence_length=3, steps=20)
    _, softmax = counting.compare(args, [0, 1], n_seeds=2)
    rows = capsys.readouterr().out.splitlines()[2:7]
    for n, activation, all_lengths in [(0, "sigmoid", False), (3, "softmax", True)]:
        accuracies = torch.zeros(2, 3)
        for i in range(2):
            torch.manual_seed(7 + i)
            model = counting.train(args, activation, all_lengths)
            for length in (1, 2, 3):
                sequences = counting.all_sequences(length, 3)
                accuracies[i, length - 1] = counting.accuracy(model, sequences, 3)
        means = accuracies.mean(dim=0).tolist()
        n_exact = (accuracies[:, 2] == 1).sum()
        assert rows[n].startswith(activation)
        assert rows[n].endswith(f"{means[1]:.3f} {means[2]:.3f} | {n_exact} of 2 seeds")
    assert softmax == means[2]
    titles = [axis.get_title() for axis in figures[0].axes[:4]]
    assert titles == ["sigmoid, trained at length 3", "sigmoid, trained at lengths 1-3",
                      "softmax, trained at length 3", "softmax, trained at lengths 1-3"]


def test_compare_counts_the_seeds_that_are_all_right_at_the_full_length(capsys, monkeypatch):
    accuracies = itertools.cycle([0.5, 1.0, 1.0, 0.99])     # of seeds 7 and 8 at lengths 1 and 2
    monkeypatch.setattr("counting.accuracy", lambda *args: next(accuracies))
    counting.compare(counting_options(sequence_length=2, steps=1), [0, 1], n_seeds=2)
    rows = capsys.readouterr().out.splitlines()[2:7]
    assert all(row.endswith("| 0.750 0.995 | 1 of 2 seeds") for row in rows)


# --------------------------------------------------------------------------------------------------
# translate.py: the model
def transformer(vocab_size=20, max_len=12, n_layers=2):
    model = translate.TransformerModel(vocab_size, max_len, 8, 2, n_layers, n_layers, dropout=0.0)
    return wild(model).eval()


def copy_weights(ours, theirs):
    renamed = {"self_attn": "self_attention", "multihead_attn": "cross_attention",
               "out_proj": "w_o", "linear1": "feed_forward.0", "linear2": "feed_forward.2"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "in_proj_" in name:  # queries, keys and values are one matrix in torch
            for letter, rows in zip("qkv", tensor.chunk(3)):
                weights[name.replace("in_proj_", f"w_{letter}.")] = rows
        else:
            weights[name] = tensor
    ours.load_state_dict(weights)


def test_the_encoder_block_equals_torch():
    theirs = wild(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))
    ours = translate.EncoderBlock(8, 2, 0.0)
    copy_weights(ours, theirs)
    x = torch.randn(3, 5, 8)
    real = torch.arange(5) < torch.tensor([[5], [2], [4]])
    expected = theirs(x, src_key_padding_mask=~real)
    assert_close(ours(x, real[:, None, None, :])[real], expected[real])


def test_the_decoder_block_equals_torch():
    theirs = wild(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True))
    ours = translate.DecoderBlock(8, 2, 0.0)
    copy_weights(ours, theirs)
    x = torch.randn(3, 5, 8)
    memory = torch.randn(3, 7, 8)
    causal = torch.ones(5, 5).tril().bool()
    real = torch.arange(7) < torch.tensor([[7], [2], [4]])
    expected = theirs(x, memory, tgt_mask=~causal, memory_key_padding_mask=~real)
    output, _ = ours(x, causal, memory, real[:, None, None, :])
    assert_close(output, expected)


def test_dropout_is_on_every_sublayer():
    x = torch.randn(1, 3, 8)
    block = translate.EncoderBlock(8, 2, dropout=1.0)
    assert_close(block(x, None), block.norm2(block.norm1(x)))
    block = translate.DecoderBlock(8, 2, dropout=1.0)
    output, _ = block(x, None, x, None)
    assert_close(output, block.norm3(block.norm2(block.norm1(x))))


def test_word_dropout_zeroes_whole_tokens_at_half_the_rate():
    model = translate.TransformerModel(20, 12, 8, 2, 1, 1, dropout=0.8)
    model.dropout.p = 0.0
    model.position_embedding.weight.data.zero_()
    dropped = model.embed(torch.full((500, 4), 5)) == 0
    assert (dropped == dropped[..., :1]).all()
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.05)


@torch.no_grad()
def test_the_untrained_model_predicts_the_token_that_it_has_just_read():
    model = translate.TransformerModel(8259, 100, 192, 4, 3, 3)
    tokens = torch.randint(3, 8259, (8, 12))
    logits, _ = model(tokens, tokens)
    assert (logits.argmax(dim=-1) == tokens).float().mean() > 0.8
    own = logits.gather(-1, tokens.unsqueeze(-1))
    assert own.mean().item() == pytest.approx(9, abs=1)


def test_decoding_with_the_cache_equals_decoding_at_once_so_no_token_sees_a_later_one():
    model = transformer()
    tgt = torch.randint(3, 20, (3, 6))
    src = torch.randint(3, 20, (3, 7))
    src[1, 5:] = translate.PAD
    memory, src_mask = model.encode(src)
    expected, _ = model.decode(tgt, memory, src_mask)
    cache = {}
    logits = []
    for part in tgt.split([1, 1, 3, 1], dim=1):
        logits.append(model.decode(part, memory, src_mask, cache)[0])
        memory = None  # the cache has its keys and values
    assert_close(torch.cat(logits, dim=1), expected)


# --------------------------------------------------------------------------------------------------
# translate.py: the toy language
@pytest.mark.parametrize("n, german, english, alignment", [
    (2, "Ein kleines Mädchen besucht den König.", "A small girl visits the king.",
     [[0], [1], [2], [3], [4], [5], [6]]),
    (5, "Gestern hat der Lehrer den Vogel geweckt.", "Yesterday the teacher woke the bird.",
     [[0], [2], [3], [1, 6], [4], [5], [7]]),
    (7, "Den klugen Lehrer hat der König gestern besucht.",
     "The king visited the clever teacher yesterday.",
     [[4], [5], [3, 7], [0], [1], [2], [6], [8]]),
    (259, "Der Esel hat gestern einen alten Vogel geweckt.",
     "The donkey woke an old bird yesterday.", [[0], [1], [2, 7], [4], [5], [6], [3], [8]])])
def test_a_toy_line_has_this_translation_and_alignment(n, german, english, alignment):
    assert translate.toy_pair(n) == (german, english, alignment)


def test_every_german_sentence_has_one_translation():
    translations = {}
    for n in range(1, 5000):
        german, english, _ = translate.toy_pair(n)
        assert translations.setdefault(german, english) == english
        assert not re.match("(Den|Einen) .* eine? ", german)    # an indefinite subject


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_toy_sentence_is_in_one_part_and_once(part, monkeypatch):
    monkeypatch.setitem(translate.N_TOY_LINES, part, 2000)
    sentences = [german for german, _, _ in translate.toy_lines(part)]
    assert {translate.part_of(german) for german in sentences} == {part}
    assert len(set(sentences)) == len(sentences)


# --------------------------------------------------------------------------------------------------
# translate.py: everyday sentences and text files
def test_everyday_sentences_are_read_from_their_zip(monkeypatch, tmp_path):
    path = tmp_path / os.path.basename(translate.TATOEBA_URL)
    monkeypatch.setattr("translate.download", lambda url, folder, sha256: path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("deu.txt", "Hi.\tHallo!\nRun!\tLauf!\n")
    assert translate.read_file("tatoeba") == [("Hallo!", "Hi."), ("Lauf!", "Run!")]


def test_a_byte_order_mark_more_columns_and_spaces_are_ignored(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffA  dog.\tEin Hund.\tCC-BY\r\nTwo.\tZwei.\tCC-BY\r\n".encode())
    assert translate.read_file(path) == [("Ein Hund.", "A dog."), ("Zwei.", "Two.")]


@pytest.mark.parametrize("content, message", [
    (b"A dog.\tEin Hund.\nno tab\n", "line 2: expected English, a tab"),
    (b"\tHallo!\n", "line 1: expected"), (b"\xff", "cannot read .*utf-8"),
    (b"Hi.\tHallo!\n", "its test part is empty")])
def test_a_bad_text_file_gives_one_clear_sentence(content, message, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        translate.load_pairs(path, "test")


PAIRS = [
    ("Hallo!", "Hi."), ("Stimmt!", "Right!"),                   # train
    ("Wer weiß?", "Who knows?"),                                # val
    ("hallo!", "Hello."), ("Genau!", "right"),                  # test, but one sentence is known
    ("Feuer!", "Fire!"), ("Feuer!", "Shoot!")]                  # test


def test_held_out_pairs_have_no_sentence_of_training_and_count_once():
    assert translate.split_pairs(PAIRS, "train") == PAIRS[:2]
    assert translate.split_pairs(PAIRS, "val") == PAIRS[2:3]
    assert translate.split_pairs(PAIRS, "test") == PAIRS[5:6]


def test_pairs_that_are_too_long_are_left_out():
    tokenizer = translate.Tokenizer([])
    limit = "x" * 98    # with a space before it 99 bytes, and the end of the sentence
    pairs = [(limit, limit), (limit + "x", "short"), ("kurz", limit + "x")]
    assert len(translate.encode_pairs(tokenizer, pairs)) == 1
    batches = translate.training_batches(tokenizer, pairs[1:], "toy", 100, 0)
    with pytest.raises(SystemExit, match="all pairs have 100 tokens or more"):
        next(batches)


# --------------------------------------------------------------------------------------------------
# translate.py: tokens and batches
def test_encoding_loses_nothing():
    texts = ["Der Hund läuft.", "  two  spaces\n\ttab ", "", "日本語 🙂", "aaaa a aa", "\x00\r\n"]
    tokenizer = translate.Tokenizer(translate.learn_merges(texts * 2, 10))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_is_not_unicode_is_replaced():
    tokenizer = translate.Tokenizer([])
    assert tokenizer.decode([translate.EOS, 258, translate.PAD]) == "\ufffd"  # byte 255
    assert tokenizer.decode(tokenizer.encode("\ud800")) == "?"                # half a pair


def test_merges_match_recounting_all_pairs_until_none_occurs_twice():
    text = " ".join(translate.toy_pair(n)[0] for n in range(1, 30))
    words = [translate.Tokenizer([]).encode(word) for word in translate.WORD.findall(text)]
    expected = []
    for n in range(1000):
        counts = collections.Counter()
        for word in words:
            counts.update(zip(word, word[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[pair] < 2:
            break
        expected.append(pair)
        words = [translate.merge(word, pair, 259 + n) for word in words]
    assert translate.learn_merges([text], 1000) == expected
    assert translate.learn_merges([text], 9) == expected[:9]


@pytest.mark.parametrize("folded, texts", [
    ("bello sagte: \"es geht's an.\"", [
        "Bello sagte: \"Es geht's an.\"", "Bello sagte: „Es geht’s an.“",
        "Bello sagte: »Es geht´s an.«", "BELLO SAGTE: “ES GEHT`S AN.”",
        "\ufeffBel\u00adlo sagte: \u200b\"Es geht's an.\u200e\""]),
    ("u-bahn - ja", ["U-Bahn - ja", "U‐Bahn – ja", "U‑Bahn — ja", "U−Bahn ― ja"]),
    ("uebergroessentraeger", [
        "Übergrößenträger", "ÜBERGRÖSSENTRÄGER", "Uebergroessentraeger",
        "\u00a0U\u0308bergrößenträger\r\n"]),
    ("lara yilmaz, 5 euro", ["Lara Yılmaz, 5 €", "LARA YILMAZ, 5€", "Łára Yílmàz, 5 Euro"])])
def test_all_ways_of_typing_are_the_same_to_the_model(folded, texts):
    assert {translate.fold(text) for text in texts} == {folded}


@pytest.mark.parametrize("text, marked", [
    ("My name is Anna.", "↑ my name is↑ anna."), ("I'm on TV, McDonald.", "↑ i'm on TV, McDonald."),
    ('"Oh, A-B is Zoë, A1 (Yes)A', ' "↑oh,↑ a-↑b is↑ zoë,↑ a1 (↑yes)↑a'),
    ("x X xX Xx XX Éa aÉ", " x↑ x xX↑ xx XX Éa aÉ"), ("", " ")])
def test_a_capital_letter_becomes_a_mark_and_a_small_letter_and_back(text, marked):
    assert translate.mark_capitals(text) == marked
    assert translate.restore_capitals(marked) == text


def test_a_name_has_the_same_tokens_in_both_languages_wherever_it_stands():
    tokenizer = translate.Tokenizer(translate.learn_merges([" anna", " anna"], 10))
    *german, _ = translate.encode_source(tokenizer, "Anna")
    [(src, tgt)] = translate.encode_pairs(tokenizer, [("Ja, Anna", "Anna")])
    assert len(german) == 1
    assert src[-2:] == german + [translate.EOS]
    assert tgt[-2:] == german + [translate.EOS]


@pytest.mark.parametrize("german, copied, restored", [
    ("Kennst du Jürgen Strauß?", "Do you know Juergen Strauss?", "Do you know Jürgen Strauß?"),
    ("AYŞE kommt aus KÖLN", "Ayse comes from Koeln.", "Ayşe comes from Köln."),
    ("wie heisst joerg?", "What is Joerg's name?", "What is Joerg's name?")])
def test_a_name_gets_the_accents_of_the_german_text(german, copied, restored):
    assert translate.restore_accents(copied, german) == restored


def test_every_digit_is_a_token():
    tokenizer = translate.Tokenizer(translate.learn_merges([" 1234", " 1234"], 10))
    assert [tokenizer.decode([token]) for token in tokenizer.encode(" 1234")] == [" 1", *"234"]


def test_a_batch_has_little_padding_and_an_epoch_has_every_sentence_once():
    examples = []
    for n in range(3000):
        src = [5] * (n % 26 + 4)
        tgt = [5] * (n % 29 + 4) + [n]
        examples.append((src, tgt))
    seen = []
    n_tokens = 0
    n_padded = 0
    for batch in translate.make_batches(examples, 1000, random.Random(0)):
        lengths = [len(src) + len(tgt) for src, tgt in batch]
        size = len(batch) * max(lengths)
        assert size <= 1000
        n_padded += size
        n_tokens += sum(lengths)
        seen += [tgt[-1] for _, tgt in batch]
    assert sorted(seen) == list(range(3000))
    assert n_tokens > 0.8 * n_padded


def test_every_epoch_and_every_seed_has_other_batches():
    pairs = [(f"Satz {n}", f"{n}") for n in range(60)]
    tokenizer = translate.Tokenizer([])
    batches = translate.training_batches(tokenizer, pairs, "toy", 10_000, seed=0)
    first = next(batches)   # one batch is one epoch
    assert first != next(batches)
    assert first != next(translate.training_batches(tokenizer, pairs, "toy", 10_000, seed=5))
    assert first == next(translate.training_batches(tokenizer, pairs, "toy", 10_000, seed=0))


def test_as_people_type_changes_a_text_file_but_not_the_toy_language(monkeypatch):
    monkeypatch.setattr("translate.as_people_type", lambda pairs, rng: [("anders", "other")])
    tokenizer = translate.Tokenizer([])
    for data, german in [("toy", "Hund"), ("pairs.tsv", "anders")]:
        [(src, _)] = next(translate.training_batches(tokenizer, [("Hund", "Dog")], data, 100, 0))
        assert tokenizer.decode(src) == " " + translate.fold(german)


# --------------------------------------------------------------------------------------------------
# translate.py: training sentences like those that people type
def test_names_and_numbers_are_replaced_by_the_same_ones_in_both_sentences():
    n_names = 0
    n_number_words = 0
    for seed in range(100):
        german, english = translate.invent_names_and_numbers(
            "Toms Bruder hat Maria 3 oder vier Mal in 1998 gesehen, Tom.",
            "Tom's brother saw Mary 3 or four times in 1998, Tom.", random.Random(seed))
        assert "Maria" in german and "Mary" in english      # they differ, so they stay
        name, number, word, year, again = re.fullmatch(
            r"(.+)'s brother saw Mary (\S+) or (\S+) times in (\S+), (.+)\.", english).groups()
        assert name == again
        german_word = "vier" if word == "four" else word
        assert german == (f"{name}s Bruder hat Maria {number} oder {german_word} Mal in {year} "
                          f"gesehen, {name}.")
        n_names += name != "Tom"
        n_number_words += word != "four"
    assert 30 < n_names < 70
    assert 50 < n_number_words < 90


def test_invented_names_and_numbers_hardly_ever_repeat():
    rng = random.Random(0)
    names = {translate.invent_name(rng) for _ in range(1000)}
    assert len(names) > 800
    assert all(re.fullmatch("[A-Z][a-z]+([ -][A-Z][a-z]+)*", name) for name in names)
    lengths = collections.Counter(len(translate.invent_number(rng)) for _ in range(1000))
    assert set(lengths) == {1, 2, 3, 4, 5, 6}


def test_a_sixth_of_the_sentences_are_joined_in_twos_and_threes():
    pairs = [(f"de{n}", f"en{n}") for n in range(1200)]
    joined = translate.join_some(pairs, random.Random(0))
    lengths = collections.Counter(len(german.split()) for german, _ in joined)
    assert set(lengths) == {1, 2, 3}
    assert 200 <= 1200 - lengths[1] <= 202
    assert all(german.replace("de", "en") == english for german, english in joined)
    assert sorted(" ".join(english for _, english in joined).split()) == sorted(
        english for _, english in pairs)


def test_a_typing_error_loses_doubles_swaps_or_changes_a_letter_but_the_first():
    rng = random.Random(0)
    typed = {translate.mistype("abc", rng) for _ in range(1000)}
    changed = {f"a{x}c" for x in "abcdefghijklmnopqrstuvwxyz"}
    changed |= {f"ab{x}" for x in "abcdefghijklmnopqrstuvwxyz"}
    assert typed == {"ac", "ab", "abbc", "abcc", "acb"} | changed


def test_some_words_are_mistyped_but_no_name_and_no_number():
    pairs = [("Katharina kennt 123456 Buchstaben", "Katharina knows 123456 letters")] * 1000
    typed = translate.as_people_type(pairs, random.Random(0))
    n_mistyped = 0
    n_words = 0
    for german, english in typed:
        words = [word for word in german.split() if word not in english.split()]
        assert len(words) == 2 * english.count("knows")     # names and numbers are in both
        n_words += len(words)
        n_mistyped += len(words) - words.count("kennt") - words.count("Buchstaben")
    assert n_mistyped / n_words == pytest.approx(0.03, abs=0.015)


def test_a_tenth_of_the_german_lines_loses_its_commas_and_final_marks():
    pairs = [("Ja, um 2.30.", "Yes, at 2:30.")] * 2000
    typed = translate.as_people_type(pairs, random.Random(0))
    n_lost = 0
    for german, english in typed:
        n_lost += "," not in german
        assert german.endswith(".") == ("," in german)
        assert "." in german and english.endswith(".") and "," in english
    assert n_lost / len(typed) == pytest.approx(0.1, abs=0.02)


def test_words_that_mostly_occur_together_are_pairs():
    pairs = [("Der Hund schläft.", "The dog sleeps."), ("Mein Hund rennt.", "My dog runs."),
             ("Die Maus schläft.", "A mouse is asleep."), ("Tom kommt.", "Here comes Tom.")] * 5
    found = translate.word_pairs(pairs)
    assert ("hund", "dog") in found and ("maus", "mouse") in found
    assert ("hund", "mouse") not in found
    assert ("tom", "Tom") not in found              # it would stay as it is anyway
    assert translate.word_pairs(pairs[:8]) == []    # none occurs five times


# --------------------------------------------------------------------------------------------------
# translate.py: batches, loss, learning rate
EXAMPLES = [
    ([5, 6, 2], [1, 7, 8, 9, 2]),
    ([5, 2], [1, 4, 2]),
]


def test_label_smoothing_is_the_formula_and_padding_has_no_loss():
    model = transformer()
    expected = 0.0
    for src, tgt in EXAMPLES:
        logits, _ = model(torch.tensor([src]), torch.tensor([tgt[:-1]]))
        one_hot = F.one_hot(torch.tensor(tgt[1:]), 20)
        targets = 0.9 * one_hot + 0.1 / 20
        expected -= (targets * logits[0].log_softmax(dim=-1)).sum().item()
    loss = translate.batch_loss(model, EXAMPLES, "cpu", 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_batch_is_made_on_the_device_of_the_model():
    assert translate.pad([[5, 6], [7]], "meta").device.type == "meta"


def test_the_validation_loss_is_the_mean_over_all_target_tokens():
    model = transformer()
    expected = translate.batch_loss(model, EXAMPLES, "cpu").item() / 6
    loss = translate.validation_loss(model, EXAMPLES * 50, "cpu")
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("step, n_steps, expected", [
    (0, 10_000, 0.0005), (999, 10_000, 0.5), (1000, 10_000, 0.5),
    (4000, 10_000, 0.375),  # cos 60° = 1/2
    (9999, 10_000, 0.0), (50, 500, 0.5), (0, 1, 0.5)])
def test_the_learning_rate_warms_up_and_follows_a_cosine_to_zero(step, n_steps, expected):
    rate = translate.learning_rate(step, n_steps, peak=0.5)
    assert rate == pytest.approx(expected, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# translate.py: decoding and BLEU
def plain_beam_search(model, src, beam):
    """Beam search for one sentence with lists and without a cache."""
    hypotheses = [([translate.BOS], 0.0)]
    for _ in range(model.max_len - 1):
        extended = []
        for tokens, score in hypotheses:
            if tokens[-1] == translate.EOS:
                extended.append((tokens, score))
                continue
            logits, _ = model(src, torch.tensor([tokens]))
            log_probs = logits[0, -1].log_softmax(dim=-1).tolist()
            for token in range(1, len(log_probs)):  # all but PAD
                extended.append((tokens + [token], score + log_probs[token]))
        extended.sort(key=lambda h: -h[1] / (len(h[0]) - 1))
        hypotheses = extended[:beam]
    return hypotheses[0][0][1:]


@torch.no_grad()
def test_beam_search_equals_a_plain_one():
    for _ in range(8):  # weights
        model = transformer(12, 8, n_layers=1)
        src = torch.randint(3, 12, (2, 6))
        src[0, 3:] = translate.PAD
        results = translate.beam_search(model, src, beam=5).tolist()
        for row, tokens in zip(src, results):
            expected = plain_beam_search(model, row[row != 0][None], beam=5)
            assert tokens == expected + [translate.PAD] * (len(tokens) - len(expected))


def test_greedy_decoding_is_beam_search_with_one_hypothesis():
    for _ in range(8):
        model = transformer(12, 8, n_layers=1)
        src = torch.randint(3, 12, (4, 6))
        assert torch.equal(translate.greedy(model, src), translate.beam_search(model, src, beam=1))


@pytest.mark.parametrize("translations, references, expected", [
    (["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."],
     ["The dog bit the man.", "It was not unexpected.", "The man bit him first."], 45.067506),
    (["x y z w v"], ["x y z w"], 66.874030),  # no bonus for length
    (["the the the the the"], ["the cat sat on the"], 12.703318),  # "the" counts twice
    (["x y z w"], ["a b c d"], 0.0),
    (["x y z"], ["x y z"], 0.0),
    (["the old king sees the cat"], ["the old king sees the dog today"], 64.318887),
    (["&quot;Hi&quot; it's 3-4, 1,000 <skipped>bags (e.g. blue/green)"],
     ['"Hi" it is 3-4, 1,000 bags (e.g. blue/green)!'], 76.438381)])
def test_bleu_has_the_values_that_sacrebleu_prints(translations, references, expected):
    assert translate.bleu(translations, references) == pytest.approx(expected, abs=0.005)


# --------------------------------------------------------------------------------------------------
# translate.py: looking inside
TOY_WEIGHTS = os.path.join(HERE, "assets", "translate_toy.pt")


@pytest.fixture(scope="module")
def toy_model():
    model, tokenizer, _ = translate.load_model(TOY_WEIGHTS, "cpu")
    return model, tokenizer


def test_the_measures_of_line_7_match_a_plain_loop_over_its_words(toy_model):
    model, tokenizer = toy_model
    german, english, alignment = translate.toy_pair(7)
    src = torch.tensor([translate.encode_source(tokenizer, german)])
    tgt = torch.tensor([[1] + tokenizer.encode(translate.mark_capitals(english))])  # BOS first
    hits = torch.zeros(5)       # of the last block's four heads, and of the gradient
    for t, right in enumerate(alignment[:-1], start=1):     # without the full stop
        embedded = model.embed(src).requires_grad_()
        memory = embedded
        for block in model.encoder:
            memory = block(memory, None)
        logits, weights = model.decode(tgt, memory, None)
        logits[0, t].log_softmax(dim=-1)[tgt[0, t + 1]].backward()
        guesses = weights[-1][0, :, t, :-1].argmax(dim=-1).tolist()
        guesses.append(embedded.grad[0, :-1].norm(dim=-1).argmax().item())
        hits += torch.tensor([guess in right for guess in guesses])
    lines = [(german, english, alignment)]
    accuracy, chance, diagonal = translate.alignment_accuracy(model, tokenizer, lines)
    gradient = translate.gradient_accuracy(model, tokenizer, lines)
    assert_close(torch.stack([*accuracy[-1], gradient]), hits / 7)
    assert chance.item() == pytest.approx(8 / 9 / 7)
    assert diagonal.item() == pytest.approx(1 / 7)


@pytest.mark.parametrize("change, english", [
    (("gestern", "heute"), "The king visited the clever teacher today."),
    (("der", "ein"), "The king visited a clever teacher yesterday.")])
def test_the_counterfactuals_of_the_readme_come_out_as_its_answers_say(toy_model, change, english):
    german = "Den klugen Lehrer hat der König gestern besucht.".replace(*change)
    assert translate.translate(*toy_model, [german], 5) == [english]


def test_the_heatmap_of_a_line_shows_its_weights_and_marks_the_right_words(toy_model, figures):
    model, tokenizer = toy_model
    german, english, alignment = translate.toy_pair(2)
    translate.plot_cross_attention(model, tokenizer, german, 1, "out/x.png", english, alignment)
    src = torch.tensor([translate.encode_source(tokenizer, german)])
    english_tokens = tokenizer.encode(translate.mark_capitals(english))
    _, expected = model(src, torch.tensor([[translate.BOS] + english_tokens]))
    for axis, weights in zip(figures[0].axes, expected[0]):
        assert_close(torch.tensor(axis.images[0].get_array()).float(), weights)
        assert axis.images[0].get_clim() == pytest.approx((0.0, expected.max().item()))
        source_labels = [label.get_text() for label in axis.get_xticklabels()]
        written_labels = [label.get_text() for label in axis.get_yticklabels()]
        assert " ".join(source_labels) == "_ein _kleines _maedchen _besucht _den _koenig . <eos>"
        assert " ".join(written_labels) == "↑ _a _small _girl _visits _the _king . <eos>"
        dots = axis.collections[0].get_offsets().tolist()
        assert dots == [[s, t + 1] for t, [s] in enumerate(alignment)]


def test_the_shipped_toy_model_translates_and_finds_the_source_words(toy_model, monkeypatch):
    monkeypatch.setitem(translate.N_TOY_LINES, "test", 1000)
    args = argparse.Namespace(out_dir="out", beam=1)
    result = result_of("result: " + translate.test(*toy_model, "toy", args))
    assert result["exact"] > 0.95
    assert result["alignment"] > 0.9
    assert 0.8 < result["gradient"] <= 1


# --------------------------------------------------------------------------------------------------
# translate.py: the script
TINY = ("--d_model 16 --n_heads 2 --n_enc_layers 1 --n_dec_layers 1 --merges 50 --lr 0.03 "
        "--batch_tokens 300 --beam 1 --steps 60").split()


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """A small text file of sentence pairs. One in the test part is too long."""
    lines = ["{1}\t{0}\n".format(*translate.toy_pair(n)) for n in range(1, 300)]
    lines.append("long\t" + "lang " * 114)
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(pairs_file, tmp_path_factory):
    """The folder of a small training, the variables of the script, and what it printed."""
    torch.set_num_threads(1)    # for equal bits; `same_start` may come later
    folder = tmp_path_factory.mktemp("trained")
    return folder, *run("translate.py", *TINY, "--data", pairs_file, "--out_dir", folder)


ONE_STEP = [*TINY, "--d_model", 64, "--dropout", 0, "--steps", 1, "--lr", 1e-30]    # keeps weights


def train_one_step(pairs_file, folder):
    """The variables after ONE_STEP, and the norm of the gradient before it was clipped."""
    norms = []
    clip = nn.utils.clip_grad_norm_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_",
                      lambda *args: norms.append(clip(*args).item()))
        values, _ = run("translate.py", *ONE_STEP, "--data", pairs_file, "--out_dir", folder)
    return values, norms[0]


@pytest.fixture(scope="module")
def one_step(pairs_file, tmp_path_factory):
    return train_one_step(pairs_file, tmp_path_factory.mktemp("one_step"))


def test_training_starts_near_the_loss_of_a_uniform_prediction_and_learns(trained):
    _, values, output = trained
    line = re.search(r"step 0/60: loss ([\d.]+), uniform prediction ln \d+ = ([\d.]+)", output)
    assert float(line[1]) == pytest.approx(float(line[2]), abs=1)
    assert values["loss"] < float(line[1]) - 1.5
    assert logged_steps(output) == [0, *range(3, 61, 3)]
    assert len(re.findall(r", validation loss [\d.]+, about \d+ min left\n", output)) == 20
    assert set(result_of(output)) == {"exact", "bleu", "params", "seconds"}


def test_the_tokenizer_learns_from_the_training_part_of_both_languages(trained, pairs_file):
    pairs = translate.load_pairs(str(pairs_file), "train")
    texts = [" " + translate.fold(german) for german, _ in pairs]
    texts += [translate.mark_capitals(english) for _, english in pairs]
    assert trained[1]["merges"] == translate.learn_merges(texts, 50)


def test_weights_that_were_just_trained_are_used_with_load(trained, capsys):
    weights = trained[0] / "translate_pairs.tsv.pt"
    assert f"try: python translate.py --test --load {weights}" in trained[2]
    _, output = run("translate.py", "--test", "--load", weights)     # the file knows its data
    assert set(result_of(output)) == {"exact", "bleu", "params", "seconds"}
    assert f"weights from {weights}" in capsys.readouterr().err
    _, output = run("translate.py", "--load", weights, "--data", "toy", "--line", 7)
    assert "source:      Den klugen Lehrer hat der König gestern besucht." in output


@pytest.mark.parametrize("n, held_out", [(1, "no"), (6, "yes"), (5, "no"), (7, "no")])
def test_a_line_says_whether_its_pair_would_be_scored(n, held_out, toy_model, capsys):
    lines = [f"{english}\t{german}\n" for german, english in PAIRS]
    with open("pairs.tsv", "w", encoding="utf-8") as file:
        file.writelines(lines)
    args = argparse.Namespace(line=n, beam=1, plot=False)
    translate.translate_line(*toy_model, "pairs.tsv", args)
    assert capsys.readouterr().out.endswith(f"held out:    {held_out}\n")


def test_a_text_that_is_too_long_is_named_and_the_status_is_1(capsys):
    with pytest.raises(SystemExit) as stop:
        run("translate.py", "--data", "toy", "--text", "x" * 99, "Den Vogel weckt der Hund.")
    assert stop.value.code == 1
    assert "at most 99 tokens and this one has 100: xxx" in capsys.readouterr().err


def test_all_texts_but_those_that_are_too_long_are_translated(toy_model):
    texts = ["Den Vogel weckt der Hund."] * 66 + ["x" * 99, "x" * 98]   # more than a batch
    *translations, too_long, longest = translate.translate(*toy_model, texts, beam=1)
    assert translations == ["The dog wakes the bird."] * 66
    assert too_long == ""
    assert longest != ""


def test_the_validation_loss_and_the_result_are_those_of_the_validation_part(trained, pairs_file):
    _, values, output = trained
    pairs = translate.load_pairs(str(pairs_file), "val")
    examples = translate.encode_pairs(values["tokenizer"], pairs)
    loss = translate.validation_loss(values["net"].eval(), examples, "cpu")
    assert values["val_loss"] == pytest.approx(loss, rel=1e-5)
    _, bleu = translate.score(values["model"], values["tokenizer"], pairs, beam=1)
    assert result_of(output)["bleu"] == pytest.approx(bleu, abs=0.01)
    assert bleu > 0


def test_weights_are_saved_and_evaluated_in_half_precision(trained):
    folder, values, _ = trained
    saved = torch.load(folder / "translate_pairs.tsv.pt", weights_only=True)
    for name, parameter in values["model"].named_parameters():
        assert saved["weights"][name].dtype == torch.float16
        assert torch.equal(saved["weights"][name].float(), parameter)


def test_a_step_takes_the_smoothed_mean_loss_of_all_targets_and_limits_the_gradient_to_1(one_step):
    values, norm = one_step
    n_targets = sum(len(tgt) - 1 for _, tgt in values["batch"])
    loss = translate.batch_loss(values["net"], values["batch"], "cpu", 0.1) / n_targets
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    norms = torch.stack([p.grad.norm() for p in values["net"].parameters()])
    assert norm > 1
    assert norms.norm().item() == pytest.approx(1, rel=1e-3)


@pytest.fixture(scope="module")
def interrupted(pairs_file, tmp_path_factory):
    """The folder of a training that was interrupted and had finished weights of an earlier one."""
    torch.set_num_threads(1)    # as in `trained`
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "translate_pairs.tsv.pt").write_text("finished")
    replace = os.replace
    saved = []

    def interrupt(temporary_path, path):
        replace(temporary_path, path)
        saved.append(path)
        if len(saved) == 10:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("translate.py", *TINY, "--data", pairs_file, "--out_dir", folder)
    return folder


def test_an_unfinished_training_is_not_overwritten_and_keeps_finished_weights(
        interrupted, pairs_file):
    with pytest.raises(SystemExit, match="holds an unfinished run: continue it with --resume"):
        run("translate.py", *TINY, "--data", pairs_file, "--out_dir", interrupted)
    assert (interrupted / "translate_pairs.tsv.pt").read_text() == "finished"


def test_an_unfinished_training_is_not_continued_with_other_sentences(
        interrupted, pairs_file, tmp_path):
    other = tmp_path / "pairs.tsv"
    other.write_text(pairs_file.read_text(encoding="utf-8") + "\nHi.\tStimmt!", encoding="utf-8")
    with pytest.raises(SystemExit, match="pairs.tsv is not the data of that run"):
        run("translate.py", "--data", other, "--out_dir", interrupted, "--resume")


def test_a_checkpoint_of_other_code_is_named(pairs_file):
    os.makedirs("out")
    torch.save({"options": {}, "step": 3}, "out/translate_pairs.tsv.pt.checkpoint")
    with pytest.raises(SystemExit, match="cannot resume from .*: --resume needs the checkpoint"):
        run("translate.py", "--data", pairs_file, "--resume")


def test_an_interrupted_training_is_resumed_bit_for_bit_with_its_own_options(
        interrupted, trained, pairs_file, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "copy")
    values, output = run("translate.py", "--data", pairs_file, "--out_dir", folder, "--resume",
                         "--lr", 5, "--seed", 7)
    assert output.startswith("steps 60, batch_tokens 300, lr 0.03, ")
    assert values["first_step"] == 30
    assert os.listdir(folder) == ["translate_pairs.tsv.pt"]     # no checkpoint
    whole = (trained[0] / "translate_pairs.tsv.pt").read_bytes()
    assert (folder / "translate_pairs.tsv.pt").read_bytes() == whole


def test_two_processes_have_the_gradients_of_one(one_step, pairs_file, monkeypatch):
    one, norm = one_step
    group = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(20_000 + os.getpid() % 10_000), "RANK": "1",
             "OMP_NUM_THREADS": "1"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, os.path.join(HERE, "translate.py"), *ONE_STEP, "--device", "cpu",
               "--data", pairs_file, "--out_dir", "other"]
    other = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    try:
        monkeypatch.setenv("RANK", "0")
        two, norm_of_two = train_one_step(pairs_file, "two")
        output, errors = other.communicate(timeout=60)
        assert other.returncode == 0, errors
        assert output == ""     # only the first process prints
    finally:
        other.kill()
    assert norm_of_two == pytest.approx(norm, rel=1e-4)
    for ours, expected in zip(two["net"].parameters(), one["net"].parameters()):
        assert_close(ours.grad, expected.grad)


def test_lines_of_standard_input_are_translated_in_order(monkeypatch):
    content = "\ufeffDas Pferd jagt die alte Maus.\r\n\r\nDen  Vogel weckt der Hund.".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    _, output = run("translate.py", "--data", "toy", "--text", "-")
    assert output == "The horse chases the old mouse.\n\nThe dog wakes the bird.\n"


def test_every_text_that_is_translated_gets_its_own_heatmap(toy_model):
    texts = ["Der Hund jagt mich.", "x" * 99, "Hunde!"]
    args = argparse.Namespace(text=texts, beam=1, plot=True, out_dir="out")
    assert not translate.translate_texts(*toy_model, "toy", args)
    assert set(os.listdir("out")) == {"translate_toy_1.png", "translate_toy_3.png"}


EVERYDAY = {
    "Wie geht es dir?": "How are you doing?",
    "Ich habe Hunger.": "I'm hungry.",
    "Ich liebe dich.": "I love you.",
    "Wo ist der Bahnhof?": "Where's the station?",
    "Das Buch liegt auf dem Tisch.": "The book is on the table.",
    "ICH WEISS NICHT, WAS ICH SAGEN SOLL.": "I don't know what to say.",
    "Kannst du mir helfen?": "Can you help me?",
    "Es tut mir leid.": "I'm sorry.",
    "wie spaet ist es": "What time is it?",
    "Ich habe gestern einen Brief geschrieben.": "I wrote a letter yesterday.",
    "Das ist mir egal.": "I don't care.",
    "Ich freue mich auf das Wochenende.": "I'm looking forward to the weekend.",
    "Gestern hat mir mein Vater ein Buch gegeben.": "Yesterday my father gave me a book.",
    "Wenn es morgen regnet, bleiben wir zu Hause.": "If it rains tomorrow, we'll stay at home.",
    "Zwei Hunde laufen durch den Schnee.": "Two dogs run through the snow.",
}


@pytest.fixture(scope="module")
def everyday_model():
    path = os.path.join(HERE, "assets", "translate_tatoeba.pt")
    model, tokenizer, _ = translate.load_model(path, "cpu")
    return model, tokenizer


def test_everyday_sentences_come_out_right(everyday_model):
    assert translate.translate(*everyday_model, list(EVERYDAY), 5) == list(EVERYDAY.values())


def test_the_mistakes_in_the_readme_are_those_of_the_model(everyday_model):
    sentences = ["Ich wohne in Köln.", "Den Mann beißt der Hund."]
    translations = translate.translate(*everyday_model, sentences, 5)
    assert translations == ["I live in coles.", "The man bites the dog."]


def test_the_heads_attend_to_what_the_caption_in_the_readme_says(everyday_model, monkeypatch):
    drawn = []
    monkeypatch.setattr("translate.plot_attention", lambda *args, **_: drawn.extend(args))
    german = "Gestern hat mir mein Vater ein Buch gegeben."
    translate.plot_cross_attention(*everyday_model, german, 5, "out/x")
    weights, source, written, _ = drawn
    attended = {}
    for t, token in enumerate(written):
        attended[token] = [source[i] for i in weights[:, t].argmax(dim=-1)]
    assert attended["_gave"] == ["_gegeben"] * 4
    assert attended["_me"][3] == "_mir"
    assert attended["_yesterday"][3] == "_gestern"
    assert attended["_a"][0] == "_buch"


def test_positions_and_tokens_use_mostly_different_directions(everyday_model):
    model, _ = everyday_model
    positions = model.position_embedding.weight[:20]
    tokens = model.token_embedding.weight[3:]
    _, _, directions = torch.linalg.svd(positions - positions.mean(dim=0))
    kept = []
    for x in (positions, tokens):
        x = x - x.mean(dim=0)
        projected = x @ directions[:10].T
        kept.append((projected.square().sum() / x.square().sum()).item())
    assert kept == pytest.approx([0.81, 0.03], abs=0.01)


# What people type: new names, random numbers, and common words.
NEW_NAMES = ("Anja Bastian Carolin Detlef Elif Falko Gundula Henrike Ingmar Jannik Kordula "
             "Leonhard Mareike Norbert Quirin Roswitha Svenja Thorben Wiebke Zoran").split()
OTHER_NAMES = ["Jürgen", "Björn", "Günther", "Käthe Schäfer", "Jörg Müller", "Ayşe Yılmaz",
               "Anna-Lena", "Zoë", "Łukasz", "Thomas Großmann", "Peter Bäcker", "Miguel",
               "Raphaël", "Sören", "Özlem", "Lothar Matthäus", "Bärbel", "Hans-Peter",
               "Frau Krüger", "Herr Nguyen"]
NAME_TEMPLATES = ["Ich heiße {}.", "Kennst du {}?", "{} kommt morgen zu uns."]
NUMBER_TEMPLATES = ["Das Haus hat {} Zimmer.", "Er hat {} Bücher gelesen.",
                    "In der Stadt leben {} Menschen.", "Ich habe {} Euro bezahlt.",
                    "Der Zug Nummer {} fährt um acht.", "Sie wohnt in der Bergstraße {}."]
PRICE_TEMPLATES = ["Das kostet {} Euro.", "Der Preis beträgt {} Euro."]
SINGLE_WORDS = {
    "Hund": "dog", "Haus": "house", "Wasser": "water", "Buch": "book", "Apfel": "apple",
    "Schule": "school", "Auto": "car", "Freund": "friend", "Stadt": "city town", "Tür": "door",
    "Brot": "bread", "Arzt": "doctor", "Fenster": "window", "Zeit": "time", "Katze": "cat",
    "Bruder": "brother", "Kaffee": "coffee", "Tisch": "table", "Morgen": "morning tomorrow",
    "schlafen": "sleep sleeping", "essen": "eat eating food", "gehen": "go going",
    "lesen": "read reading", "schwimmen": "swim swimming", "singen": "sing singing",
    "groß": "big tall large",
    "klein": "small little short", "schön": "beautiful nice pretty", "müde": "tired",
    "rot": "red", "kalt": "cold", "schnell": "fast quick quickly", "glücklich": "happy",
    "danke": "thanks thank", "bitte": "please", "hallo": "hello hi", "ja": "yes", "nein": "no",
    "gestern": "yesterday", "heute": "today"}


def names_and_numbers():
    """180 (sentence, what has to stay): a third each with names, other names and numbers."""
    pairs = []
    for names in (NEW_NAMES, OTHER_NAMES):
        for template in NAME_TEMPLATES:
            for name in names:
                kept = name.removeprefix("Frau ").removeprefix("Herr ")
                pairs.append((template.format(name), kept))
    rng = random.Random(0)
    for i in range(48):
        n_digits = 3 + i % 3
        digits = str(rng.randrange(10 ** (n_digits - 1), 10 ** n_digits))
        pairs.append((NUMBER_TEMPLATES[i % 6].format(digits), digits))
    for i in range(12):
        price = f"{rng.randrange(1, 200)},{rng.randrange(10, 100)}"
        pairs.append((PRICE_TEMPLATES[i % 2].format(price), price))
    return pairs


def test_most_new_names_and_numbers_are_kept_and_single_words_translated(everyday_model):
    torch.set_num_threads(2)    # much to compute
    pairs = names_and_numbers()
    sentences = [sentence for sentence, _ in pairs] + list(SINGLE_WORDS)
    translations = translate.translate(*everyday_model, sentences, beam=5)
    kept = []
    for (_, to_keep), translation in zip(pairs, translations):
        # a price may have a point, and a number a comma after the thousands
        kept.append(re.sub("[.,]", "", to_keep) in re.sub("[.,]", "", translation))
    n_right = 0
    for right, translation in zip(SINGLE_WORDS.values(), translations[180:]):
        words = re.findall(r"\w+", translation.lower())
        n_right += len(words) <= 2 and not set(right.split()).isdisjoint(words)
    # as the README says
    assert sum(kept[:60]) == pytest.approx(47, abs=2)
    assert sum(kept[60:120]) == pytest.approx(44, abs=2)
    assert sum(kept[120:]) == pytest.approx(60, abs=2)
    assert n_right == pytest.approx(40, abs=2)


# --------------------------------------------------------------------------------------------------
# saliency.py: the Jacobian and the attacks
def small_network():
    """In float64. Its BatchNorms are not the identity."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        saliency.BasicBlock(4, 8, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)).double()
    for _ in range(5):
        images, _ = small_images(8)
        model(images)
    return model


def small_images(n):
    """With black, white and other pixels, and right classes."""
    images = torch.rand(n, 3, 8, 8, dtype=torch.float64)
    images[:, :, :2] = 0
    images[:, :, 6:] = 1
    return images, torch.arange(n) % 6


def test_each_image_gets_the_gradient_that_it_has_alone():
    model = small_network().eval()
    x, target = small_images(4)
    with torch.no_grad():  # calculate_jacobian switches gradients on
        gradient, logits = saliency.calculate_jacobian(model, x, target)
    for i in range(4):
        image = x[i:i + 1].clone().requires_grad_()
        F.cross_entropy(model(image), target[i:i + 1]).backward()
        assert_close(gradient[i], image.grad[0], rtol=0, atol=1e-12)
    assert_close(logits, model(x))
    assert not logits.requires_grad


@pytest.mark.parametrize("target, expected", [(0, [-2, 1, 1]), (1, [1, -1, 0])])
def test_a_confident_prediction_has_the_right_gradient(target, expected):
    image = torch.tensor([25.0, 0, 0]).view(1, 3, 1, 1)  # the model returns it as logits
    model = nn.Flatten().eval()
    gradient, _ = saliency.calculate_jacobian(model, image, torch.tensor([target]))
    size = math.exp(-25) if target == 0 else 1  # the target's probability is 1 - 3e-11, or nearly 0
    assert_close(gradient.flatten(), size * torch.tensor(expected).float(), atol=1e-10 * size,
                 rtol=1e-4)


@pytest.mark.parametrize("scale", [1, 1e-30])  # the square of 1e-30 is 0 in float32
def test_saliency_is_the_norm_over_colors_rescaled_to_0_and_1(scale):
    gradient = torch.randn(2, 3, 4, 5)
    maps = saliency.saliency_map(gradient * scale)
    for i in range(2):
        norm = gradient[i].square().sum(dim=0).sqrt()
        expected = (norm - norm.min()) / (norm.max() - norm.min())
        assert_close(maps[i], expected)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_the_saliency_of_a_constant_gradient_is_0(value):
    assert (saliency.saliency_map(torch.full((1, 3, 4, 5), value)) == 0).all()


def test_every_change_is_what_its_name_says():
    gradient = torch.randn(2, 3, 4, 5)
    changes = saliency.four_changes(gradient, eps=0.1)
    random = changes.pop("random signs")
    assert_close(random.abs(), torch.full_like(random, 0.1))
    assert -0.05 < random.mean() < 0.05
    assert_close(changes, {
        "sign step": 0.1 * gradient.sign(),
        "scaled Jacobian": torch.stack([0.1 * g / g.abs().max() for g in gradient]),
        "unscaled Jacobian": gradient,
    })


def test_an_adversarial_example_is_the_sign_step_within_0_and_1():
    model = small_network().eval()
    x, target = small_images(3)
    gradient, _ = saliency.calculate_jacobian(model, x, target)
    adversarial = saliency.adversarial_example(model, x, target, 0.1)
    assert_close(adversarial, (x + 0.1 * gradient.sign()).clamp(0, 1))


# --------------------------------------------------------------------------------------------------
# saliency.py: images and measures
SALIENCY_WEIGHTS = os.path.join(HERE, "assets", "saliency.pt")
OFFSETS = torch.arange(32) - 15.5  # of the pixels from the middle
U = OFFSETS.view(1, 32).expand(32, 32)  # the coordinates of upright shapes, times 9
V = OFFSETS.view(32, 1).expand(32, 32)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A run with the shipped weights: the script's globals and what it printed."""
    torch.set_num_threads(2)  # no other test computes as much
    folder = tmp_path_factory.mktemp("loaded")
    return run("saliency.py", "--load", SALIENCY_WEIGHTS, "--out_dir", folder)


def test_an_upright_image_shows_the_shape_of_its_label():
    _, labels, masks = saliency.make_images(40, upright=True)
    for label, mask in zip(labels, masks):
        shape = getattr(saliency, saliency.CLASSES[label])
        assert torch.equal(mask, shape(U / 9, V / 9))


def test_in_each_color_the_shape_is_brighter_than_the_whole_background_or_darker():
    images, _, masks = saliency.make_images(40)
    for i in range(40):
        for channel in images[i]:
            inside = channel[masks[i]]
            outside = channel[~masks[i]]
            assert inside.min() > outside.max() or inside.max() < outside.min()


def test_pointing_allows_for_two_pixels():
    masks = torch.zeros(4, 9, 9, dtype=torch.bool)
    masks[:, 4, 4] = True
    maps = torch.rand(4, 9, 9) * 0.9
    maps[0, 4, 4] = 1  # on the shape
    maps[1, 6, 2] = 1  # two pixels away, diagonally
    maps[2, 4, 7] = 1  # three pixels away
    maps[3, 1, 4] = 1
    assert saliency.pointing_of(maps, masks) == 0.5


def test_saliency_is_larger_in_the_gaps_of_a_shape_than_on_it(loaded):
    images, labels, masks = saliency.make_images(100, upright=True)
    gradient, _ = saliency.calculate_jacobian(loaded[0]["model"], images, labels)
    maps = saliency.saliency_map(gradient)
    distance = torch.hypot(U, V)
    gaps = {"triangle": distance < 2, "screw": (distance < 5) & (V.abs() < 1.5)}
    for name, gap in gaps.items():
        of_class = labels == saliency.CLASSES.index(name)
        on_shape = maps[of_class][masks[of_class]].mean()
        assert maps[of_class][:, gap].mean() > 1.2 * on_shape


def test_the_most_salient_pixel_is_on_the_shape_in_a_third_of_the_images(loaded):
    values, _ = loaded
    best = saliency.saliency_map(values["gradient"]).flatten(1).argmax(dim=1)
    on_shape = values["masks"].flatten(1)[torch.arange(1000), best]
    assert on_shape.float().mean().item() == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("name, expected", [("gradient", 6), ("gradient_untrained", 11)])
def test_trained_maps_point_nearer_to_the_middle_than_untrained_ones(name, expected, loaded):
    best = saliency.saliency_map(loaded[0][name]).flatten(1).argmax(dim=1)
    distances = torch.hypot(best // 32 - 15.5, best % 32 - 15.5)
    assert distances.mean().item() == pytest.approx(expected, abs=0.5)


def test_large_gradients_of_untrained_networks_are_most_frequent_at_the_shape():
    images, labels, masks = saliency.make_images(100)
    at_shape = F.max_pool2d(masks.float(), 3, stride=1, padding=1) == 1  # or one pixel away
    ratios = torch.zeros(12, 2)
    for i in range(12):
        network = saliency.small_resnet(4).eval()
        gradient, _ = saliency.calculate_jacobian(network, images, labels)
        size = gradient.norm(dim=1)
        size = size / size.mean(dim=(1, 2), keepdim=True)
        large = (size > size.quantile(0.99)).float()
        ratios[i, 0] = size[at_shape].mean() / size[~at_shape].mean()
        ratios[i, 1] = large[at_shape].mean() / large[~at_shape].mean()
    mean_ratio, large_ratio = ratios.mean(dim=0)
    assert 1.05 < mean_ratio < 1.2
    assert 1.5 < large_ratio < 2.5


@torch.no_grad()
def test_strong_random_signs_and_the_opposite_ones_both_increase_the_loss(loaded):
    values, output = loaded
    row = re.search("16/255.*", output)[0].split()
    assert row[4] < row[2]      # random signs, scaled Jacobian
    x = values["images"][:200]
    change = 16 / 255 * torch.randn_like(x).sign()
    losses = []
    for changed in (x, x + change, x - change):
        logits = values["model"](changed.clamp(0, 1)).double()
        losses.append(F.cross_entropy(logits, values["labels"][:200], reduction="none"))
    before, after, opposite = losses
    assert (opposite > before)[after > before].float().mean() > 0.9


@torch.no_grad()
def test_the_unscaled_jacobian_grows_with_the_doubt_of_the_network(loaded):
    values, _ = loaded
    logits = values["model"](values["images"][:100]).double()
    loss = F.cross_entropy(logits, values["labels"][:100], reduction="none")
    doubt = -torch.expm1(-loss)  # 1 - p(target)
    largest = values["gradient"][:100].abs().amax(dim=(1, 2, 3))
    logarithms = torch.stack([doubt.log(), largest.log()])
    assert torch.corrcoef(logarithms)[0, 1] > 0.9


# --------------------------------------------------------------------------------------------------
# saliency.py: the script, and photographs
def test_the_three_adversarial_examples_fool_the_network(loaded):
    values, _ = loaded
    names = ("images", "labels", "adversarial")
    x, y, attacked = [values[name][values["chosen"]] for name in names]
    assert saliency.is_correct(values["model"], x, y).tolist() == [True] * 3
    assert saliency.is_correct(values["model"], attacked, y).tolist() == [False] * 3


def test_a_circle_is_at_the_most_salient_pixel_and_the_title_of_a_wrong_prediction_is_red(figures):
    class Model(nn.Module):  # looks at one pixel, in bright images at another
        def forward(self, x):
            is_bright = x.mean(dim=(2, 3)) > 0.5
            return torch.where(is_bright, x[:, :, 7, 1], x[:, :, 2, 5])

    x = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 3, 9, 9)
    saliency.plot_samples(Model().eval(), x, torch.tensor([0, 1]), "rgb", io.BytesIO())
    axes = figures[0].axes
    circles = [axis.collections[0].get_offsets().tolist() for axis in axes]
    assert circles == [[[5, 2]], [[1, 7]]] * 2
    titles = [(axis.get_title(), axis.title.get_color()) for axis in axes[:2]]
    assert titles == [("r 0.333", "black"), ("r 0.333", "red")]


def test_training_starts_near_ln_4_and_saves_its_weights(tmp_path):
    values, output = run("saliency.py", "--steps", 10, "--n_images", 100, "--out_dir", tmp_path)
    loss, uniform = re.findall(r"\d\.\d+", output.splitlines()[0])
    assert uniform == f"{math.log(4):.4f}"
    assert float(loss) == pytest.approx(math.log(4), abs=0.3)
    assert values["loss"] < float(loss)
    path = tmp_path / "saliency.pt"
    assert f"--load {path}" in output
    assert_close(torch.load(path, weights_only=True), values["model"].state_dict())
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_resnet18_has_the_keys_and_with_equal_weights_the_outputs_of_torchvision():
    """The numbers are those of torchvision 0.28, for colors normalized as its weights ask.

    The checksum is that of `name shape` for all of its resnet18().state_dict().
    """
    model = saliency.ResNet18().eval()
    state = model.state_dict()
    lines = [f"{name} {tuple(value.shape)}" for name, value in state.items()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == \
        "84fb10d9c6905a1cbb020b284537dc97c4f4ec55fb2a780a41152a23a2dd0e9d"
    for name, value in state.items():
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


def test_an_image_is_read_by_its_content_not_its_name(tmp_path):
    path = tmp_path / "image.png"
    matplotlib.image.PIL.Image.new("RGB", (30, 30), (204, 102, 51)).save(path, "JPEG")
    expected = torch.tensor([0.8, 0.4, 0.2]).view(3, 1, 1).expand(3, 224, 224)
    assert torch.allclose(saliency.read_image(path), expected, atol=0.02)


def save_gray(path, pixels):
    pixels = (255 * pixels).round().byte().numpy()
    matplotlib.image.PIL.Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("wide", [True, False])
def test_an_image_is_resized_to_256_and_its_center_is_kept(wide, tmp_path):
    pixels = torch.linspace(0, 1, 400).expand(300, 400)  # dark left, bright right
    # 400 columns become 341, of which columns 58 to 281 are kept
    expected = (torch.arange(58, 282) + 0.5).expand(3, 224, 224) / 341
    if not wide:
        pixels = pixels.T
        expected = expected.mT
    path = tmp_path / "image.png"
    save_gray(path, pixels)
    assert torch.allclose(saliency.read_image(path), expected, atol=0.01)


def test_an_image_that_cannot_be_read_is_named_in_one_sentence(tmp_path):
    transparent = tmp_path / "transparent.png"
    matplotlib.image.PIL.Image.new("RGBA", (30, 30)).save(transparent)
    deep = tmp_path / "deep.tiff"
    matplotlib.image.PIL.Image.new("I;16", (30, 30), 13107).save(deep)
    for path in (transparent, deep, tmp_path / "missing.png"):
        with pytest.raises(SystemExit, match=f"cannot read {path}: no such file, or not 8-bit"):
            saliency.read_image(path)


def test_photographs_have_the_labels_of_imagenet_and_your_own_the_predicted_class(
        tmp_path, monkeypatch):
    def network():
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))

    save_gray("a.png", torch.rand(30, 30))
    (tmp_path / "imagenet_classes.txt").write_text("name\n" * 1000)
    model = network()
    model[2].bias.data[7] = 1000  # always predicts class 7
    torch.save(model.state_dict(), os.path.basename(saliency.WEIGHTS_URL))
    monkeypatch.setattr("saliency.ResNet18", network)
    monkeypatch.setattr("saliency.download", lambda url, *_: os.path.basename(url))
    monkeypatch.setattr("saliency.PHOTOGRAPHS", [("a.png", 7, ""), ("a.png", 8, "")])
    for photos, accuracy in [(["a.png"], "1.0000"), ([], "0.5000")]:
        args = argparse.Namespace(photos=photos, load=None, eps=0.01, device="cpu", out_dir="out")
        assert saliency.photographs(args).startswith(f"accuracy={accuracy} ")
    assert len(os.listdir("out")) == 2


# --------------------------------------------------------------------------------------------------
# All scripts, and the README
SCRIPTS = ["attention.py", "parity.py", "counting.py", "translate.py", "saliency.py"]
NO_DEVICE = "mps" if torch.cuda.is_available() else "cuda"


@pytest.mark.parametrize("script, options, message", [
    ("attention.py", "--steps -5", "argument --steps: invalid int from 1 to inf value: '-5'"),
    ("attention.py", f"--seed {2 ** 63}", "--seed: invalid int from 0 to 9223372036854775807"),
    ("attention.py", f"--device {NO_DEVICE}", "no such device"),
    ("counting.py", "--sequence=0,1,3", "expected 1 to 10 digits from 0 to 2"),
    ("counting.py", f"--sequence={'0,' * 11}", "expected 1 to 10 digits"),
    ("translate.py", "--dropout 1.5", "argument --dropout: invalid float from 0 to 1 value: '1.5'"),
    ("translate.py", "--n_heads 3", "--n_heads 3 does not divide --d_model 64"),
    ("translate.py", "--plot", "--load and --plot need --test, --line or --text"),
    ("translate.py", "--resume", "translate_toy.pt.checkpoint (FileNotFoundError): --resume needs"),
    ("translate.py", "--data missing.tsv", "cannot read missing.tsv"),
    ("translate.py", "--data missing.tsv --test", "no shipped weights for missing.tsv: use --load"),
    ("saliency.py", "--photos missing.jpg", "cannot read missing.jpg"),
])
def test_a_likely_mistake_gives_one_clear_sentence_and_leaves_no_file(
        script, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--out_dir", tmp_path, *options.split())
    assert message in capsys.readouterr().err + str(stop.value.code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_cannot_be_made_is_named_before_the_training(script, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(SystemExit, match=f"^cannot write to {file}: .*$"):
        run(script, "--out_dir", file)
    assert file.read_text() == "kept"


@pytest.mark.parametrize("script, options, file", [
    ("parity.py", [], "parity_curve.png"),
    ("counting.py", [], "counting_sigmoid.png"),
    ("translate.py", [*TINY, "--data", "pairs.tsv"], "translate_pairs.tsv.pt"),
    ("saliency.py", ["--n_images", 100], "saliency.pt")])
def test_a_loss_that_is_not_finite_ends_the_training_and_replaces_no_file(
        script, options, file, pairs_file, tmp_path):
    shutil.copy(pairs_file, ".")
    path = tmp_path / "out" / file
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(SystemExit, match=r"^step \d+: the loss is (nan|inf), try a smaller --lr$"):
        run(script, *options, "--lr", "1e30")
    assert path.read_text() == "old"


@pytest.mark.parametrize("load", [
    lambda path: translate.load_model(str(path), "cpu"),
    lambda path: saliency.load_weights(saliency.small_resnet(4), path)])
def test_a_file_with_other_weights_is_named_in_one_sentence(load, tmp_path):
    path = tmp_path / "other.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(SystemExit, match=f"cannot load {path}.*: --load needs"):
        load(path)


def readme_outputs():
    """The commands in the code blocks of README.md, {options: lines of output}."""
    outputs = {}
    for block in re.findall(r"```\w*\n(.*?)```", read("README.md"), re.S):
        for command in block.split("$ python ")[1:]:
            options, *lines = command.splitlines()
            outputs[options] = [line for line in lines if line.strip(" .")]
    return outputs


def words_and_numbers(line):
    """The text of a line, and its decimal numbers but for the seconds."""
    line = re.sub(r"seconds=\S+|/\d+:", "", line)  # "step 0/650:": tests train fewer steps
    parts = re.split(r"(-?\d+\.\d+)", " ".join(line.split()))
    return parts[::2], [float(number) for number in parts[1::2]]


def assert_printed(lines, output):
    """All lines occur in the output. Other versions of torch may round differently."""
    printed = [words_and_numbers(line) for line in output.splitlines()]
    for line in lines:
        words, numbers = words_and_numbers(line)
        similar = [n for w, n in printed if w == words]
        assert pytest.approx(numbers, rel=0.01, abs=0.005) in similar, line


@pytest.mark.parametrize("script", SCRIPTS[:3])  # the others take longer
def test_the_readme_shows_how_the_training_starts(script):
    _, output = run(script, "--steps", 1)
    lines = readme_outputs()[script]
    n_before = [line[:7] for line in lines].index("step 0/")
    assert_printed(lines[:n_before + 1], output)


def test_the_readme_shows_the_results_of_the_shipped_weights_of_saliency(loaded):
    lines = readme_outputs()["saliency.py --load assets/saliency.pt"]
    assert_printed(lines, loaded[1])


TRANSLATIONS = [options for options in readme_outputs() if re.search("--(line|text)", options)]


@pytest.mark.parametrize("options", TRANSLATIONS)
def test_the_readme_shows_what_the_shipped_weights_translate(options):
    _, output = run(*shlex.split(options))
    assert_printed(readme_outputs()[options], output)


def test_the_options_in_the_readme_exist():
    commands = re.findall(r"(\w+\.py) +(-[^`\n|]*)", read("README.md"))
    assert len(commands) > 5
    for script, options in commands:
        source = read(script) + inspect.getsource(attention_script.parse_args)
        for name in re.findall(r"--(\w+)", options):
            assert re.search(rf'"(--)?{name}"', source), (script, name)


def test_the_files_that_the_readme_links_to_exist():
    for path in re.findall(r"\]\((?!https?:|#)([^)]+)\)", read("README.md")):
        assert os.path.exists(os.path.join(HERE, path)), path


def test_the_names_in_the_readme_exist_in_the_scripts():
    source = "".join(read(script) for script in SCRIPTS)
    names = re.findall(r"`(\w+)`", read("README.md"))
    assert len(names) > 10
    for name in names:
        assert re.search(rf"\b{name}\b", source), name


def test_the_attention_function_of_the_readme_is_that_of_attention_py():
    code = re.search(r"```python\n(.*?)```", read("README.md"), re.S)[1]
    names = {"math": math}
    exec(code, names)
    inputs = queries_keys_values()
    assert_close(names["attention"](*inputs), attention(*inputs))
