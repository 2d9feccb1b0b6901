"""What does attention compute, and what does it cost?
Attention is a dictionary that can be differentiated. A Python dictionary compares a query with every key, finds the
one that is equal, and returns its value. Attention compares a query with every key too, but it asks *how* similar they
are, turns the answers into weights, and returns the weighted mean of all values. Because the weights change smoothly
with the queries and the keys, both can be learned.

By hand, on three tokens, which is what the elements of a sequence are called. Each token brings a query (what am I
looking for?), a key (what am I?) and a value (what do I have to say?), one row each; queries and keys have d_k = 4
numbers, values have d_v = 2:

    query               key                 value
    2  0  2  0          1  0  1  0          10   0
    0  0  0  0          0  1  0  1           0  10
    0  4  0  2          1  1  0  0           5   5

    scores = query @ key.T, row i says how well query i fits each of the three keys
    4.00  0.00  2.00
    0.00  0.00  0.00
    0.00  6.00  4.00

    scores / sqrt(d_k): a sum of d_k products of numbers of size 1 has size sqrt(d_k); now it is 1 again
    2.00  0.00  1.00
    0.00  0.00  0.00
    0.00  3.00  2.00

    weights = softmax of each row, exp(score) / sum of exp(scores): positive, and the row sums to 1
    0.67  0.09  0.24
    0.33  0.33  0.33
    0.04  0.71  0.26

    output = weights @ value, each row a weighted mean of the three values
    7.88  2.12
    5.00  5.00
    1.65  8.35

The first query fits the first key best, so its output is closest to the first value. The second query asks for nothing
in particular and gets the plain mean. `attention` below is these four lines, plus a mask (which keys may a query see?
not the padding, not the future), a sigmoid in place of the softmax for counting.py, and a fast path.

    python attention.py                 the example above, then a dictionary that learns to compare, in a few seconds
    python attention.py --benchmark     time and memory grow like T^2, T being the number of tokens; torch's fused
                                        kernel, one routine that does all four lines piece by piece, saves the memory

You will see the retrieval accuracy go to 1.0 and, in out/attention_dictionary.png, the weights before and after
training: a dim blur turns into one bright cell in every row.

Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1 (https://arxiv.org/abs/1706.03762).
"""

import argparse
import hashlib
import http.client
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
import urllib.request

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# Attention


def attention(q, k, v, mask=None, activation="softmax", need_weights=True):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1); returns `(output, weights)`.

    T_q queries q (..., T_q, d_k), T_k keys k (..., T_k, d_k) and values v (..., T_k, d_v) give an output
    (..., T_q, d_v) and weights (..., T_q, T_k); leading dimensions (batch, heads, ...) broadcast. `mask` is boolean,
    broadcastable to (..., T_q, T_k), and True means *may attend*, as in `F.scaled_dot_product_attention`. Beware: in
    `nn.MultiheadAttention` True means the opposite, and mixing up the two is a common bug in attention code. A query
    that may attend to nothing gets zeros. With `activation="sigmoid"` every key is weighed on its own. Without
    `need_weights` None stands for the weights, and softmax takes the fast path. Raises ValueError if the shapes do not
    fit or the mask is not boolean.
    """
    _check_shapes(q, k, v, mask)
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"activation is 'softmax' or 'sigmoid', not {activation!r}")
    if activation == "softmax" and not need_weights:
        return _fused_attention(q, k, v, mask), None                        # the same numbers, faster
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])               # (..., T_q, T_k)
    if mask is not None:  # the lowest finite number, not -inf: a row of nothing but -inf would be 0 / 0 = NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if activation == "softmax":
        weights = scores.softmax(dim=-1)      # the keys compete: each row sums to 1
    else:
        weights = scores.sigmoid()            # each key is let in or not on its own: a row may sum to anything
    if mask is not None:  # only a query with nothing to attend to still has weight to lose here
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v, (weights if need_weights else None)                 # (..., T_q, d_v), (..., T_q, T_k) or None


def worked_example():
    """The example of the docstring, computed: a text with each step of attention on three tokens."""
    query = torch.tensor([[2., 0, 2, 0], [0, 0, 0, 0], [0, 4, 0, 2]])                     # (3, 4)
    key = torch.tensor([[1., 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]])                       # (3, 4)
    value = torch.tensor([[10., 0], [0, 10], [5, 5]])                                     # (3, 2)
    output, weights = attention(query, key, value)
    scores = query @ key.T                                                                # (3, 3)
    inputs = ["query               key                 value"]
    for rows in zip(query.tolist(), key.tolist(), value.tolist()):
        inputs.append("{:20}{:20}{}".format(*("  ".join(f"{x:{width}.0f}" for x in row)
                                              for width, row in zip((1, 1, 2), rows))))
    steps = ["\n".join(inputs)]
    for title, table in {
            "scores = query @ key.T, row i says how well query i fits each of the three keys": scores,
            "scores / sqrt(d_k): a sum of d_k products of numbers of size 1 has size sqrt(d_k); now it is 1 again":
            scores / math.sqrt(4),
            "weights = softmax of each row, exp(score) / sum of exp(scores): positive, and the row sums to 1": weights,
            "output = weights @ value, each row a weighted mean of the three values": output}.items():
        steps.append("\n".join([title, *("  ".join(f"{x:.2f}" for x in row) for row in table.tolist())]))
    return "\n\n".join(steps)


def _check_shapes(q, k, v, mask):
    """Raise ValueError, with all shapes, unless they fit together."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    expected = ValueError(f"attention takes q (..., T_q, d_k), k (..., T_k, d_k), v (..., T_k, d_v), {shapes}")
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or not q.shape[-1]:
        raise expected
    try:
        full = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2]), q.shape[-2], k.shape[-2])
    except RuntimeError:
        raise expected from None
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask must be boolean (True = may attend), got {mask.dtype}")
        try:
            fits = torch.broadcast_shapes(mask.shape, full) == full
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"a mask {tuple(mask.shape)} does not broadcast to (..., T_q, T_k) = {full}, {shapes}")


def _fused_attention(q, k, v, mask):
    """The same output from torch's fused kernel, which never stores the (T_q, T_k) weights.

    The kernel only does that for four dimensions and, on a CPU, for d_v = d_k; with anything else torch quietly falls
    back to the explicit formula. So other leading dimensions than two are folded into one and unfolded again.
    """
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (t.expand(*batch, *t.shape[-2:]) for t in (q, k, v))
    if mask is not None:
        mask = torch.atleast_2d(mask)                                       # (..., T_q, T_k)
        empty = ~mask.any(dim=-1, keepdim=True)                             # (..., T_q, 1) queries with no key at all
        mask = mask | empty                                                 # let them attend to everything for now
    if len(batch) == 2:
        mask = mask if mask is None else mask.view((1,) * (4 - mask.ndim) + mask.shape)
        output = F.scaled_dot_product_attention(q, k, v, mask)              # (B, H, T_q, d_v)
    else:
        if mask is not None and mask.ndim > 2:
            mask = mask.expand(*batch, *mask.shape[-2:]).flatten(0, -3).unsqueeze(0)         # (1, N, T_q, T_k)
        q, k, v = (t.reshape(1, math.prod(batch), *t.shape[-2:]) for t in (q, k, v))         # (1, N, T, d)
        output = F.scaled_dot_product_attention(q, k, v, mask).view(*batch, q.shape[-2], v.shape[-1])
    return output if mask is None else output.masked_fill(empty, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def plot_attention(weights, x_labels, y_labels, path, titles=None, x_name="key", y_name="query", show=False):
    """Draw weights (T_q, T_k), or (H, T_q, T_k) in H panels with one colour scale, and save the picture to `path`.

    `x_labels` name the keys and `y_labels` the queries: one list for all panels, or a list of H lists, one for each.
    `titles` stand above the panels (default: the heads by number).
    """
    panels = weights.detach().float().cpu().reshape(-1, *weights.shape[-2:])              # (H, T_q, T_k)
    n_panels, n_rows, n_columns = panels.shape
    x_labels, y_labels = (labels if isinstance(labels[0], (list, tuple)) else [labels] * n_panels
                          for labels in (x_labels, y_labels))
    titles = titles or ([f"head {h + 1}" for h in range(n_panels)] if n_panels > 1 else [""])
    across = min(n_panels, 2)
    down = math.ceil(n_panels / across)
    longest_x, longest_y = (max(len(str(label)) for labels in panel_labels for label in labels)
                            for panel_labels in (x_labels, y_labels))
    width = 0.27 * min(max(n_columns, 6), 40) + 0.07 * longest_y + 0.7                    # inches a panel
    height = 0.27 * min(max(n_rows, 4), 40) + 0.07 * longest_x + 0.7
    nth_column, nth_row = (math.ceil(n / 40) for n in (n_columns, n_rows))                  # more labels would overlap
    figure, axes = plt.subplots(down, across, figsize=(across * width + 0.8, down * height + 0.3), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[n_panels:]:
        axis.set_axis_off()
    for axis, panel, title, x, y in zip(axes.flat, panels, titles, x_labels, y_labels):
        image = axis.imshow(panel.tolist(), vmin=0.0, vmax=max(panels.max().item(), 1e-6), cmap="viridis")
        upright = max(len(str(label)) for label in x) <= 2
        # without parse_math=False the text between two dollar signs would be read as a formula
        axis.set_xticks(range(n_columns)[::nth_column], x[::nth_column], rotation=0 if upright else 90, fontsize=8,
                        parse_math=False)
        axis.set_yticks(range(n_rows)[::nth_row], y[::nth_row], fontsize=8, parse_math=False)
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.set_xlabel(x_name, fontsize=9)
        axis.set_ylabel(y_name, fontsize=9)
    figure.colorbar(image, ax=axes, label="attention weight", aspect=20 * down)
    save_figure(figure, path, show)


# ----------------------------------------------------------------------------------------------------------------------
# The lesson: a dictionary that learns to compare
#
# Keys and values are given. Each query is one of the keys, but rotated and with noise added, so that comparing the two
# as they are finds nothing. Only two linear maps are learned, one for queries and one for keys (the projections), and
# they learn to undo the rotation: for any keys, also those never seen, because every batch brings new ones.


class DifferentiableDictionary(nn.Module):
    """query (..., T_q, d_model), key (..., T_k, d_model), value (..., T_k, d_v) -> (output, weights) of `attention`."""

    def __init__(self, d_model):
        super().__init__()
        self.w_q = nn.Linear(d_model, d_model, bias=False)
        self.w_k = nn.Linear(d_model, d_model, bias=False)

    def forward(self, query, key, value):
        return attention(self.w_q(query), self.w_k(key), value)


def make_lookups(batch_size, n_keys, rotation, noise):
    """B random dictionaries: keys (B, n_keys, d_model), as many queries, and the entry each asks for (B, n_keys)."""
    key = torch.randn(batch_size, n_keys, len(rotation), device=rotation.device)           # (B, n_keys, d_model)
    entry = torch.rand(batch_size, n_keys, device=rotation.device).argsort(dim=1)          # (B, n_keys) every key once
    query = key.gather(1, entry.unsqueeze(-1).expand_as(key)) @ rotation                  # (B, n_keys, d_model)
    return key, query + noise * torch.randn_like(query), entry


# ----------------------------------------------------------------------------------------------------------------------
# The price: time and memory as the sequence grows


def benchmark(args):
    """Time and extra memory of the explicit formula and of the fused kernel, forward and backward, T = 64 to 4096."""
    lengths = [64, 128, 256, 512, 1024, 2048, 4096]
    milliseconds, memory = {"explicit": [], "fused": []}, {"explicit": [], "fused": []}
    print("4 heads of width 64, float32: milliseconds forward, milliseconds with backward, MiB beside q, k and v",
          "at the peak" if args.device == "cuda" else "kept for backward")
    print(f"{'T':>6} | {'explicit':^30} | {'fused':^30}".rstrip())
    for T in lengths:
        q, k, v = (torch.randn(1, 4, T, 64, device=args.device, requires_grad=True) for _ in range(3))  # (B, H, T, d)
        runs = {"explicit": [], "fused": []}
        for _ in range(6):                          # in turns, so that a busy moment of the machine hits both alike
            for name in runs:
                runs[name].append(time_attention(q, k, v, need_weights=name == "explicit"))
        cells = []
        for name in runs:
            forward, both = (statistics.median(times) for times in zip(*runs[name][1:]))   # the first run warms up
            memory[name].append(memory_of_attention(q, k, v, need_weights=name == "explicit") / 2 ** 20)
            milliseconds[name].append(1e3 * both)
            cells.append(f"{1e3 * forward:9.2f} {1e3 * both:9.2f} {memory[name][-1]:9.2f}")
        print(f"{T:>6} | {cells[0]:^30} | {cells[1]}", flush=True)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, values, title, label, powers in (
            (axes[0], milliseconds, "time, forward and backward", "milliseconds", [2]),
            (axes[1], memory, "memory beside q, k and v", "MiB", [2, 1])):
        for name, marker in (("explicit", "o"), ("fused", "s")):
            axis.loglog(lengths, values[name], marker=marker, label=name)
        for power in powers:                        # straight lines to compare the slopes with
            top = 2 * values["explicit"][-1] if power == 2 else values["fused"][-1] / 2
            axis.loglog(lengths, [top * (T / lengths[-1]) ** power for T in lengths], "--" if power == 2 else ":",
                        color="grey", label="grows like T^2" if power == 2 else "grows like T")
        axis.set(title=title, xlabel="sequence length T", ylabel=label)
        axis.set_xticks(lengths, lengths)
        axis.minorticks_off()
        axis.legend()
    save_figure(figure, os.path.join(args.out_dir, "attention_benchmark.png"), args.show)
    return {"speedup": milliseconds["explicit"][-1] / milliseconds["fused"][-1],
            "memory_ratio": memory["explicit"][-1] / memory["fused"][-1]}


def time_attention(q, k, v, need_weights):
    """Seconds for the forward pass, and for forward and backward together."""
    wait = getattr(torch, q.device.type).synchronize                     # a GPU answers before it has finished
    wait()
    start = time.perf_counter()
    output, _ = attention(q, k, v, need_weights=need_weights)            # (B, H, T, d)
    wait()
    forward = time.perf_counter() - start
    output.sum().backward()
    wait()
    return forward, time.perf_counter() - start


def memory_of_attention(q, k, v, need_weights):
    """Bytes that one call needs beside q, k and v: the peak on a CUDA device, what is kept for backward elsewhere."""
    if q.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(q, k, v, need_weights=need_weights)[0].sum().backward()
        return torch.cuda.max_memory_allocated() - before
    kept = {}

    def pack(tensor):
        """Called with every tensor that autograd keeps; two tensors may share one storage, which counts once."""
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(q, k, v, need_weights=need_weights)
    return sum(size for pointer, size in kept.items() if pointer not in {t.data_ptr() for t in (q, k, v)})


# ----------------------------------------------------------------------------------------------------------------------
# What every script needs around its idea


def fail(message):
    """End the program with one line on standard error and status 2: the input is wrong, not the code."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


def number(kind, low, high):
    """A type for argparse: an int or a float from `low` to `high` (NaN is neither above nor below anything)."""
    def parse(text):
        """The number that `text` spells, or argparse's error."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"takes {word} from {low} to {high}, not {text!r}")
        return value
    return parse


def make_parser(doc):
    """An argument parser with the options that all scripts share; the first paragraph of `doc` is its description."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail                         # one line, without argparse's usage text
    common = parser.add_argument_group("options of every script")
    common.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="seed of all random numbers")
    common.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    common.add_argument("--out_dir", default="out", help="folder for pictures and weights")
    common.add_argument("--show", action="store_true", help="also open a window for each picture")
    return parser


def start(parser, argv):
    """Parse the command line, check the device and the output folder, set the seed; returns the arguments."""
    args = parser.parse_args(argv)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(name for name in present if present[name])
    if not present[args.device]:
        fail(f"argument --device: there is no {args.device} device here, try --device auto")
    try:
        os.makedirs(args.out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out_dir).close()
    except OSError as error:
        fail(f"argument --out_dir: cannot write to {args.out_dir!r} ({error.strerror})")
    torch.manual_seed(args.seed)
    args.started = time.perf_counter()
    return args


def progress(total, done=0, unit="step"):
    """Return report(step, name=value, ...), which prints a line with speed and time left, at most every 2 seconds.

    `total` counts all steps, also those that were `done` before.
    """
    began = last = time.perf_counter()

    def report(step, **values):
        """Print the line if it is time, or if this is the last step."""
        nonlocal last
        now = time.perf_counter()
        if now - last < 2 and step < total:
            return
        last, speed = now, (step - done) / (now - began)
        print(f"{unit} {step:>{len(str(total))}}/{total}", *(f"{name} {value:.4f}" for name, value in values.items()),
              f"{speed:.0f} {unit}s/s", f"{(total - step) / speed:.0f} s left", sep="  ", flush=True)
    return report


def print_first_loss(loss, n_classes):
    """Print the loss of an untrained model beside that of one which knows nothing and says so.

    Such a model gives each of n classes the probability 1 / n, and its cross-entropy is -ln(1 / n) = ln n. Random
    weights are sure of something now and then: a loss a little higher (by luck lower) is normal, much higher is a bug.
    """
    print(f"before the first step: loss {loss:.4f} (knowing nothing: ln {n_classes} = {math.log(n_classes):.4f})",
          flush=True)


def check_finite(tensors, step):
    """End with one line if a number in the tensors, a loss or the weights, is infinite or NaN."""
    if not all(torch.isfinite(t).all() for t in tensors):
        fail(f"loss or weights are inf or nan after {step} steps: try a lower --lr")


def save(path, write):
    """Let `write(temporary_path)` write a file and move it to `path`: whoever looks finds the old file or the new."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch reports a full disk as a RuntimeError
        fail(f"cannot write {path} ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_weights(path, **what):
    """Save tensors and plain values by name, for `load`."""
    save(path, lambda temporary: torch.save(what, temporary))


def load(path):
    """What `torch.save` wrote to `path`, onto the CPU: tensors and plain values only, a file that holds code fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"there is no file {path}")
    except Exception:                           # zip, pickle and torch each have their own words for a damaged file
        fail(f"cannot load {path}: it is damaged, or no file of weights")


def download(url, path, sha256):
    """The bytes of the file at `path`, fetched from `url` if it is not there yet; their SHA-256 must be `sha256`."""
    path = pathlib.Path(path)
    source = path if path.exists() else url
    try:
        if source == path:
            content = path.read_bytes()
        else:
            print("fetching", url, flush=True)
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, http.client.HTTPException) as error:   # no network, no such page, a cut connection, no such folder
        fail(f"cannot get {source} ({type(error).__name__}): try again, or put the file at {path} by hand")
    if hashlib.sha256(content).hexdigest() != sha256:
        fail(f"{source} is not the file that is wanted here: its SHA-256 is not {sha256}")
    if source == url:
        save(path, lambda temporary: pathlib.Path(temporary).write_bytes(content))
    return content


def save_figure(figure, path, show=False):
    """Save a matplotlib figure as PNG, print where, and open a window if `show` asks for one."""
    save(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    print("picture:", path)
    if show:
        plt.show()
    plt.close(figure)


def print_result(args, **values):
    """The last line of output, for programs: `result: key=value ...`."""
    values["seconds"] = round(time.perf_counter() - args.started, 1)
    print("result:", *(f"{key}={round(value, 6)}" for key, value in values.items()))


def run(main):
    """Call main(); no traceback for Ctrl-C, which gives one line and status 130, nor for a pipe that is closed."""
    try:
        main()
        sys.stdout.flush()                      # here, where a closed pipe can still be caught
    except KeyboardInterrupt:
        print(f"\n{os.path.basename(sys.argv[0])}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                     # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python complains while it closes it
        sys.exit(141)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """Print the worked example, train the dictionary, draw its weights before and after (or run the benchmark)."""
    parser = make_parser(__doc__)
    parser.add_argument("--n_keys", type=number(int, 2, 64), default=12, help="entries of each dictionary")
    parser.add_argument("--d_model", type=number(int, 1, 1024), default=32, help="width of queries and keys")
    parser.add_argument("--noise", type=number(float, 0, 100), default=0.1, help="spread of the noise on queries")
    parser.add_argument("--steps", type=number(int, 1, 10 ** 6), default=400, help="training steps")
    parser.add_argument("--batch_size", type=number(int, 1, 4096), default=64, help="dictionaries in each step")
    parser.add_argument("--lr", type=number(float, 0, 10), default=0.01, help="learning rate")
    parser.add_argument("--benchmark", action="store_true", help="measure time and memory instead (none of the "
                        "options above matters)")
    args = start(parser, argv)
    if args.benchmark:
        print_result(args, **benchmark(args), params=0)
        return
    print(worked_example(), end="\n\n")

    rotation = torch.linalg.qr(torch.randn(args.d_model, args.d_model))[0].to(args.device)  # (d_model, d_model)
    # Entry i has the value of all zeros but a 1 at place i (one-hot), so the output *is* the weights.
    value = torch.eye(args.n_keys, device=args.device)                   # (n_keys, n_keys)
    model = DifferentiableDictionary(args.d_model).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    def look_up(query, key, entry):
        """Loss and accuracy of the entries that the model finds, and its weights (B, n_keys, n_keys)."""
        found, weights = model(query, key, value)                        # (B, n_keys, n_keys): query, entry
        loss = F.nll_loss(found.clamp_min(1e-9).log().flatten(0, 1), entry.flatten())    # (B * n_keys, n_keys) -> ()
        return loss, (found.argmax(dim=-1) == entry).float().mean().item(), weights

    test_key, test_query, test_entry = make_lookups(1000, args.n_keys, rotation, args.noise)
    with torch.no_grad():
        loss, accuracy, before = look_up(test_query, test_key, test_entry)
    print_first_loss(loss.item(), args.n_keys)
    report = progress(args.steps)
    for step in range(args.steps):
        key, query, entry = make_lookups(args.batch_size, args.n_keys, rotation, args.noise)
        loss, accuracy, _ = look_up(query, key, entry)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        check_finite([loss], step + 1)
        report(step + 1, loss=loss.item(), accuracy=accuracy)
    check_finite(model.parameters(), args.steps)
    with torch.no_grad():
        loss, accuracy, after = look_up(test_query, test_key, test_entry)
    print(f"1,000 fresh dictionaries: loss {loss.item():.4f}, accuracy {accuracy:.4f}")
    wanted = [f"wants {entry + 1}" for entry in test_entry[0].tolist()]
    plot_attention(torch.stack([before[0], after[0]]), list(range(1, args.n_keys + 1)), wanted,
                   os.path.join(args.out_dir, "attention_dictionary.png"), ["before training", "after training"],
                   show=args.show)
    print_result(args, accuracy=accuracy, params=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    run(main)
