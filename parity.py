"""
Train a Transformer encoder to tell whether a bit string has an odd number of ones (its parity), and
search for the smallest classifier that can.

    0 1 1 0 1 0 0 0 0 0  ->  three ones: odd
    0 1 1 0 1 0 0 1 0 0  ->  four ones: even

Parity looks trivial, but it is hard to learn. Flipping any single bit flips the label, so nine bits
say nothing about the label without the tenth. For about ninety steps (the plateau) the loss stays
close to that of a coin flip, and then it falls.

The model has no position embeddings (it is not told where a bit is), and its tokens interact only
through means. So it sees only the fraction of ones, and the 1,024 strings of length 10 are just 11
different inputs. Validation therefore proves little: nearly every validation string is a reordered
training string.

$ python parity.py                # 2 blocks, width 8, 2,426 parameters
$ python parity.py --d_model 16
$ python parity.py --sweep        # how small can it get? 32 parameters pass 0.95 accuracy

Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762. The main
differences: no positions, no dropout (see translate.py), LayerNorm before each layer instead of
after it, SiLU instead of ReLU.
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

from attention import attention, make_folder, number, parse_args


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

    One head gives each token one weighted mean, and a mean of two values does not say which value
    came from where. With several heads a token can look at several things at once: one head may
    attend to the ones, another to the zeros. Here each head returns d_model features; in the paper
    it returns d_model / n_heads.
    """

    def __init__(self, d_model, d_key, n_heads):
        super().__init__()
        self.heads = nn.ModuleList(SelfAttention(d_model, d_key) for _ in range(n_heads))
        self.w_o = nn.Linear(n_heads * d_model, d_model)

    def forward(self, x):
        outputs = [head(x) for head in self.heads]
        return self.w_o(torch.cat(outputs, dim=-1))                        # (B, T, d_model)


# LayerNorm takes the vector of one token, subtracts the mean of its numbers and divides by their
# standard deviation. For example, (1, 3, 5, 7) has mean 4 and standard deviation 2.24 (the root of
# 20 / 4) and becomes (-1.34, -0.45, 0.45, 1.34). So the next layer gets inputs on the same scale,
# and need not adapt whenever training changes the scale of earlier layers. (Each feature then gets
# a learned weight and bias, 1 and 0 at the start.)
#
# A residual connection is the "x +" in x + f(x): a layer adds to its input instead of replacing it.
# So a layer that has learned nothing yet does not destroy x, and the gradient reaches all earlier
# layers through the sum, without passing through f.
#
# The paper normalizes the sum, LayerNorm(x + f(x)), as translate.py does (post-norm). Here only the
# input of f is normalized, x + f(LayerNorm(x)) (pre-norm). Each script follows the exercise sheet
# (see README). With post-norm, the gradients of the last layers are large at the start, and large
# models often do not train without a warm-up (small steps at first). With pre-norm they are not,
# and large models train without one (Xiong et al. 2020, https://arxiv.org/abs/2002.04745).
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
# - Attention ignores order: swapping two tokens swaps their outputs and changes nothing else. The
#   rest of a block works on each token separately, and the mean over all tokens at the end is the
#   same after the swap. So only the numbers of ones and zeros can matter.
# - Attention returns weighted means, and the classifier gets a mean, too. Writing a string n times
#   multiplies both numbers by n and changes no mean. So only the fraction of ones can matter.
# It follows that no model of this kind computes parity for all lengths: a string written twice gets
# the same logits, but its number of ones is always even.
class TransformerClassifier(nn.Module):
    """Tokens (B, T) -> logits (B, n_classes): embedding, blocks, LayerNorm, mean, classifier.

    A logit is an unbounded score; softmax over the logits gives the probability of each class.
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
    fractions = [math.comb(seq_len, c) / 2 ** seq_len for c in range(seq_len + 1)]
    return strings, parities, torch.tensor(fractions, device=device)


# --------------------------------------------------------------------------------------------------
# Why there is a plateau, and why it ends
#
# The model computes f = logit(odd) - logit(even) from the number of ones c, and answers "odd" where
# f > 0. At the start f is smooth, close to a polynomial of low degree, because few layers compute
# it, and each bends little. Over all strings, parity (-1 for even, 1 for odd) is uncorrelated with
# every polynomial in c of degree below T. (c is the sum of the bits, and every power of a bit is
# the bit itself. So such a polynomial is a sum of products of fewer than T bits. Each product
# leaves out a bit, and flipping that bit flips the parity but not the product, so the strings
# cancel in pairs.) The loss of a string is ln(1 + exp(-f * parity)). For small f this is about ln 2
# - f * parity / 2 + f^2 / 8 (Taylor series, with parity^2 = 1), and its mean over all strings is
#
#     ln 2 - (mean of f * parity) / 2 + (mean of f^2) / 8
#
# Without correlation the middle term is 0, so the best f is 0, the coin flip. (The accuracy can
# still be 0.62, because it depends only on the sign of f, which is not a polynomial: "odd" up to 5
# ones and "even" above is right for 638 strings.)
#
# So the plateau lasts as long as the middle term is negligible. We call the mean of f * parity the
# parity component of f; the figure shows its size. In the default run it stays below 0.00002 for
# eighty steps. Meanwhile f fits chance differences: some numbers of ones are more frequent among
# the 800 training strings than among all strings, others less, so in training parity is slightly
# correlated with smooth functions. The loss falls to 0.6919, a little below ln 2 = 0.6931. The
# differences jump from one number of ones to the next, so f bends more and more to fit them, until
# it is no longer close to a polynomial of low degree, and within ten steps the component grows from
# 0.00002 to 0.005 (step 90). The middle term, half of that, now lowers the loss by more than the
# 0.0012 that the chance differences have gained, so from here on gradient descent mainly increases
# the component. The growth feeds itself: f is proportional to the weights and bias of the last
# layer, so if they grow by 1%, so does the component, and the larger it is, the more the loss
# falls. (Without chance differences the plateau also ends, but later: see README, exercise 1. The
# component is never exactly 0, so the loss has a small gradient along it from the start. To look at
# all these numbers: `python -i parity.py`, then `components[90]`.)
#
# The loss spikes later because some steps are too large. By then f jumps by 10 to 20 between
# neighboring numbers of ones, so small changes in the weights change it a lot. Adam's steps do not
# shrink with the gradient, because Adam divides it by an average of its recent size. At step 243,
# f(7) becomes negative, and all 120 strings with 7 ones are wrong. Their gradient is far above that
# average, and corrects f(7) within two steps. (With a tenth of the learning rate from step 215 on,
# this run has no more spikes.)
@torch.no_grad()
def exact_accuracy(model, seq_len):
    """The accuracy on all 2^T strings, computed from one string for each number of ones 0 ... T.

    Also returns whether the model is right for each number of ones (T+1,), and the values of f =
    logit(odd) - logit(even) (T+1,).
    """
    device = next(model.parameters()).device
    strings, parities, fractions = one_string_per_count(seq_len, device)
    logits = model(strings)                                                # (T+1, 2)
    f = logits[:, 1] - logits[:, 0]
    correct = (f > 0) == (parities == 1)
    accuracy = fractions[correct].sum().item()
    return accuracy, correct.cpu(), f.cpu()


def parity_component(f):
    """The mean of f times parity, -1 (even) or 1 (odd), over all 2^T strings, from f (T+1,)."""
    _, parities, fractions = one_string_per_count(len(f) - 1)
    signs = 2 * parities - 1
    return (fractions * f * signs).sum().item()


def plot_curve(losses, accuracies, components, path):
    """Save a figure of loss, accuracy and |parity component| at each training step."""
    figure, axes = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    axes[0].plot(losses)
    axes[0].axhline(math.log(2), color="gray", linestyle=":", label="coin flip, ln 2")
    axes[0].set_ylabel("loss")
    axes[0].legend()
    axes[1].plot(accuracies, color="C1")
    axes[1].axhline(0.5, color="gray", linestyle=":", label="coin flip")
    axes[1].set_ylabel("accuracy on all strings")
    axes[1].legend()
    axes[2].plot([abs(component) for component in components], color="C2")
    axes[2].set_yscale("log")
    axes[2].set_ylabel("|parity component of f|")
    axes[2].set_xlabel("training step")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


# --------------------------------------------------------------------------------------------------
# Appendix (can be skipped): how small can it get?
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
# The second row is a theorem: two SiLUs and a constant change sign at most five times (proved in
# assets/proof_20.md), so at most 968 of the 1,024 strings are right. The third row is only the best
# found: whether 32 parameters can get all strings right is open. At width 1, with or without
# blocks, the last LayerNorm subtracts a number from itself, so all strings look alike. A network of
# width n without a block has n^2 + 7n + 2 parameters: 2n in the embedding, 2n in LayerNorm, n^2 + n
# and 2n + 2 in the two layers of the classifier. A block of width 2 adds at least 38. So every
# network that is wider, or has width 2 and a block, has at least 32 parameters, and 32 is the
# smallest number that passes 0.95.
#
# The search below finds these networks. NETWORKS lists their widths and the numbers of ones that
# they may get wrong. With only 5 of the 10 sign changes, at least three numbers are wrong: giving
# up a number between two others saves two changes, because f may keep the sign of its neighbors
# there, and giving up an end (0 or 10) saves only one. 0, 2 and 9 save 1 + 2 + 2 = 5 and cost
# least, 1 + 45 + 10 strings. (0, 2 and 10 are only 47 strings, but save only four.)
NETWORKS = [
    (2, [0, 2, 9]),
    (3, [10]),
    (4, []),
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

    x (P,) lies in [-1, 1], and the targets are -1 or 1. Only w and b need a search: f is linear in
    a (its last number is k), so least squares gives the best a.
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


@torch.no_grad()
def count_right(model, seq_len):
    """How many of the 2^T strings the model gets right."""
    bits = [torch.arange(2)] * seq_len
    strings = torch.cartesian_prod(*bits).view(-1, seq_len)                # (2^T, T)
    answers = model(strings).argmax(dim=1)                                 # (2^T,)
    return (answers == strings.sum(dim=1) % 2).sum().item()


# The embedding of a 0 is -d and that of a 1 is d, so LayerNorm makes them -u and u, and the mean of
# a string with c ones is x u with x = 2c/T - 1. The search gives w, b and a for this x, and they
# become the weights of the classifier. The search runs in float64 and the model in float32, so all
# strings are checked in both. If a network falls short, search again.
def smallest_network(width, may_be_wrong, seq_len=10, n_tries=10):
    """Find a model without a block that is right except for the numbers of ones `may_be_wrong`."""
    model = TransformerClassifier(2, 2, d_model=width, n_layers=0)
    d = torch.linspace(-1, 1, width)
    model.token_embedding.weight.data = torch.stack([-d, d])
    u = model.final_layer_norm(d).detach().double()

    counts = torch.arange(seq_len + 1)
    kept = [c for c in range(seq_len + 1) if c not in may_be_wrong]
    goal = sum(math.comb(seq_len, c) for c in kept)
    x = 2 * counts[kept].double() / seq_len - 1
    targets = 2 * (counts[kept] % 2).double() - 1                          # -1: even, 1: odd
    first, _, last = model.classifier
    for _ in range(n_tries):
        w, b, a = search(x, targets, width)
        first.weight.data = torch.outer(w, u) / (u @ u)     # (w u / |u|^2) . (x u) = w x
        first.bias.data = b
        last.weight.data = torch.stack([-a[:-1], a[:-1]]) / 2              # logit(even) = -f / 2
        last.bias.data = torch.stack([-a[-1], a[-1]]) / 2                  # logit(odd) = f / 2
        n_float32 = count_right(model.float(), seq_len)
        n_float64 = count_right(model.double(), seq_len)
        if n_float32 >= goal and n_float64 >= goal:
            break
    return model.float()


@torch.no_grad()
def plot_smallest(models, seq_len, path):
    """Save f of each model at the numbers of ones 0 ... T, and the curve through these points."""
    size = (5 * len(models), 4)
    figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, layout="constrained")
    counts = torch.arange(seq_len + 1)
    between = torch.linspace(0, seq_len, 1001)
    for axis, model in zip(axes.flat, models):
        u = model.final_layer_norm(model.token_embedding.weight[1])        # (d_model,)
        x = 2 * between / seq_len - 1
        logits = model.classifier(torch.outer(x, u))                       # (1001, 2)
        curve = logits[:, 1] - logits[:, 0]
        _, correct, f = exact_accuracy(model, seq_len)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.plot(between, curve, color="lightgray")
        axis.plot(counts[::2], f[::2], "o", label="even: f < 0 is right")
        axis.plot(counts[1::2], f[1::2], "^", label="odd: f > 0 is right")
        axis.plot(counts[~correct], f[~correct], "kx", markersize=10, label="wrong")
        # show all points; between them the curve may leave the panel
        axis.set_ylim(f.min().item() - 1, f.max().item() + 1)
        axis.set_xticks(counts)
        axis.set_xlabel("number of ones")
        axis.set_ylabel("f")
        n_params = sum(p.numel() for p in model.parameters())
        axis.set_title(f"{n_params} parameters: {count_right(model, seq_len):,} strings right")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


def sweep(out_dir, networks=NETWORKS, seq_len=10):
    """Find, check and draw the networks. Returns {parameters: strings right}."""
    print("parameters width | strings right sign changes")
    results = {}
    models = []
    for width, may_be_wrong in networks:
        model = smallest_network(width, may_be_wrong, seq_len)
        n_params = sum(p.numel() for p in model.parameters())
        n_right = count_right(model, seq_len)
        _, _, f = exact_accuracy(model, seq_len)
        answers = (f > 0).int()
        n_changes = answers.diff().abs().sum()
        print(f"{n_params:10} {width:5} | {n_right:13} {n_changes:12}")
        results[n_params] = n_right
        models.append(model)
    plot_smallest(models, seq_len, os.path.join(out_dir, "parity_smallest.png"))
    return results


if __name__ == "__main__":
    start = time.perf_counter()

    # options
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq_len", type=number(int, 1), default=10,
                        help="bits in each string (default: 10)")
    parser.add_argument("--n_samples", type=number(int, 2), default=1000,
                        help="random strings, 4/5 of them for training (default: 1000)")
    parser.add_argument("--d_model", type=number(int, 1), default=8,
                        help="width of the model (default: 8)")
    parser.add_argument("--d_key", type=number(int, 1), default=8,
                        help="width of queries and keys (default: 8)")
    parser.add_argument("--n_heads", type=number(int, 1), default=2,
                        help="heads in each block (default: 2)")
    parser.add_argument("--mlp_factor", type=number(int, 1), default=4,
                        help="hidden width of the MLP / d_model (default: 4)")
    parser.add_argument("--n_layers", type=number(int, 0), default=2,
                        help="number of blocks, 0 or more (default: 2)")
    parser.add_argument("--lr", type=number(float, 0), default=0.006,
                        help="peak learning rate (default: 0.006)")
    parser.add_argument("--steps", type=number(int, 1), default=650,
                        help="maximum number of training steps (default: 650)")
    parser.add_argument("--batch_size", type=number(int, 1),
                        help="strings in each batch (default: the whole training set)")
    parser.add_argument("--sweep", action="store_true",
                        help="find the smallest networks for length 10 instead")
    args = parse_args(parser)
    make_folder(args.out_dir)
    torch.set_num_threads(1)  # at this size, more threads only add overhead

    if args.sweep:
        results = sweep(args.out_dir)
        above_95 = [n_params for n_params, n_right in results.items() if n_right > 0.95 * 2 ** 10]
        all_right = [n_params for n_params, n_right in results.items() if n_right == 2 ** 10]
        seconds = time.perf_counter() - start
        print(f"result: smallest_95={min(above_95, default=None)} "
              f"smallest_all={min(all_right, default=None)} "
              f"accuracy_32={results[32] / 2 ** 10:.4f} seconds={seconds:.1f}")
        sys.exit()

    # data: random strings and their parities
    x = torch.randint(2, (args.n_samples, args.seq_len)).to(args.device)   # (N, T)
    y = x.sum(dim=1) % 2                                                   # (N,)
    n_train = args.n_samples * 4 // 5
    n_val = args.n_samples - n_train
    training_strings = {tuple(string) for string in x[:n_train].tolist()}
    n_seen = sum(tuple(string) in training_strings for string in x[n_train:].tolist())

    # model and optimizer
    sizes = [2, 2, args.d_model, args.d_key, args.n_heads, args.mlp_factor, args.n_layers]
    model = TransformerClassifier(*sizes).to(args.device)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} parameters, {n_train:,} training strings, {n_val:,} validation strings "
          f"({n_seen:,} of them also occur in training)")
    # Why the batch is the whole training set: on the plateau the norm of the gradient falls to
    # 0.003, and the noise of a batch of 64 is more than 30 times as large.
    # Why beta2 is 0.9: when the plateau ends, the norm of the gradient grows from 0.003 to 0.9
    # within 20 steps. Adam divides the gradient by the root of the mean of its squares. With 0.9
    # this mean covers about ten steps and keeps up. The default of 0.999 would cover all steps so
    # far and lag behind.
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.9))
    # the learning rate rises from args.lr / 25 to args.lr in the first 30% of the steps, then falls
    # to almost 0 (pre-norm could do without this warm-up)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps,
                                                    cycle_momentum=False)

    # training loop
    losses = []
    accuracies = []
    components = []
    for step in range(args.steps):
        # get a batch
        if args.batch_size is None:
            rows = torch.arange(n_train)                                   # (B,)
        else:
            rows = torch.randint(n_train, (args.batch_size,))

        # forward
        logits = model(x[rows])                                            # (B, 2)
        loss = F.cross_entropy(logits, y[rows])
        if not loss.isfinite():
            sys.exit(f"step {step}: the loss is {loss.item()}, try a smaller --lr")

        # log, before the update, so that all numbers describe the same weights
        accuracy, _, f = exact_accuracy(model, args.seq_len)
        component = parity_component(f)
        losses.append(loss.item())
        accuracies.append(accuracy)
        components.append(component)
        if step == 0:
            print(f"step 0/{args.steps}: loss {loss:.4f}, "
                  f"uniform prediction ln 2 = {math.log(2):.4f}")
        elif step % 50 == 0:
            print(f"step {step}/{args.steps}: loss {loss:.4f}, accuracy on all strings "
                  f"{accuracy:.4f}, parity component {component:.6f}")

        # backward and update; when the loss spikes, the gradient norm can exceed 100, so clip it
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()

        # stop after 5 low losses in a row
        last_losses = losses[-5:]
        if max(last_losses) < 0.002:
            break

    # evaluation
    with torch.no_grad():
        answers = model(x[n_train:]).argmax(dim=1)                         # (n_val,)
    accuracy_val = (answers == y[n_train:]).float().mean().item()
    accuracy_all, correct, _ = exact_accuracy(model, args.seq_len)
    wrong = (~correct).nonzero().flatten().tolist()
    print(f"step {step + 1}/{args.steps}: wrong for these numbers of ones: {wrong}")

    # figures
    path = os.path.join(args.out_dir, "parity_curve.png")
    plot_curve(losses, accuracies, components, path)
    seconds = time.perf_counter() - start
    print(f"result: accuracy_val={accuracy_val:.4f} accuracy_all={accuracy_all:.4f} "
          f"params={n_params} seconds={seconds:.1f}")
