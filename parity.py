"""
Train a Transformer encoder to tell whether a bit string has an odd number of ones (its parity), and
find the smallest classifier that can.

    0 1 1 0 1 0 0 0 0 0  ->  three ones: odd
    0 1 1 0 1 0 0 1 0 0  ->  four ones: even

Parity looks trivial, but it is hard to learn. Flipping any single bit flips the label, so nine bits
say nothing about the label without the tenth. The loss stays at that of a coin flip for about
ninety steps before it falls.

The model has no position embeddings (it is not told where a bit is), and its tokens interact only
through means. So it sees only the fraction of ones, and the 1,024 strings of length 10 are just 11
different inputs. Validation therefore proves little: nearly every validation string is a training
string in another order.

$ python parity.py                # 2 blocks, width 8, 2,426 parameters
$ python parity.py --d_model 16
$ python parity.py --sweep        # how small can it get? 32 parameters pass 0.95

Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762. The main
differences: no positions, no dropout, LayerNorm before attention and MLP instead of after them
(pre-norm), SiLU instead of ReLU.
"""

import argparse
import math
import os
import sys
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from attention import attention, parse_args, positive


# --------------------------------------------------------------------------------------------------
# Model
#
# A token is one element of the sequence, here one bit. The embedding turns it into a vector of
# d_model numbers, one learned vector for 0 and one for 1. The shapes are for B strings of T tokens.
class SelfAttention(nn.Module):
    """One attention head, (B, T, d_model) -> (B, T, d_model) (section 3.2.2 of the paper).

    Query, key and value are linear maps of the same x, so each token attends to all tokens of its
    own string, including itself.
    """

    def __init__(self, d_model, d_key):
        super().__init__()
        self.w_q = nn.Linear(d_model, d_key)
        self.w_k = nn.Linear(d_model, d_key)
        self.w_v = nn.Linear(d_model, d_model)

    def forward(self, x):
        q = self.w_q(x)                                                    # (B, T, d_key)
        k = self.w_k(x)                                                    # (B, T, d_key)
        v = self.w_v(x)                                                    # (B, T, d_model)
        output, _ = attention(q, k, v)
        return output


class MultiHeadSelfAttention(nn.Module):
    """Several heads, mixed by a linear map, (B, T, d_model) -> (B, T, d_model).

    One head gives each token one weighted mean. With several heads a token can look at several
    things at once: one head may attend to the ones, another to the zeros. Here each head returns
    d_model features, in the paper d_model / n_heads.
    """

    def __init__(self, d_model, d_key, n_heads):
        super().__init__()
        self.heads = nn.ModuleList(SelfAttention(d_model, d_key) for _ in range(n_heads))
        self.w_o = nn.Linear(n_heads * d_model, d_model)

    def forward(self, x):
        outputs = [head(x) for head in self.heads]
        return self.w_o(torch.cat(outputs, dim=-1))                        # (B, T, d_model)


# LayerNorm takes the vector of one token, subtracts the mean of its numbers and divides by their
# standard deviation. For example, (1, 3, 5, 7) has mean 4 and standard deviation 2.24 and becomes
# (-1.34, -0.45, 0.45, 1.34). So the next layer gets inputs of one scale, whatever the layers before
# have done. (A learned weight and bias follow for each feature, 1 and 0 at the start.)
#
# A residual connection is the "x +" in x + f(x): a layer adds to its input instead of replacing it.
# So x is not lost in a layer that has learned nothing yet, and the gradient reaches all earlier
# layers through the sum, without passing through f.
class TransformerBlock(nn.Module):
    """Attention, then an MLP, each added to its input, (B, T, d_model) -> (B, T, d_model).

    The tokens of a string exchange information only in attention, which returns weighted means. The
    MLP computes something nonlinear from them, for each token separately.
    """

    def __init__(self, d_model, d_key, n_heads, mlp_factor=4):
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.attn = MultiHeadSelfAttention(d_model, d_key, n_heads)
        self.ln2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, mlp_factor * d_model),
            nn.SiLU(),  # u / (1 + e^-u), a smooth ReLU
            nn.Linear(mlp_factor * d_model, d_model),
        )

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        x = x + self.mlp(self.ln2(x))
        return x                                                           # (B, T, d_model)


# Why the classifier sees only the fraction of ones:
# - Attention treats the tokens as a set: swapping two tokens swaps their outputs and changes
#   nothing else. The rest of a block works on each token separately, and the mean over all tokens
#   at the end is the same after the swap. So only the numbers of ones and zeros can matter.
# - Attention returns weighted means, and the last step is a mean, too. Writing a string n times
#   multiplies both numbers by n and changes no mean. So only the fraction of ones can matter.
# It follows that no model of this kind computes parity for all lengths: a string written twice gets
# the same logits, but its number of ones is always even.
class TransformerClassifier(nn.Module):
    """Tokens (B, T) -> logits (B, n_classes): embedding, blocks, LayerNorm, mean, classifier.

    A logit is a score without bounds; softmax over the logits gives the probability of each class.
    """

    def __init__(self, n_embeds, n_classes, d_model=256, d_key=64, n_heads=4, mlp_factor=4,
                 n_layers=2):
        super().__init__()
        self.token_embedding = nn.Embedding(n_embeds, d_model)
        blocks = [TransformerBlock(d_model, d_key, n_heads, mlp_factor) for _ in range(n_layers)]
        self.transformer_model = nn.Sequential(*blocks)
        self.final_layer_norm = nn.LayerNorm(d_model)
        self.classifier = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.SiLU(),
            nn.Linear(d_model, n_classes),
        )

    def forward(self, tokens):
        x = self.token_embedding(tokens)                                   # (B, T, d_model)
        x = self.transformer_model(x)
        x = self.final_layer_norm(x)
        x = x.mean(dim=1)                                                  # (B, d_model)
        return self.classifier(x)                                          # (B, n_classes)


# --------------------------------------------------------------------------------------------------
# Data
def one_string_per_count(seq_len, device="cpu"):
    """One string for each number of ones c = 0 ... T.

    Returns the strings (T+1, T), their parities (T+1,), and the fraction of the 2^T strings that
    have c ones (T+1,).
    """
    counts = torch.arange(seq_len + 1, device=device)
    positions = torch.arange(seq_len, device=device)
    strings = (positions < counts.unsqueeze(1)).long()                     # c ones, then zeros
    parities = counts % 2
    fractions = []
    for c in range(seq_len + 1):
        fractions.append(math.comb(seq_len, c) / 2 ** seq_len)
    return strings, parities, torch.tensor(fractions, device=device)


# --------------------------------------------------------------------------------------------------
# Evaluation
@torch.no_grad()
def exact_accuracy(model, seq_len):
    """The accuracy on all 2^T strings, computed from one string for each number of ones 0 ... T.

    Also returns which numbers of ones the model gets right (T+1,), and f = logit(odd) - logit(even)
    for each (T+1,). Where f > 0 the answer is "odd".
    """
    device = next(model.parameters()).device
    strings, parities, fractions = one_string_per_count(seq_len, device)
    logits = model(strings)                                                # (T+1, 2)
    f = logits[:, 1] - logits[:, 0]
    correct = (f > 0) == (parities == 1)
    accuracy = fractions[correct].sum().item()
    return accuracy, correct.cpu(), f.cpu()


def plot_curve(losses, accuracies, path):
    """Save the loss on the batch and the accuracy on all strings over the training steps."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    axes[0].plot(losses)
    axes[0].axhline(math.log(2), color="gray", linestyle=":", label="coin flip, ln 2")
    axes[0].set_ylabel("loss on the training strings")
    axes[0].legend()
    axes[1].plot(accuracies, color="C1")
    axes[1].axhline(0.5, color="gray", linestyle=":", label="coin flip")
    axes[1].set_ylabel("accuracy on all strings")
    axes[1].set_xlabel("training step")
    axes[1].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


# --------------------------------------------------------------------------------------------------
# Appendix (skip it on a first reading): how small can it get?
#
# Without a block nothing mixes the tokens before the final mean. After LayerNorm every 0 is the
# same vector z and every 1 the same vector o, and the mean of a string with c ones is z + (c / T)
# (o - z), a point on a straight line. So the classifier is a network with one input, c, and n =
# d_model hidden units:
#
#     f(c) = logit(odd) - logit(even) = k + a_1 SiLU(w_1 c + b_1) + ... + a_n SiLU(w_n c + b_n)
#
# The answer is "odd" where f(c) > 0. To get all strings of length 10 right, f has to change sign 10
# times, between every two neighbors in 0, 1, ..., 10. How often can such a sum change sign? A ReLU
# is a straight line with one kink, so n of them form n + 1 straight pieces, with at most n + 1 sign
# changes. SiLU has a curve instead of the kink: it dips below zero before it rises. Two units that
# bend in nearly the same place can add up to a straight line on either side, with a wave in
# between. So SiLUs can change sign more often than ReLUs:
#
#     width    parameters    sign changes    strings right
#         1            10               0              512
#         2            20               5              968    no more is possible
#         3            32               9            1,023    the best found
#         4            46              10            1,024
#
# The second row is a theorem, proved in assets/proof_20.md: at most 0.945 of all strings are right.
# At width 1, LayerNorm subtracts a number from itself, so all strings look alike. All other
# networks have at least 32 parameters, so 32 is the smallest number that passes 0.95.
#
# The search below finds the networks in NETWORKS: width, number of blocks, and the numbers of ones
# that it may get wrong. With 5 of 10 sign changes, at least three numbers are wrong, because giving
# one up saves at most two changes. 0, 2 and 9 cost least: they stand for only 1 + 45 + 10 strings.
NETWORKS = [
    (2, 0, [0, 2, 9]),
    (3, 0, [10]),
    (4, 0, []),
    (2, 1, []),
]


def hidden_units(x, w, b):
    """SiLU(w x + b) for the inputs x (P,), and a column of ones for k.

    w and b are (n,) and the result is (P, n+1), or (S, n) and (S, P, n+1) for S networks at once.
    """
    x = x.unsqueeze(-1)                                                    # (P, 1)
    w = w.unsqueeze(-2)                                                    # (..., 1, n)
    b = b.unsqueeze(-2)                                                    # (..., 1, n)
    u = w * x + b                                                          # (..., P, n)
    ones = torch.ones_like(u[..., :1])
    return torch.cat([F.silu(u), ones], dim=-1)


def search(x, targets, width, n_starts=1000, n_rounds=10, n_steps=300):
    """Find w, b (n,) and a (n+1,) such that f = hidden_units(x, w, b) @ a is near the targets (P,).

    x (P,) lies in [-1, 1], and the targets are -1 or 1. Only w and b need a search: f is linear
    in a (its last number is k), so the best a is a least squares problem.
    """
    # many random starts
    shape = (n_starts, width)
    bend = 4 * torch.rand(shape, dtype=torch.double) - 2
    direction = 2 * torch.randint(2, shape) - 1                            # -1 or 1
    steepness = 100 ** torch.rand(shape, dtype=torch.double)               # 1 to 100
    w = direction * steepness                                              # (S, n)
    b = -w * bend                                                          # (S, n)
    y = targets.view(1, -1, 1)                                             # (1, P, 1)

    for i in range(n_rounds):
        w.requires_grad_()
        b.requires_grad_()
        optimizer = torch.optim.Adam([w, b], betas=(0.9, 0.9))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=n_steps,
                                                        cycle_momentum=False)
        for _ in range(n_steps):
            # The columns of q are an orthonormal basis of all f that the units can form. So q q^T y
            # is the f that is nearest to y, the least squares solution.
            q, _ = torch.linalg.qr(hidden_units(x, w, b))                  # (S, P, n+1)
            f = q @ (q.transpose(1, 2) @ y)                                # (S, P, 1)
            losses = (f - y).square().sum(dim=(1, 2))                      # (S,)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            scheduler.step()

        # f y is positive where the answer is right. Stop when all are clearly right.
        w = w.detach()
        b = b.detach()
        margins = (f * y).detach().amin(dim=(1, 2))                        # (S,)
        best = margins.argmax()
        if margins[best] > 0.15 or i == n_rounds - 1:
            break

        # Most starts end in poor local minima. Keep ten copies of each of the best tenth, most of
        # them with little noise, some with a lot.
        survivors = losses.argsort()[:n_starts // 10].repeat(10)
        noise = 0.5 * torch.rand(n_starts, 1, dtype=torch.double) ** 2
        w = w[survivors] * (1 + noise * torch.randn_like(w))
        b = b[survivors] * (1 + noise * torch.randn_like(b))

    w = w[best]
    b = b[best]
    units = hidden_units(x, w, b)                                          # (P, n+1)
    a = torch.linalg.lstsq(units, y[0]).solution                           # (n+1, 1)
    return w, b, a.squeeze(1)


# With one block, width 2 is enough, because a block can fold the line of counts at its middle:
# tokens of the majority become +1 and the others -1. With 3 or with 7 ones, the mean of the tokens
# is (7 - 3) / 10 = 0.4, in general |1 - 2c/T|. (With 5 of each there is no majority: ones and zeros
# cancel, and the mean is 0.) So c and T - c fall on the same point. That costs nothing, because for
# even T both are odd or both are even. For T = 10 six points are left, with 5 sign changes, which
# two hidden units can make. This is what depth does here: one fold halves the number of sign
# changes.
#
# The block is set by hand. All vectors are e (1, -1) with some number e. Take 7 zeros and 3 ones:
#
#     embedding    e = 0.003 for a 0, -0.003 for a 1.
#     LayerNorm    e becomes e / sqrt(e^2 + 0.00001); LayerNorm adds the 0.00001 to the variance, so
#                  that it never divides by zero. A large e becomes +1 or -1, but these are so small
#                  that their size matters: 0.003 becomes 0.69.
#     attention    w_q and w_k are 0, so all weights are equal and the mean is 0.4 * 0.69. w_o turns
#                  it into 0.4 * 0.0015 = 0.0006, which is added to every e. This pushes the zeros
#                  away from 0, to 0.0036, and the ones towards 0, to -0.0024.
#     MLP          Its hidden units are SiLU(z) and SiLU(-z) with z = 8 LayerNorm(e), which is large
#                  enough for their sum to be nearly |z|. Without the push the sum is 5.46, with it
#                  5.98 for a 0 and 4.76 for a 1. The MLP adds five times the difference to e, which
#                  becomes 2.6 for a 0 and -3.5 for a 1. With 7 ones and 3 zeros the push is
#                  negative: now the ones have the larger |z| and become 2.6, the zeros -3.5.
#     LayerNorm    2.6 becomes +1, -3.5 becomes -1.
@torch.no_grad()
def folding_model():
    """A model of 58 parameters whose classifier gets the vector |1 - 2c/T| (1, -1)."""
    model = TransformerClassifier(2, 2, d_model=2, d_key=1, n_heads=1, mlp_factor=1, n_layers=1)
    model = model.double()
    block = model.transformer_model[0]
    head = block.attn.heads[0]
    for name, p in block.named_parameters():
        if not name.startswith("ln"):  # everything but the two LayerNorms
            p.zero_()

    direction = torch.tensor([1.0, -1.0], dtype=torch.double)
    model.token_embedding.weight[0] = 0.003 * direction
    model.token_embedding.weight[1] = -0.003 * direction
    normalized = model.final_layer_norm(0.003 * direction)[0]              # 0.69
    head.w_v.weight.copy_(torch.eye(2))
    block.attn.w_o.weight.copy_(torch.eye(2) * 0.0015 / normalized)
    block.mlp[0].weight[0] = 4 * direction                                 # z = 4 e - 4 (-e)
    block.mlp[0].weight[1] = -4 * direction                                # -z
    block.mlp[2].weight[0] = 5
    block.mlp[2].weight[1] = -5
    z = 8 * normalized                                                     # without a push
    size = F.silu(z) + F.silu(-z)                                          # nearly |z|
    block.mlp[2].bias.copy_(-5 * size * direction)
    return model


@torch.no_grad()
def straight_model(width):
    """A model without a block whose classifier gets (2c/T - 1) u, with a constant vector u."""
    model = TransformerClassifier(2, 2, d_model=width, d_key=1, n_heads=1, mlp_factor=1, n_layers=0)
    model = model.double()
    direction = torch.linspace(-1, 1, width, dtype=torch.double)
    model.token_embedding.weight[0] = -direction
    model.token_embedding.weight[1] = direction
    return model


@torch.no_grad()
def token_vectors(model, tokens):
    """The vectors (B, T, d_model) that the model takes the mean of."""
    x = model.token_embedding(tokens)
    x = model.transformer_model(x)
    return model.final_layer_norm(x)


@torch.no_grad()
def classifier_input(model, seq_len):
    """What the classifier gets for 0 ... T ones: x (T+1,) times a vector u (d_model,)."""
    strings, _, _ = one_string_per_count(seq_len)
    means = token_vectors(model, strings).mean(dim=1)                      # (T+1, d_model)
    u = means[-1]                                                          # only ones: x = 1
    return means @ u / (u @ u), u


@torch.no_grad()
def check_on_all_strings(model, seq_len):
    """How many of all 2^T strings the model gets right, and the smallest |f|."""
    bits = [torch.arange(2)] * seq_len
    strings = torch.cartesian_prod(*bits).view(-1, seq_len)                # (2^T, T)
    logits = model(strings)                                                # (2^T, 2)
    right = logits.argmax(dim=1) == strings.sum(dim=1) % 2
    f = logits[:, 1] - logits[:, 0]
    return right.sum().item(), f.abs().min().item()


@torch.no_grad()
def set_classifier(model, u, w, b, a):
    """Write f into the classifier of a model, whose input is x u."""
    first, _, last = model.classifier
    first.weight.copy_(torch.outer(w, u) / (u @ u))     # (w u / |u|^2) . (x u) = w x
    first.bias.copy_(b)
    last.weight[0] = -a[:-1] / 2                                           # logit(even) = -f / 2
    last.weight[1] = a[:-1] / 2                                            # logit(odd) = f / 2
    last.bias[0] = -a[-1] / 2
    last.bias[1] = a[-1] / 2


def find_network(width, n_layers, may_be_wrong, seq_len=10, n_tries=10):
    """Find a float32 model that is right on all strings but those with `may_be_wrong` ones.

    It is right in float64, too. A search that misses is started again, at most `n_tries` times.
    """
    if n_layers == 0:
        model = straight_model(width)
    else:
        model = folding_model()
    x, u = classifier_input(model, seq_len)
    counts = torch.arange(seq_len + 1)
    targets = 2.0 * (counts % 2).double() - 1                              # -1: even, 1: odd
    kept = [c for c in range(seq_len + 1) if c not in may_be_wrong]
    goal = sum(math.comb(seq_len, c) for c in kept)
    for _ in range(n_tries):
        w, b, a = search(x[kept], targets[kept], width)
        set_classifier(model, u, w, b, a)
        n_float32, _ = check_on_all_strings(model.float(), seq_len)
        n_float64, _ = check_on_all_strings(model.double(), seq_len)
        if n_float32 >= goal and n_float64 >= goal:
            break
    return model.float()


@torch.no_grad()
def plot_f(axis, model, seq_len):
    """Draw f on `axis` over the input x of the classifier: the counts, and a curve through them."""
    x, u = classifier_input(model, seq_len)
    _, correct, f = exact_accuracy(model, seq_len)
    between = torch.linspace(x.min(), x.max(), 1001)
    logits = model.classifier(torch.outer(between, u))                     # (1001, 2)
    curve = logits[:, 1] - logits[:, 0]
    f = f.clamp(-1.8, 2.5)  # points beyond the axis are drawn at its edge
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.plot(between, curve, color="lightgray")
    axis.plot(x[::2], f[::2], "o", label="even: f < 0 is right")
    axis.plot(x[1::2], f[1::2], "^", label="odd: f > 0 is right")
    axis.plot(x[~correct], f[~correct], "kx", markersize=10, label="wrong")
    axis.set_ylim(-2, 3.2)
    axis.set_ylabel("f")
    axis.legend(fontsize=8, ncols=3, loc="upper center")


@torch.no_grad()
def plot_smallest(models, seq_len, path):
    """Save f of each model without a block, and two parts that f of the last one is made of."""
    n_panels = len(models) + 1
    n_columns = math.ceil(n_panels / 2)
    size = (6 * n_columns, 7)
    figure, axes = plt.subplots(2, n_columns, figsize=size, layout="constrained")
    x, direction = classifier_input(models[-1], seq_len)
    for axis, model in zip(axes.flat, models):
        plot_f(axis, model, seq_len)
        params = sum(p.numel() for p in model.parameters())
        n_right, _ = check_on_all_strings(model, seq_len)
        axis.set_title(f"{params} parameters: {n_right:,} strings right")

    # Two units that bend in the same place nearly cancel everywhere else, up to a straight line.
    # Sorted by where they bend, such pairs stand side by side. A straight line can be moved from
    # one pair to the other without changing f: the first pair is shown without the line through its
    # ends, and the rest with it.
    first, _, last = models[-1].classifier
    w = first.weight @ direction                                           # (n,)
    b = first.bias
    a = last.weight[1] - last.weight[0]
    k = last.bias[1] - last.bias[0]
    order = (-b / w).argsort()
    between = torch.linspace(-1, 1, 1001)
    u = torch.outer(between, w) + b                                        # (1001, n)
    units = a * F.silu(u)
    f = units.sum(dim=1) + k
    pair = units[:, order[:2]].sum(dim=1)
    line = pair[0] + (pair[-1] - pair[0]) * (between + 1) / 2
    axis = axes.flat[len(models)]
    axis.plot(between, pair - line, label="two of the units, without a straight line")
    axis.plot(between, f - pair + line, label="the other units, k and that line")
    axis.plot(between, f, color="lightgray", label="all together: f")
    axis.set_title(f"what the {len(w)} units of the last network add up to")
    axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.set_xlabel("number of ones")
        axis.set_xticks(x, range(seq_len + 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


@torch.no_grad()
def plot_fold(model, seq_len, path):
    """Save how a block folds the counts: its tokens, their mean, and f over the mean."""
    strings, _, _ = one_string_per_count(seq_len)
    feature = token_vectors(model, strings)[:, :, 0]                       # (T+1, T)
    zeros = feature[:-1, -1]                                               # zeros come last
    ones = feature[1:, 0]
    x, _ = classifier_input(model, seq_len)
    counts = torch.arange(seq_len + 1)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    axes[0].plot(counts[:-1], zeros, "o", label="each 0")
    axes[0].plot(counts[1:], ones, "s", label="each 1")
    axes[0].set_title("after the block: +1 for the majority, -1 for the others")
    axes[0].set_ylabel("first feature")
    axes[0].legend()
    axes[1].plot(counts, x, "o", color="black")
    axes[1].set_title("their mean x: the counts, folded")
    axes[1].set_ylabel("x")
    for axis in axes[:2]:
        axis.set_xlabel("number of ones")
        axis.set_xticks(counts)
    plot_f(axes[2], model, seq_len)
    axes[2].set_title("f over the folded counts")
    axes[2].set_xlabel("number of ones")
    half = seq_len // 2
    labels = [f"{c} or {seq_len - c}" for c in range(half)]
    axes[2].set_xticks(x[:half + 1], labels + [half])
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


def sweep(out_dir, networks=NETWORKS, seq_len=10, n_tries=10):
    """Find, check, save and draw the networks. Returns {parameters: strings right}."""
    print("parameters blocks width | strings right sign changes smallest |f|")
    results = {}
    without_block = []
    for width, n_layers, may_be_wrong in networks:
        model = find_network(width, n_layers, may_be_wrong, seq_len, n_tries)
        params = sum(p.numel() for p in model.parameters())
        n_right, smallest = check_on_all_strings(model, seq_len)
        _, _, f = exact_accuracy(model, seq_len)
        answers = (f > 0).int()
        n_changes = answers.diff().abs().sum()
        print(f"{params:10} {n_layers:6} {width:5} |", end=" ")
        print(f"{n_right:13} {n_changes:12} {smallest:12.2f}", flush=True)
        results[params] = n_right

        path = os.path.join(out_dir, f"parity_{params}.pt")
        sizes = [2, 2, width, 1, 1, 1, n_layers]
        torch.save({"sizes": sizes, "weights": model.state_dict()}, path)
        print(f"saved {path}")
        if n_layers == 0:
            without_block.append(model)
        else:
            plot_fold(model, seq_len, os.path.join(out_dir, "parity_fold.png"))
    plot_smallest(without_block, seq_len, os.path.join(out_dir, "parity_smallest.png"))
    return results


if __name__ == "__main__":
    start = time.perf_counter()

    # options
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seq_len", type=positive(int), default=10,
                        help="bits in each string")
    parser.add_argument("--n_samples", type=positive(int), default=1000,
                        help="random strings, 4/5 of them to train on")
    parser.add_argument("--d_model", type=positive(int), default=8,
                        help="width of the model")
    parser.add_argument("--d_key", type=positive(int), default=8,
                        help="width of queries and keys")
    parser.add_argument("--n_heads", type=positive(int), default=2,
                        help="heads in each block")
    parser.add_argument("--mlp_factor", type=positive(int), default=4,
                        help="hidden width of the MLP / d_model")
    parser.add_argument("--n_layers", type=int, default=2,
                        help="blocks, may be 0")
    parser.add_argument("--lr", type=positive(float), default=0.006,
                        help="peak learning rate")
    parser.add_argument("--steps", type=positive(int), default=650,
                        help="training steps at most; stops when done")
    parser.add_argument("--batch_size", type=positive(int),
                        help="strings in each step; None is the whole training set")
    parser.add_argument("--sweep", action="store_true",
                        help="find the smallest networks for length 10 instead; of the other "
                             "options, uses only --seed and --out_dir")
    args = parse_args(parser)
    if args.n_samples < 2:
        sys.exit("--n_samples 1: at least 2 are needed, one to train on and one to validate")
    if args.n_layers < 0:
        sys.exit(f"--n_layers {args.n_layers}: 0 or more are needed")
    torch.set_num_threads(1)  # at this size, more threads only add overhead

    if args.sweep:
        results = sweep(args.out_dir)
        accuracies = {params: n_right / 2 ** 10 for params, n_right in results.items()}
        above_95 = [params for params, accuracy in accuracies.items() if accuracy > 0.95]
        all_right = [params for params, accuracy in accuracies.items() if accuracy == 1]
        smallest_95 = min(above_95, default=None)
        smallest_all = min(all_right, default=None)
        seconds = time.perf_counter() - start
        print(f"result: smallest_95={smallest_95} smallest_all={smallest_all} "
              f"accuracy_32={accuracies[32]:.4f} accuracy_58={accuracies[58]:.4f} "
              f"seconds={seconds:.1f}")
        sys.exit()

    # data: random strings and their parities
    x = torch.randint(2, (args.n_samples, args.seq_len)).to(args.device)   # (N, T)
    y = x.sum(dim=1) % 2                                                   # (N,)
    n_train = args.n_samples * 4 // 5
    n_val = args.n_samples - n_train

    # model and optimizer
    sizes = [2, 2, args.d_model, args.d_key, args.n_heads, args.mlp_factor, args.n_layers]
    model = TransformerClassifier(*sizes).to(args.device)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} parameters, {n_train:,} strings to train on, {n_val:,} to validate")
    # Why there is a plateau: at first f = logit(odd) - logit(even) is a smooth function of the
    # number of ones, which is close to a polynomial of low degree. Over all strings, parity is
    # uncorrelated with every polynomial of degree below T. (Such a polynomial is a sum of products
    # of fewer than T bits. Each product leaves out a bit, and flipping that bit flips the parity
    # but not the product, so the strings cancel in pairs.) So the best that such a function can do
    # is f = 0, the coin flip, and the gradient is almost zero: its norm falls from 0.1 to 0.003.
    # There the noise of a batch of 64 is more than 30 times as large, so by default a batch is the
    # whole training set.
    # Why beta2 is 0.9: when the plateau ends, the norm of the gradient grows from 0.003 to 0.9
    # within 20 steps. Adam divides the gradient by the root of the mean of its squares. With 0.9
    # this mean covers about ten steps and keeps up. The default of 0.999 would cover all steps so
    # far and lag behind.
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.9))
    # the learning rate rises from args.lr / 25 to args.lr and then falls to almost 0
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps,
                                                    cycle_momentum=False)

    # training loop
    losses = []
    accuracies = []
    n_low = 0
    for step in range(args.steps):
        # get a batch
        if args.batch_size is None:
            rows = torch.arange(n_train)                                   # (B,)
        else:
            rows = torch.randint(n_train, (args.batch_size,))

        # forward
        logits = model(x[rows])                                            # (B, 2)
        loss = F.cross_entropy(logits, y[rows])

        # log, before the update, so that loss and accuracy are those of the same weights
        accuracy, _, _ = exact_accuracy(model, args.seq_len)
        losses.append(loss.item())
        accuracies.append(accuracy)
        if step == 0:
            print(f"step 0/{args.steps}: loss {loss:.4f}, "
                  f"uniform prediction ln 2 = {math.log(2):.4f}")
        elif step % 50 == 0:
            print(f"step {step}/{args.steps}: loss {loss:.4f}, "
                  f"accuracy on all strings {accuracy:.4f}")

        # backward and update; at a peak of the loss the gradient's norm can exceed 100: clip it
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()

        # stop after 5 low losses in a row
        if loss < 0.002:
            n_low += 1
        else:
            n_low = 0
        if n_low == 5:
            break

    # evaluation
    with torch.no_grad():
        answers = model(x[n_train:]).argmax(dim=1)                         # (n_val,)
    accuracy_val = (answers == y[n_train:]).float().mean().item()
    accuracy_all, correct, _ = exact_accuracy(model, args.seq_len)
    wrong = (~correct).nonzero().flatten().tolist()
    print(f"step {step + 1}/{args.steps}: wrong for these numbers of ones: {wrong}")
    path = os.path.join(args.out_dir, "parity.pt")
    torch.save({"sizes": sizes, "steps": step + 1, "weights": model.state_dict()}, path)
    print(f"saved {path}")

    # figures
    plot_curve(losses, accuracies, os.path.join(args.out_dir, "parity_curve.png"))
    seconds = time.perf_counter() - start
    print(f"result: accuracy_val={accuracy_val:.4f} accuracy_all={accuracy_all:.4f} "
          f"params={n_params} seconds={seconds:.1f}")
