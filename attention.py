"""
Scaled dot-product attention: what it computes, and what it costs.

Attention is a differentiable dictionary lookup. A Python dictionary finds the key that is equal to
the query and returns its value. Attention computes how similar the query is to every key, turns
the similarities into weights that sum to 1, and returns the weighted mean of all values. The
weights change smoothly with the query and the keys, so both can be learned by gradient descent.
For one query and three key-value pairs:

    query = 2 0 2 0                              keys = 1 0 1 0    values = 10  0
                                                        0 1 0 1              0 10
                                                        1 1 0 0              5  5
    scores  = query . key  =  4.00 0.00 2.00     similarity: 2*1 + 0*0 + 2*1 + 0*0 = 4, and so on
    scores / sqrt(4)       =  2.00 0.00 1.00     4 is the width d_k of queries and keys
    weights = softmax      =  0.67 0.09 0.24     exp / sum of exp: positive, sum to 1
    output                 =  7.88 2.12          0.67 * (10, 0) + 0.09 * (0, 10) + 0.24 * (5, 5)

$ python attention.py               # this example for three queries, then a dictionary that learns
$ python attention.py --benchmark   # time and memory, compared with torch's own function

Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, https://arxiv.org/abs/1706.03762
"""

import argparse
import hashlib
import math
import os
import statistics
import sys
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn


# --------------------------------------------------------------------------------------------------
# Attention with loops
#
# The example above in plain Python.
def attention_loops(queries, keys, values):
    """Lists of T_q queries, T_k keys and T_k values -> T_q weighted means of the values."""
    outputs = []
    for query in queries:
        weights = []
        for key in keys:
            score = sum(a * b for a, b in zip(query, key))                 # the dot product
            weights.append(math.exp(score / math.sqrt(len(key))))
        total = sum(weights)
        weights = [weight / total for weight in weights]
        output = [0.0] * len(values[0])
        for weight, value in zip(weights, values):
            for i in range(len(value)):
                output[i] += weight * value[i]
        outputs.append(output)
    return outputs


# --------------------------------------------------------------------------------------------------
# Attention with matrices
#
# Write the queries as the rows of a matrix q, and likewise the keys k and the values v. Then the
# loops become three lines of mathematics:
#
#     scores = q @ k.T / sqrt(d_k)         every query times every key
#     weights = softmax(scores)            each row becomes positive and sums to 1
#     output = weights @ v                 each row is a weighted mean of the values
#
# Why divide by sqrt(d_k)? The dot product of two random vectors is a sum of d_k products. If the
# numbers in them are independent with mean 0 and variance 1, each product has variance 1, so the
# sum has variance d_k. Dividing by sqrt(d_k) brings the variance back to 1. Without the division,
# wide vectors have large scores, and softmax gives most of the weight to one key: with 12 random
# keys of width 64, the largest weight is 0.86 on average (with the division 0.29). If one key has
# most of the weight, a small change in the scores hardly changes the weights, so little gradient
# passes through them.
#
# Where do q, k and v come from? From learned linear maps. In self-attention, all three are maps of
# the same sequence x: each token (for example, a word) gets a query (what it looks for), a key
# (what it can be found by) and a value (what it passes on). In cross-attention, q is a map of x,
# and k and v are maps of a second sequence, called memory. In translation, x is the target sentence
# so far and memory the encoded source sentence.
#
# A mask says which keys a query may attend to. Padding, which makes sentences equally long, must
# get no weight, because it is not part of the sentence. A model that predicts the next token must
# not attend to later tokens, because they contain the answer (a causal mask).
#
# A sigmoid can replace softmax. Under softmax the keys compete: one weight can increase only if
# others decrease. A sigmoid turns each score into a weight between 0 and 1 on its own, so they do
# not have to sum to 1. counting.py shows what this is good for.
def attention(q, k, v, mask=None, activation="softmax"):
    """Scaled dot-product attention. Returns output (..., T_q, d_v) and weights (..., T_q, T_k).

    q is (..., T_q, d_k), k (..., T_k, d_k), v (..., T_k, d_v); leading dimensions broadcast.
    `mask` is boolean, broadcasts to (..., T_q, T_k), and True means that the query *may* attend to
    the key, as in `F.scaled_dot_product_attention`. (`nn.MultiheadAttention` does the opposite.)
    A query that may attend to nothing gets zeros.
    """
    assert activation in ("softmax", "sigmoid"), activation
    assert mask is None or mask.dtype == torch.bool, "mask must be boolean, True = may attend"

    # Divide q and not the product, which could overflow in half precision.
    q = q / math.sqrt(q.size(-1))
    scores = q @ k.transpose(-2, -1)                                       # (..., T_q, T_k)
    if mask is not None:
        # Softmax turns the lowest possible number into weight 0. With -inf, a row where everything
        # is masked would become NaN: softmax first subtracts the largest score of the row, and
        # -inf - (-inf) is NaN. The masked_fill below would remove it, but torch's anomaly detection
        # would report it.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)

    if activation == "softmax":
        weights = scores.softmax(dim=-1)                                   # (..., T_q, T_k)
    else:
        weights = scores.sigmoid()
    if mask is not None:
        # Where everything is masked, all scores are equal, so softmax gives all keys the same
        # weight. Make it 0.
        weights = weights.masked_fill(~mask, 0.0)

    output = weights @ v                                                   # (..., T_q, d_v)
    return output, weights


# --------------------------------------------------------------------------------------------------
# A dictionary that learns how to compare
#
# Each query is one of the keys, rotated by an unknown rotation, plus noise, so the largest dot
# product is rarely that of the right key. Two linear maps learn to undo the rotation. Every batch
# has new random keys, so the maps have to learn how to compare. The values are one-hot vectors, so
# the output is equal to the weights: a probability for each key.
class DifferentiableDictionary(nn.Module):
    """Attention with learned maps of query (..., T_q, d_model) and key (..., T_k, d_model)."""

    def __init__(self, d_model):
        super().__init__()
        self.w_q = nn.Linear(d_model, d_model, bias=False)
        self.w_k = nn.Linear(d_model, d_model, bias=False)

    def forward(self, query, key, value):
        return attention(self.w_q(query), self.w_k(key), value)


def make_lookups(batch_size, n_keys, rotation, noise):
    """Random queries and keys, both (B, n_keys, d_model), and each query's key, (B, n_keys)."""
    d_model = len(rotation)
    key = torch.randn(batch_size, n_keys, d_model, device=rotation.device)
    # sorting random numbers gives a random order
    target = torch.rand(batch_size, n_keys, device=rotation.device).argsort(dim=1)
    rows = torch.arange(batch_size, device=rotation.device).unsqueeze(1)   # (B, 1)
    query = key[rows, target] @ rotation                                   # (B, n_keys, d_model)
    query = query + noise * torch.randn_like(query)
    return query, key, target


# --------------------------------------------------------------------------------------------------
# Shared with the other scripts, together with `attention`
def plot_attention(weights, x_labels, y_labels, path, titles=None, x_name="key", y_name="query",
                   marks=None):
    """Save heatmaps of attention weights (T_q, T_k) or (n_panels, T_q, T_k) on one color scale.

    `x_labels` are the keys. `y_labels` are the queries, one list or a list for each panel. Cells
    where `marks`, a boolean tensor like `weights`, is True get a dot.
    """
    T_q, T_k = weights.shape[-2:]
    panels = weights.detach().float().cpu().reshape(-1, T_q, T_k)          # (n_panels, T_q, T_k)
    n_panels = len(panels)
    if not isinstance(y_labels[0], list):
        y_labels = [y_labels] * n_panels
    if titles is None:
        titles = [f"head {h + 1}" for h in range(n_panels)]

    # in inches: a cell is 0.25 wide and high, a character of a label about 0.07
    longest_x = max(len(str(label)) for label in x_labels)
    longest_y = max(len(str(label)) for labels in y_labels for label in labels)
    width = 0.25 * max(T_k, 5) + 0.07 * longest_y + 0.6
    height = 0.25 * T_q + 0.07 * longest_x + 0.7
    columns = min(2, n_panels)
    rows = math.ceil(n_panels / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width + 0.8, rows * height),
                                squeeze=False, layout="constrained")
    for axis in axes.flat[n_panels:]:
        axis.set_axis_off()

    largest = panels.max().item()
    rotation = 90 if longest_x > 2 else 0
    for i in range(n_panels):
        axis = axes.flat[i]
        image = axis.imshow(panels[i].tolist(), vmin=0.0, vmax=largest)
        axis.set_title(titles[i], fontsize=9)
        axis.set_xlabel(x_name, fontsize=9)
        axis.set_ylabel(y_name, fontsize=9)
        # parse_math=False: do not typeset $...$ in labels as math
        axis.set_xticks(range(T_k), x_labels, rotation=rotation, fontsize=8, parse_math=False)
        axis.set_yticks(range(T_q), y_labels[i], fontsize=8, parse_math=False)
        if marks is not None:
            cells = marks.reshape(n_panels, T_q, T_k)[i].nonzero()         # (n, 2): query, key
            x = cells[:, 1].tolist()
            y = cells[:, 0].tolist()
            axis.scatter(x, y, s=12, color="white", edgecolors="black")
    figure.colorbar(image, ax=axes, label="attention weight")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


def parse_args(parser):
    """Add the options that all scripts share, parse, seed torch, create the output folder."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="where to compute",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out_dir", default="out", help="folder for figures and weights")
    args = parser.parse_args()
    # a character that the console does not have must not end a training run
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if args.device != "cpu" and not getattr(torch, args.device).is_available():
        sys.exit(f"--device {args.device}: no such device on this machine, try --device cpu")
    torch.manual_seed(args.seed)
    os.makedirs(args.out_dir, exist_ok=True)
    return args


def positive(kind):
    """An argparse type: positive(int) and positive(float) accept positive finite numbers only."""
    def _parse(text):
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError
        return number
    _parse.__name__ = f"positive {kind.__name__}"  # argparse: "invalid positive int value: '0'"
    return _parse


def download(url, path, sha256):
    """Download `url` to `path` unless it is there, and check the file's SHA-256 in either case."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            sys.exit(f"{path} is not the file from {url} (its SHA-256 differs): delete it, and the "
                     "next run downloads it again")
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    print(f"downloading {url}")
    try:
        torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        sys.exit(f"cannot download {url} ({error}): try again, or save the file as {path} yourself")


# --------------------------------------------------------------------------------------------------
# Appendix (skip it on a first reading): how time and memory grow with the sequence length T
#
# The formula keeps all T x T weights for the backward pass. F.scaled_dot_product_attention computes
# them block by block, keeps q, k, v, the output and one number for each query, and computes the
# weights again in the backward pass. (One compiled function does all this: a fused kernel.)
def explicit(q, k, v):
    """The output of `attention` alone, which is what the fused kernel returns."""
    output, _ = attention(q, k, v)
    return output


def measure_time(function, q, k, v):
    """Milliseconds for forward and backward pass, the median of 5 runs."""
    runs = []
    for _ in range(6):
        start = time.perf_counter()
        function(q, k, v).sum().backward()
        # GPU calls return before the work is done, so wait
        getattr(torch, q.device.type).synchronize()
        runs.append(1e3 * (time.perf_counter() - start))
    return statistics.median(runs[1:])  # the first run is a warm-up


def measure_memory(function, q, k, v):
    """MiB that autograd keeps for the backward pass, without q, k and v themselves."""
    n_bytes = {}  # for each address, because a tensor and its transpose share one

    def _pack(tensor):
        storage = tensor.untyped_storage()
        n_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(_pack, lambda tensor: tensor):
        function(q, k, v)
    for tensor in (q, k, v):
        n_bytes.pop(tensor.data_ptr(), None)
    return sum(n_bytes.values()) / 2 ** 20


def benchmark(device, lengths):
    """Print a table; return times (ms) and memory (MiB), lists in dicts {"explicit", "fused"}."""
    print("batch 1, 4 heads of width 64, float32")
    print("ms: forward and backward, median of 5; MiB: kept for the backward pass")
    print("     T |       explicit            |       fused")
    functions = {"explicit": explicit, "fused": F.scaled_dot_product_attention}
    times = {"explicit": [], "fused": []}
    memory = {"explicit": [], "fused": []}
    for T in lengths:
        q = torch.randn(1, 4, T, 64, device=device, requires_grad=True)    # (B, H, T, d_k)
        k = torch.randn(1, 4, T, 64, device=device, requires_grad=True)
        v = torch.randn(1, 4, T, 64, device=device, requires_grad=True)
        print(f"{T:6}", end="")
        for name, function in functions.items():
            ms = measure_time(function, q, k, v)
            mib = measure_memory(function, q, k, v)
            print(f" | {ms:9.2f} ms {mib:7.2f} MiB", end="")
            times[name].append(ms)
            memory[name].append(mib)
        print(flush=True)
    return times, memory


def plot_benchmark(lengths, times, memory, path):
    """Plot time and memory over T on logarithmic axes, where each power of T is a straight line."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, values in zip(axes, (times, memory)):
        axis.loglog(lengths, values["explicit"], "o-", label="explicit")
        axis.loglog(lengths, values["fused"], "s-", label="fused")
        # A guide line for T^2, above the longer half of the lengths, where T^2 dominates.
        half = len(lengths) // 2
        long = lengths[half:]
        ratios = [y / T ** 2 for y, T in zip(values["explicit"][half:], long)]
        guide = [2 * max(ratios) * T ** 2 for T in long]
        axis.loglog(long, guide, "--", color="gray", label=r"$\propto T^2$")
    # A guide line for T, below the memory of the fused kernel.
    ratios = [y / T for y, T in zip(memory["fused"], lengths)]
    guide = [min(ratios) / 2 * T for T in lengths]
    axes[1].loglog(lengths, guide, ":", color="gray", label=r"$\propto T$")
    for axis, title in zip(axes, ["forward and backward: ms", "kept for the backward pass: MiB"]):
        axis.set(title=title, xlabel="sequence length T", xticks=lengths, xticklabels=lengths)
        axis.minorticks_off()
        axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


if __name__ == "__main__":
    start = time.perf_counter()

    # options
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n_keys", type=positive(int), default=12,
                        help="entries in each dictionary")
    parser.add_argument("--d_model", type=positive(int), default=32,
                        help="width of queries and keys")
    parser.add_argument("--noise", type=float, default=0.1,
                        help="standard deviation of the noise")
    parser.add_argument("--steps", type=positive(int), default=400, help="training steps")
    parser.add_argument("--batch_size", type=positive(int), default=64,
                        help="dictionaries in each batch")
    parser.add_argument("--lr", type=positive(float), default=0.01, help="learning rate")
    parser.add_argument("--benchmark", action="store_true",
                        help="measure time and memory of attention instead")
    args = parse_args(parser)

    if args.benchmark:
        lengths = [64, 128, 256, 512, 1024, 2048, 4096]
        times, memory = benchmark(args.device, lengths)
        path = os.path.join(args.out_dir, "attention_benchmark.png")
        plot_benchmark(lengths, times, memory, path)
        speedup = times["explicit"][-1] / times["fused"][-1]
        memory_ratio = memory["explicit"][-1] / memory["fused"][-1]
        seconds = time.perf_counter() - start
        print(f"result: speedup={speedup:.2f} memory_ratio={memory_ratio:.1f} "
              f"seconds={seconds:.1f}")
        sys.exit()

    # the example of the docstring, for three queries at once
    torch.set_printoptions(precision=2, sci_mode=False)
    query = torch.tensor([[2.0, 0.0, 2.0, 0.0],
                          [0.0, 0.0, 0.0, 0.0],  # all scores equal: it gets the plain mean
                          [0.0, 4.0, 0.0, 2.0]])
    key = torch.tensor([[1.0, 0.0, 1.0, 0.0],
                        [0.0, 1.0, 0.0, 1.0],
                        [1.0, 1.0, 0.0, 0.0]])
    value = torch.tensor([[10.0, 0.0],
                          [0.0, 10.0],
                          [5.0, 5.0]])
    print("scores / sqrt(d_k) = query @ key.T / sqrt(4):")
    print(query @ key.T / math.sqrt(4))
    output, weights = attention(query, key, value)
    print("weights = softmax of each row:")
    print(weights)
    print("output = weights @ value:")
    print(output)
    loops = attention_loops(query.tolist(), key.tolist(), value.tolist())
    print("the loops give the same output:", torch.allclose(torch.tensor(loops), output))
    causal = torch.ones(3, 3, dtype=torch.bool).tril()  # query i may attend to keys 0 ... i
    output, weights = attention(query, key, value, mask=causal)
    print("weights with a causal mask:")
    print(weights)
    print()

    # data: an unknown rotation, perhaps mirrored (QR makes one from random numbers), one-hot values
    rotation, _ = torch.linalg.qr(torch.randn(args.d_model, args.d_model))
    rotation = rotation.to(args.device)                                    # (d_model, d_model)
    value = torch.eye(args.n_keys, device=args.device)                     # (n_keys, n_keys)

    # model and optimizer
    model = DifferentiableDictionary(args.d_model).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    # 1,000 dictionaries to test with, and the weights in the first of them before training
    test_query, test_key, test_target = make_lookups(1000, args.n_keys, rotation, args.noise)
    with torch.no_grad():
        _, weights_before = model(test_query[:1], test_key[:1], value)     # (1, n_keys, n_keys)

    # training loop
    for step in range(args.steps):
        # get a batch
        query, key, target = make_lookups(args.batch_size, args.n_keys, rotation, args.noise)

        # forward. Adding 1e-9 keeps the log finite.
        output, _ = model(query, key, value)                               # (B, n_keys, n_keys)
        log_probability = (output + 1e-9).log()
        loss = F.nll_loss(log_probability.flatten(0, 1), target.flatten())

        # backward and update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log. The untrained maps give the right key no advantage, so the first loss is near
        # ln(n_keys), usually above it, sometimes below by chance.
        if step == 0:
            print(f"step 0/{args.steps}: loss {loss:.4f}, "
                  f"uniform prediction ln {args.n_keys} = {math.log(args.n_keys):.4f}")
        elif step % 100 == 0:
            print(f"step {step}/{args.steps}: loss {loss:.4f}")

    # evaluation
    with torch.no_grad():
        output, weights = model(test_query, test_key, value)               # (1000, n_keys, n_keys)
    accuracy = (output.argmax(dim=-1) == test_target).float().mean().item()

    # figures
    path = os.path.join(args.out_dir, "attention_dictionary.png")
    plot_attention(torch.cat([weights_before, weights[:1]]),
                   x_labels=range(args.n_keys),
                   y_labels=[f"key {i}" for i in test_target[0].tolist()],
                   path=path, titles=["before training", "after training"],
                   y_name="query made from")

    n_params = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - start
    print(f"result: accuracy={accuracy:.4f} params={n_params} seconds={seconds:.1f}")
