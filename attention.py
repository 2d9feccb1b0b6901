"""
Scaled dot-product attention: what it computes, and how it learns to look things up.

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

$ python attention.py    # this example with three queries, then a dictionary that learns

Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, https://arxiv.org/abs/1706.03762
"""

import argparse
import hashlib
import http.client
import math
import os
import signal
import socket
import sys
import tempfile
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
# Stack the queries as the rows of a matrix q, and likewise the keys k and the values v. Then the
# loops become three lines of math:
#
#     scores = q @ k.T / sqrt(d_k)         every query times every key
#     weights = softmax(scores)            each row becomes positive and sums to 1
#     output = weights @ v                 each row is a weighted mean of the values
#
# Why divide by sqrt(d_k)? The dot product of two random vectors is a sum of d_k products. If the
# numbers in them are independent with mean 0 and variance 1, each product has variance 1, so the
# sum has variance d_k. Dividing by sqrt(d_k) brings the variance back to 1. Without the division,
# wide vectors have large scores, and softmax saturates: it gives nearly all the weight to one key.
# With 12 random keys of width 64, the largest weight is 0.85 on average (0.29 with the division).
# If one key has nearly all the weight, a small change in the scores hardly changes the weights, so
# almost no gradient gets through.
#
# Where do q, k and v come from? From learned linear maps. In self-attention, all three are maps of
# the same sequence x: each token (for example, a word) gets a query (what it looks for), a key
# (what it can be found by) and a value (what it passes on). In cross-attention, q is a map of x,
# and k and v are maps of a second sequence, called memory. In translation, x is the target sentence
# so far and memory the encoded source sentence.
#
# A mask says which keys a query may attend to. The sentences of a batch are padded to the same
# length, and the padding must get no weight, because it is not part of the sentence. A model that
# predicts the next token must not attend to later tokens, because they contain the answer. A mask
# that hides them is called causal.
#
# A sigmoid, 1 / (1 + exp(-score)), can replace softmax. Under softmax the keys compete: one weight
# can increase only if others decrease. A sigmoid turns each score into a weight between 0 and 1 on
# its own, so the weights need not sum to 1. counting.py shows when this helps.
def attention(q, k, v, mask=None, activation="softmax"):
    """Scaled dot-product attention. Returns output (..., T_q, d_v) and weights (..., T_q, T_k).

    q is (..., T_q, d_k), k (..., T_k, d_k), v (..., T_k, d_v). "..." stands for any dimensions,
    such as batch and heads; they broadcast. `mask` is boolean, broadcasts to (..., T_q, T_k), and
    True means that the query *may* attend to the key, as in `F.scaled_dot_product_attention`.
    (`nn.MultiheadAttention` does the opposite.) A query that may attend to nothing gets zeros.

    `F.scaled_dot_product_attention` gives the softmax output and need not store all weights. For 4
    heads and 4,096 tokens these take 4 x 4,096 x 4,096 x 4 bytes = 256 MiB. But it cannot return
    them, and the heatmaps need them.
    """
    assert activation in ("softmax", "sigmoid"), activation
    assert mask is None or mask.dtype == torch.bool, "mask must be boolean, True = may attend"

    # Divide q rather than the scores: undivided scores could overflow in half precision.
    q = q / math.sqrt(q.size(-1))
    scores = q @ k.transpose(-2, -1)                                       # (..., T_q, T_k)
    if mask is not None:
        # The lowest finite number and not -inf: softmax subtracts the largest score of each row, so
        # that exp cannot overflow, and in a fully masked row -inf - (-inf) would be NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)

    if activation == "softmax":
        weights = scores.softmax(dim=-1)                                   # (..., T_q, T_k)
    else:
        weights = scores.sigmoid()
    if mask is not None:
        # In a fully masked row softmax gives every key the same weight. Set it to 0.
        weights = weights.masked_fill(~mask, 0.0)

    output = weights @ v                                                   # (..., T_q, d_v)
    return output, weights


# --------------------------------------------------------------------------------------------------
# A dictionary that learns how to compare
#
# Each query is one of the keys, turned by an unknown rotation or reflection, plus noise, so the
# right key rarely has the largest dot product. Two linear maps learn to undo it. Every batch has
# new random keys, so they cannot be memorized, and the maps have to learn how to compare. (Only the
# product W_q.T @ W_k matters, because a score is query @ W_q.T @ W_k @ key.T. It has to become a
# multiple of the inverse, which turns a query back into its key, and a large multiple makes the
# weights sharp.) The values are one-hot vectors, so the output is equal to the weights: a
# probability for each key.
class DifferentiableDictionary(nn.Module):
    """Attention with learned maps of query (..., T_q, d_model) and key (..., T_k, d_model)."""

    def __init__(self, d_model):
        super().__init__()
        self.w_q = nn.Linear(d_model, d_model, bias=False)
        self.w_k = nn.Linear(d_model, d_model, bias=False)

    def forward(self, query, key, value):
        return attention(self.w_q(query), self.w_k(key), value)


def make_lookups(batch_size, n_keys, rotation, noise):
    """Random queries and keys, (B, n_keys, d_model), and the index of each query's key."""
    d_model = len(rotation)
    key = torch.randn(batch_size, n_keys, d_model, device=rotation.device)
    # sorting random numbers gives a random order
    target = torch.rand(batch_size, n_keys, device=rotation.device).argsort(dim=1)
    rows = torch.arange(batch_size, device=rotation.device).unsqueeze(1)   # (B, 1)
    query = key[rows, target] @ rotation                                   # (B, n_keys, d_model)
    query = query + noise * torch.randn_like(query)
    return query, key, target


# --------------------------------------------------------------------------------------------------
# Shared with the other scripts, together with `attention` (can be skipped)
def plot_attention(weights, x_labels, y_labels, path, titles=None, x_name="key", y_name="query",
                   marks=None):
    """Save one heatmap for each panel of weights (n_panels, T_q, T_k), all on one color scale.

    `x_labels` are the keys, `y_labels` the queries. Every heatmap gets dots where `marks`, a
    boolean tensor (T_q, T_k), is True.
    """
    n_panels, T_q, T_k = weights.shape
    if titles is None:
        titles = [f"head {h + 1}" for h in range(n_panels)]

    # in inches: a cell is 0.25 wide and high, a character of a label about 0.07
    longest_x = max(len(str(label)) for label in x_labels)
    longest_y = max(len(str(label)) for label in y_labels)
    width = 0.25 * max(T_k, 5) + 0.07 * longest_y + 0.6
    height = 0.25 * T_q + 0.07 * longest_x + 0.7
    columns = min(2, n_panels)
    rows = math.ceil(n_panels / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width + 0.8, rows * height),
                                squeeze=False, layout="constrained")
    for axis in axes.flat[n_panels:]:
        axis.set_axis_off()

    largest = weights.max().item()
    rotation = 90 if longest_x > 2 else 0
    for axis, title, panel in zip(axes.flat, titles, weights.tolist()):
        image = axis.imshow(panel, vmin=0.0, vmax=largest)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x_name, fontsize=9)
        axis.set_ylabel(y_name, fontsize=9)
        # parse_math=False: do not typeset $...$ in labels as math
        axis.set_xticks(range(T_k), x_labels, rotation=rotation, fontsize=8, parse_math=False)
        axis.set_yticks(range(T_q), y_labels, fontsize=8, parse_math=False)
        if marks is not None:
            queries, keys = marks.nonzero(as_tuple=True)
            axis.scatter(keys.tolist(), queries.tolist(), s=12, color="white", edgecolors="black")
    figure.colorbar(image, ax=axes, label="attention weight")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


def parse_args(parser):
    """Add the options that all scripts share, parse the command line, seed torch.

    The parser's description is the docstring of the script. `--help` prints its first paragraph,
    and its examples at the end.
    """
    lines = parser.description.splitlines()
    parser.epilog = "\n".join(line for line in lines if line.startswith("$ "))
    parser.description = parser.description.split("\n\n")[0].strip()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter      # keeps the line breaks
    parser.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0,
                        help="random seed (default: 0)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"],
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="device to run on (default: cuda if available)")
    parser.add_argument("--out_dir", default="out",
                        help="folder for output files (default: out)")
    args = parser.parse_args()

    # Flush after every line, even when writing to a file. Escape what the console cannot print.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    # On Ctrl-C or a closed pipe (| head), exit without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):                                         # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if args.device != "cpu" and not getattr(torch, args.device).is_available():
        sys.exit(f"--device {args.device}: no such device on this machine, try --device cpu")
    torch.manual_seed(args.seed)
    return args


def number(kind, least, most=math.inf):
    """An argparse type for finite numbers from `least` to `most`. `kind` is int or float."""
    def _parse(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:                # NaN fails, too
            raise ValueError
        return value
    _parse.__name__ = f"{kind.__name__} from {least} to {most}"            # for argparse's message
    return _parse


def make_folder(path):
    """Create a folder if needed. Exit if it is not writable."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        sys.exit(f"cannot write to {path}: {error}")


def download(url, folder, sha256):
    """Download `url` into `folder` unless it is there, check its SHA-256, and return its path."""
    path = os.path.join(folder, os.path.basename(url))
    if os.path.exists(path):
        with open(path, "rb") as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            sys.exit(f"{path} is not the file from {url} (its SHA-256 differs): delete it, and the "
                     "next run downloads it again")
        return path
    make_folder(folder)
    print(f"downloading {url}")
    socket.setdefaulttimeout(30)        # seconds without a response
    try:
        torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        sys.exit(f"cannot download {url} ({error}): try again, or save the file as {path} yourself")
    return path


if __name__ == "__main__":
    start = time.perf_counter()

    # options
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=number(int, 1), default=400,
                        help="training steps (default: 400)")
    args = parse_args(parser)
    make_folder(args.out_dir)

    # the example in the docstring, for three queries at once
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

    # data: an unknown rotation or reflection (QR makes one from random numbers), one-hot values
    d_model = 32        # width of queries and keys
    n_keys = 12         # entries in each dictionary
    noise = 0.1         # standard deviation of the noise
    rotation, _ = torch.linalg.qr(torch.randn(d_model, d_model))
    rotation = rotation.to(args.device)                                    # (d_model, d_model)
    value = torch.eye(n_keys, device=args.device)                          # (n_keys, n_keys)

    # model and optimizer
    model = DifferentiableDictionary(d_model).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    # 1,000 test dictionaries, and the attention weights in the first one before training
    test_query, test_key, test_target = make_lookups(1000, n_keys, rotation, noise)
    with torch.no_grad():
        _, weights_before = model(test_query[:1], test_key[:1], value)     # (1, n_keys, n_keys)

    # training loop
    for step in range(args.steps):
        # get a batch
        query, key, target = make_lookups(64, n_keys, rotation, noise)

        # forward. nll_loss is the mean negative log probability of the targets. Adding 1e-9 keeps
        # the log finite.
        output, _ = model(query, key, value)                               # (B, n_keys, n_keys)
        log_probability = (output + 1e-9).log()
        loss = F.nll_loss(log_probability.flatten(0, 1), target.flatten())

        # backward and update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log. Untrained, the scores are small and favor no key, so the loss starts near ln 12.
        if step == 0:
            print(f"step 0/{args.steps}: loss {loss:.4f}, "
                  f"uniform prediction ln {n_keys} = {math.log(n_keys):.4f}")
        elif step % 100 == 0:
            print(f"step {step}/{args.steps}: loss {loss:.4f}")

    # evaluation
    with torch.no_grad():
        output, weights = model(test_query, test_key, value)               # (1000, n_keys, n_keys)
    accuracy = (output.argmax(dim=-1) == test_target).float().mean().item()

    # figures
    path = os.path.join(args.out_dir, "attention_dictionary.png")
    plot_attention(torch.cat([weights_before, weights[:1]]),
                   x_labels=range(n_keys),
                   y_labels=[f"key {i}" for i in test_target[0].tolist()],
                   path=path, titles=["before training", "after training"],
                   y_name="query made from")

    n_params = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - start
    print(f"result: accuracy={accuracy:.4f} params={n_params} seconds={seconds:.1f}")
