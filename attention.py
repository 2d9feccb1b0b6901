"""
Scaled dot-product attention: what it computes, and what it costs.

Attention is a differentiable dictionary lookup. A Python dictionary compares a query with every key, finds the one that
is equal and returns its value. Attention computes how similar the query is to every key, turns the similarities into
weights that sum to 1, and returns the weighted mean of all values. The weights change smoothly with the query and the
keys, so both can be learned by gradient descent. For one query and three key-value pairs:

    query = 2 0 2 0                              keys = 1 0 1 0    values = 10  0
                                                        0 1 0 1              0 10
                                                        1 1 0 0              5  5
    scores  = query . key  =  4.00 0.00 2.00     how similar is the query to each key?
    scores / sqrt(4)       =  2.00 0.00 1.00     4 is the width d_k of queries and keys
    weights = softmax      =  0.67 0.09 0.24     positive, sum to 1 (rounded here)
    output                 =  7.88 2.12          0.67 * (10, 0) + 0.09 * (0, 10) + 0.24 * (5, 5)

$ python attention.py               # run this example for three queries, then train a dictionary (seconds)
$ python attention.py --benchmark   # time and memory of the formula and of torch's fused kernel

Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, https://arxiv.org/abs/1706.03762
"""

import argparse
import math
import os
import statistics
import sys
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn


# ----------------------------------------------------------------------------------------------------------------------
# Attention
def attention(q, k, v, mask=None, activation="softmax", need_weights=True):
    """Scaled dot-product attention. Returns the output (..., T_q, d_v) and the weights (..., T_q, T_k).

    q is (..., T_q, d_k), k (..., T_k, d_k), v (..., T_k, d_v); leading dimensions (batch, ...) broadcast. `mask` is
    boolean, broadcasts to (..., T_q, T_k), and True means *may attend*, as in `F.scaled_dot_product_attention`.
    (`nn.MultiheadAttention` uses the opposite convention.) A query that may attend to nothing gets zeros.
    `activation` is "softmax" or "sigmoid".
    Without `need_weights` the weights are None, and softmax attention runs in torch's fused kernel, which is faster
    and never stores all T_q x T_k weights.
    """
    assert activation in ("softmax", "sigmoid"), activation
    # F.scaled_dot_product_attention would silently add a float mask to the scores
    assert mask is None or mask.dtype == torch.bool, "mask must be boolean, True = may attend"
    if activation == "softmax" and not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask), None
    # A sum of d_k independent unit-variance terms has standard deviation sqrt(d_k); dividing by it restores 1.
    # Without this, softmax saturates for large d_k: one weight near 1, the others near 0, and hardly any gradient.
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                # (..., T_q, T_k)
    if mask is not None:  # a large negative number instead of -inf: softmax over a row of only -inf is 0 / 0 = NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # softmax: the keys compete, each row sums to 1. sigmoid: each key gets its own gate (see counting.py).
    weights = scores.softmax(dim=-1) if activation == "softmax" else scores.sigmoid()
    if mask is not None:  # matters only for rows with everything masked
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v, weights if need_weights else None                   # (..., T_q, d_v), (..., T_q, T_k)


# ----------------------------------------------------------------------------------------------------------------------
# A dictionary that learns how to compare
#
# Each query is one of the keys, rotated by an unknown rotation, plus noise, so the raw dot product of query and key is
# meaningless. Two linear maps, like a Transformer's query and key projections, are trained to undo the rotation. Every
# batch has new random keys, so the model cannot memorize keys: it has to learn how to compare.
class DifferentiableDictionary(nn.Module):
    """Attention with learned projections: query (..., T_q, d_model), key (..., T_k, d_model), value (..., T_k, d_v)."""

    def __init__(self, d_model):
        super().__init__()
        self.w_q = nn.Linear(d_model, d_model, bias=False)
        self.w_k = nn.Linear(d_model, d_model, bias=False)

    def forward(self, query, key, value):
        return attention(self.w_q(query), self.w_k(key), value)


def make_lookups(batch_size, n_keys, rotation, noise):
    """Random keys and queries, (B, n_keys, d_model) each, and the index of each query's key, (B, n_keys)."""
    key = torch.randn(batch_size, n_keys, len(rotation), device=rotation.device)
    target = torch.rand(batch_size, n_keys, device=rotation.device).argsort(dim=1)          # a permutation of the keys
    query = key.gather(1, target.unsqueeze(-1).expand_as(key)) @ rotation
    return query + noise * torch.randn_like(query), key, target


# ----------------------------------------------------------------------------------------------------------------------
# Benchmark: how time and memory grow with the sequence length T
def saved_for_backward(q, k, v, need_weights):
    """Bytes that autograd keeps for the backward pass of `attention`, without q, k and v themselves."""
    storages = {}

    def _pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(_pack, lambda tensor: tensor):
        attention(q, k, v, need_weights=need_weights)
    return sum(size for pointer, size in storages.items() if pointer not in [t.data_ptr() for t in (q, k, v)])


def benchmark(args):
    """Measure the explicit formula and the fused kernel for T = 64 to 4096; print a table and plot it."""
    print("batch 1, 4 heads of width 64, float32; ms: forward and backward, median of 5; MiB: kept for backward")
    print("     T |       explicit            |       fused")
    lengths = [64, 128, 256, 512, 1024, 2048, 4096]
    times, memory = {"explicit": [], "fused": []}, {"explicit": [], "fused": []}
    for T in lengths:
        q, k, v = (torch.randn(1, 4, T, 64, device=args.device, requires_grad=True) for _ in range(3))  # (B, H, T, d_k)
        for name in times:
            runs = []
            for _ in range(6):
                start = time.perf_counter()
                output, _ = attention(q, k, v, need_weights=name == "explicit")
                output.sum().backward()
                getattr(torch, args.device).synchronize()  # GPU calls return before the work is done
                runs.append(1e3 * (time.perf_counter() - start))
            times[name].append(statistics.median(runs[1:]))  # the first run is a warm-up
            memory[name].append(saved_for_backward(q, k, v, name == "explicit") / 2 ** 20)
        print(f"{T:6}", *(f"| {times[name][-1]:9.2f} ms {memory[name][-1]:7.2f} MiB" for name in times), flush=True)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, values, title in zip(axes, (times, memory), ("forward and backward: ms", "kept for backward: MiB")):
        axis.loglog(lengths, values["explicit"], "o-", label="explicit")
        axis.loglog(lengths, values["fused"], "s-", label="fused")
        axis.loglog(lengths, [2 * values["explicit"][-1] * (T / 4096) ** 2 for T in lengths], "--", color="grey",
                    label=r"$\propto T^2$")
        axis.loglog(lengths, [values["fused"][-1] / 2 * T / 4096 for T in lengths], ":", color="grey",
                    label=r"$\propto T$")
        axis.set(title=title, xlabel="sequence length T", xticks=lengths, xticklabels=lengths)
        axis.minorticks_off()
        axis.legend()
    path = os.path.join(args.out_dir, "attention_benchmark.png")
    figure.savefig(path, dpi=100)
    print(f"saved {path}")
    return times["explicit"][-1] / times["fused"][-1], memory["explicit"][-1] / memory["fused"][-1]


# ----------------------------------------------------------------------------------------------------------------------
# Shared with the other scripts, together with `attention`
def plot_attention(weights, x_labels, y_labels, path, titles=None, columns=2, x_name="key", y_name="query"):
    """Save heatmaps of attention weights (T_q, T_k) or (n_panels, T_q, T_k), all on one color scale.

    `x_labels` are the keys, `y_labels` the queries: a list for all panels, or a list of lists, one for each panel.
    """
    panels = weights.detach().float().cpu().reshape(-1, *weights.shape[-2:])                # (n_panels, T_q, T_k)
    n_panels, T_q, T_k = panels.shape
    x_labels = x_labels if isinstance(x_labels[0], list) else [x_labels] * n_panels
    y_labels = y_labels if isinstance(y_labels[0], list) else [y_labels] * n_panels
    titles = titles or [f"head {h + 1}" if n_panels > 1 else "" for h in range(n_panels)]
    columns = min(columns, n_panels)
    rows = math.ceil(n_panels / columns)
    longest_x, longest_y = (max(len(str(x)) for labels in both for x in labels) for both in (x_labels, y_labels))
    size = columns * (0.25 * max(T_k, 5) + 0.07 * longest_y + 0.6) + 0.8, rows * (0.25 * T_q + 0.07 * longest_x + 0.7)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[n_panels:]:
        axis.set_axis_off()
    for axis, panel, title, x, y in zip(axes.flat, panels, titles, x_labels, y_labels):
        image = axis.imshow(panel.tolist(), vmin=0.0, vmax=max(panels.max().item(), 1e-6))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x_name, fontsize=9)
        axis.set_ylabel(y_name, fontsize=9)
        # parse_math=False: do not typeset $...$ in labels as math
        axis.set_xticks(range(T_k), x, rotation=90 if longest_x > 2 else 0, fontsize=8, parse_math=False)
        axis.set_yticks(range(T_q), y, fontsize=8, parse_math=False)
    figure.colorbar(image, ax=axes, label="attention weight")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


def parse_args(parser):
    """Add the options that all scripts share, parse the command line, seed torch and create the output folder."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="where to compute",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out_dir", default="out", help="folder for figures and weights")
    args = parser.parse_args()
    if args.device != "cpu" and not getattr(torch, args.device).is_available():
        sys.exit(f"--device {args.device}: no such device on this machine, try --device cpu")
    torch.manual_seed(args.seed)
    os.makedirs(args.out_dir, exist_ok=True)
    return args


def positive(kind):
    """An argparse type: positive(int) and positive(float) accept positive finite numbers only."""
    def _parse(text):
        if not 0 < kind(text) < math.inf:
            raise ValueError
        return kind(text)
    _parse.__name__ = f"positive {kind.__name__}"  # argparse: "invalid positive int value: '0'"
    return _parse


def download(url, path, sha256):
    """Download `url` to `path` and check its SHA-256, unless the file is already there."""
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    print(f"downloading {url}")
    try:
        torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        sys.exit(f"cannot download {url} ({error}): try again, or save the file as {path} yourself")


if __name__ == "__main__":
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n_keys", type=positive(int), default=12, help="entries in each dictionary")
    parser.add_argument("--d_model", type=positive(int), default=32, help="width of queries and keys")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation of the noise added to queries")
    parser.add_argument("--steps", type=positive(int), default=400, help="training steps")
    parser.add_argument("--batch_size", type=positive(int), default=64, help="dictionaries in each batch")
    parser.add_argument("--lr", type=positive(float), default=0.01, help="learning rate")
    parser.add_argument("--benchmark", action="store_true", help="measure time and memory of attention instead")
    args = parse_args(parser)
    if args.benchmark:
        speedup, memory_ratio = benchmark(args)
        seconds = time.perf_counter() - start
        print(f"result: speedup={speedup:.2f} memory_ratio={memory_ratio:.1f} seconds={seconds:.1f}")
        sys.exit()

    # The worked example, for three queries at once. The second is zero, so all scores tie and it gets the plain mean.
    torch.set_printoptions(precision=2, sci_mode=False)
    query = torch.tensor([[2., 0, 2, 0], [0, 0, 0, 0], [0, 4, 0, 2]])      # (3, 4)
    key = torch.tensor([[1., 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]])        # (3, 4)
    value = torch.tensor([[10., 0], [0, 10], [5, 5]])                      # (3, 2)
    print("scores / sqrt(d_k) = query @ key.T / sqrt(4):", query @ key.T / math.sqrt(4), sep="\n")
    output, weights = attention(query, key, value)
    print("weights = softmax of each row:", weights, "output = weights @ value:", output, sep="\n")
    # A causal mask (no looking ahead): query i may attend to keys 0 ... i.
    output, weights = attention(query, key, value, mask=torch.ones(3, 3, dtype=torch.bool).tril())
    print("weights with a causal mask:", weights, sep="\n", end="\n\n")

    # The dictionary. Values are one-hot, so the output is the weights: the probability of each entry.
    rotation = torch.linalg.qr(torch.randn(args.d_model, args.d_model))[0].to(args.device)   # (d_model, d_model)
    value = torch.eye(args.n_keys, device=args.device)                     # (n_keys, n_keys)
    model = DifferentiableDictionary(args.d_model).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    test_query, test_key, test_target = make_lookups(1000, args.n_keys, rotation, args.noise)
    with torch.no_grad():
        _, weights_before = model(test_query[:1], test_key[:1], value)     # (1, n_keys, n_keys)

    for step in range(args.steps):
        query, key, target = make_lookups(args.batch_size, args.n_keys, rotation, args.noise)
        output, _ = model(query, key, value)                               # (B, n_keys, n_keys)
        loss = F.nll_loss(output.clamp_min(1e-9).log().flatten(0, 1), target.flatten())
        if step == 0:
            print(f"step 0: loss {loss:.4f}, uniform prediction ln {args.n_keys} = {math.log(args.n_keys):.4f}")
        elif step % 100 == 0:
            print(f"step {step}: loss {loss:.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        output, weights = model(test_query, test_key, value)               # (1000, n_keys, n_keys)
    accuracy = (output.argmax(dim=-1) == test_target).float().mean().item()
    plot_attention(torch.cat([weights_before, weights[:1]]), list(range(args.n_keys)),
                   [f"key {target}" for target in test_target[0].tolist()],
                   os.path.join(args.out_dir, "attention_dictionary.png"), ["before training", "after training"],
                   y_name="query made from")
    n_params = sum(p.numel() for p in model.parameters())
    print(f"result: accuracy={accuracy:.4f} params={n_params} seconds={time.perf_counter() - start:.1f}")
