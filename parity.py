"""
Train a Transformer encoder to tell whether a bit string has an odd number of ones, and find the smallest that can.

Parity looks trivial but is hard to learn: flipping any single bit flips the label, so no proper subset of the bits
carries information, and the loss sits at ln 2 for a hundred steps before anything happens. There are no position
embeddings, so the model sees only the fraction of ones, not their order. To it the 1,024 strings of length 10 are just
11 inputs, so the accuracy on all of them can be computed, not estimated. Validation proves little: nearly every
validation string is a training string in another order. Attention and pooling are weighted means, so a string written
twice gets the same logits, but its parity is always even: no model of this family computes parity for all lengths.

$ python parity.py                # 2 blocks, width 8, 2,426 parameters
$ python parity.py --d_model 16
$ python parity.py --sweep        # how small can it get? 32 parameters pass 0.95, 46 get all 1,024 strings right

Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762; here with pre-norm and SiLU
"""

import argparse
import copy
import math
import os
import sys
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from attention import attention, parse_args, plot_attention, positive


# ----------------------------------------------------------------------------------------------------------------------
# Model
class SelfAttention(nn.Module):
    """One head (Vaswani et al. 2017, section 3.2.1)."""

    def __init__(self, d_model, d_key):
        super().__init__()
        self.w_q = nn.Linear(d_model, d_key)
        self.w_k = nn.Linear(d_model, d_key)
        self.w_v = nn.Linear(d_model, d_model)

    def forward(self, x):                                                   # (B, T, d_model)
        return attention(self.w_q(x), self.w_k(x), self.w_v(x))[0]          # (B, T, d_model)


class MultiHeadSelfAttention(nn.Module):
    """Several heads, mixed by a linear map (section 3.2.2). Each returns d_model features, not d_model / n_heads."""

    def __init__(self, d_model, d_key, n_heads):
        super().__init__()
        self.heads = nn.ModuleList(SelfAttention(d_model, d_key) for _ in range(n_heads))
        self.w_o = nn.Linear(n_heads * d_model, d_model)

    def forward(self, x):                                                   # (B, T, d_model)
        return self.w_o(torch.cat([head(x) for head in self.heads], dim=-1))                # (B, T, d_model)


class TransformerBlock(nn.Module):
    """Attention mixes the tokens, then an MLP transforms each. Pre-norm: each adds f(LayerNorm(x)) to x."""

    def __init__(self, d_model, d_key, n_heads, mlp_factor=4):
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.attn = MultiHeadSelfAttention(d_model, d_key, n_heads)
        self.ln2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, mlp_factor * d_model), nn.SiLU(),
                                 nn.Linear(mlp_factor * d_model, d_model))

    def forward(self, x):                                                   # (B, T, d_model)
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))                                    # (B, T, d_model)


class TransformerClassifier(nn.Module):
    """Tokens (B, T) -> logits (B, n_classes). Without position embeddings the order of the tokens is invisible."""

    def __init__(self, n_embeds, n_classes, d_model=256, d_key=64, n_heads=4, mlp_factor=4, n_layers=2):
        super().__init__()
        self.token_embedding = nn.Embedding(n_embeds, d_model)
        self.transformer_model = nn.Sequential(*[TransformerBlock(d_model, d_key, n_heads, mlp_factor)
                                                 for _ in range(n_layers)])
        self.final_layer_norm = nn.LayerNorm(d_model)
        self.classifier = nn.Sequential(nn.Linear(d_model, d_model), nn.SiLU(), nn.Linear(d_model, n_classes))

    def forward(self, tokens):                                              # (B, T)
        x = self.transformer_model(self.token_embedding(tokens))            # (B, T, d_model)
        x = self.final_layer_norm(x).mean(dim=1)                            # (B, d_model)
        return self.classifier(x)                                           # (B, n_classes)


# ----------------------------------------------------------------------------------------------------------------------
# Data and accuracy
def one_string_per_count(seq_len, device="cpu"):
    """Strings with 0 ... T ones (T+1, T), their parities (T+1,), and the fraction of all strings each stands for."""
    counts = torch.arange(seq_len + 1, device=device)                       # (T+1,)
    strings = (torch.arange(seq_len, device=device) < counts.unsqueeze(1)).long()           # (T+1, T)
    fractions = [math.comb(seq_len, c) / 2 ** seq_len for c in range(seq_len + 1)]
    return strings, counts % 2, torch.tensor(fractions, device=device)


@torch.no_grad()
def exact_accuracy(model, seq_len):
    """The accuracy on all 2^T strings, which counts are right (T+1,), and f(c) = logit(odd) - logit(even) (T+1,)."""
    strings, parities, fractions = one_string_per_count(seq_len, next(model.parameters()).device)
    f = model(strings).diff(dim=1).squeeze(1)                               # (T+1,)
    correct = (f > 0) == parities                                           # (T+1,)
    return fractions[correct].sum().item(), correct.cpu(), f.cpu()


# ----------------------------------------------------------------------------------------------------------------------
# How small can it get? To get all strings right, f(c) must change sign between any two neighboring counts c: a sawtooth
# with 10 sign changes. Width 1 cannot work: LayerNorm over a single feature returns its bias for any input, so all
# strings get equal logits. So with a block the smallest candidate has width 2, everything else 1, and 58 parameters.
#
# Without a block, mean pooling over LayerNormed embeddings is linear in c, and the classifier on top is a network with
# one input and n = d_model hidden units: f(c) = k + sum over j of a_j SiLU(u_j), with u_j = w_j c + b_j. How often can
# it change sign? A ReLU adds one kink; SiLU(u) = u / (1 + e^-u) dips below zero before it rises, so it can do more.
# Multiply f by all (1 + e^-u_j): this gives a sum of exponentials with polynomial coefficients, one for each subset of
# the units, of degree 1 except one of degree 0. By Rolle's theorem such a sum has fewer real zeros than coefficients,
# so f has at most 2^(n+1) - 2: 6, 14, 30 for n = 2, 3, 4. 20 parameters (width 2) cannot get all strings right. Open:
# can they pass 0.95 (6 sign changes), and can 32 (width 3) get all right? The search finds 5 and 7 sign changes.
WIDTHS = [2, 3, 4, 5, 8]  # without a block
# with blocks: d_model, d_key, n_heads, mlp_factor, n_layers, and the number of seeds
WITH_BLOCKS = {(2, 1, 1, 1, 1): 256, (3, 1, 1, 1, 1): 64, (8, 4, 1, 1, 1): 16, (8, 8, 2, 4, 2): 4}


def search(width, seq_len, n_starts=1500, rounds=10, steps=400):
    """Search for the f(c) with the most strings right; returns it as a TransformerClassifier without blocks."""
    _, parities, fractions = (t.double() for t in one_string_per_count(seq_len))            # (T+1,) each
    s = torch.linspace(-1, 1, seq_len + 1, dtype=torch.double)              # (T+1,), the counts, scaled to [-1, 1]
    w = 20 * torch.randn(n_starts, width, dtype=torch.double)
    b = w * (2 * torch.rand_like(w) - 1)                                    # every SiLU bends somewhere in [-1, 1]
    a = torch.randn_like(w)
    k = torch.zeros(n_starts, 1, dtype=torch.double)
    for i in range(rounds):  # most random starts end in poor local minima, so keep the best tenth, perturb, and repeat
        if i > 0:
            survivors = losses.argsort()[:n_starts // 10].repeat(10)
            noise = 0.3 if i < rounds - 1 else 0.03  # first explore, then refine
            w, b, a, k = (p.detach()[survivors] * (1 + noise * torch.randn_like(p)) for p in (w, b, a, k))
        optimizer = torch.optim.Adam([p.requires_grad_() for p in (w, b, a, k)], betas=(0.9, 0.9))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
        for _ in range(steps):
            units = F.silu(w.unsqueeze(1) * s.unsqueeze(1) + b.unsqueeze(1))                # (n_starts, T+1, width)
            margins = (2 * parities - 1) * ((units * a.unsqueeze(1)).sum(dim=-1) + k)    # (n_starts, T+1), > 0 is right
            margins = margins / margins.abs().amax(dim=1, keepdim=True)     # only signs matter, so fix the scale
            losses = (fractions * F.softplus(-8 * margins)).sum(dim=1)      # (n_starts,)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            scheduler.step()
    accuracy = (fractions * (margins > 0.001)).sum(dim=1)                   # only logits that are clearly apart count
    best = (accuracy + 1e-4 * margins.abs().amin(dim=1)).argmax()           # ties: the largest smallest margin
    w, b, a, k = (p.detach()[best] for p in (w, b, a, k))
    # Write f into the real model. Embeddings that are opposite after LayerNorm, -u for 0 and u for 1, have mean s u.
    model = TransformerClassifier(2, 2, width, 1, 1, 1, 0).double()
    u = torch.linspace(-1, 1, width, dtype=torch.double)
    model.token_embedding.weight.data = torch.stack([-u, u])
    u = model.final_layer_norm(u).detach()                                  # (width,)
    model.classifier[0].weight.data = torch.outer(w, u) / (u @ u)           # times s u: w s
    model.classifier[0].bias.data = b
    model.classifier[2].weight.data = torch.stack([-a / 2, a / 2])          # logit(odd) - logit(even) = f
    model.classifier[2].bias.data = torch.cat([-k / 2, k / 2])
    return model.float()


def train_many(sizes, n_seeds, seq_len, device, steps=2000, lr=0.01):
    """Train S = n_seeds models side by side on all 2^T strings, as one weighted string per count; returns the best."""
    strings, parities, fractions = one_string_per_count(seq_len, device)
    models = []
    for seed in range(n_seeds):
        torch.manual_seed(seed)
        models.append(TransformerClassifier(2, 2, *sizes).to(device))
        for p in models[-1].classifier[0].parameters():
            p.data *= 10  # one more 1 moves the mean by only about 1 / T, so start with a steep classifier
    weights, _ = torch.func.stack_module_state(models)                      # each (S, ...)
    forward = torch.func.vmap(lambda one: torch.func.functional_call(models[0], one, (strings,)))
    optimizer = torch.optim.Adam(weights.values(), betas=(0.9, 0.95))       # elementwise: the models stay independent
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    for _ in range(steps):
        margins = (2 * parities - 1) * forward(weights).diff(dim=-1).squeeze(-1)            # (S, T+1), > 0 is right
        optimizer.zero_grad()
        (fractions * F.softplus(-margins)).sum().backward()                 # cross-entropy with two classes
        norms = sum(p.grad.flatten(1).square().sum(dim=1) for p in weights.values()).sqrt()                 # (S,)
        for p in weights.values():                                          # clip the gradient of each model to norm 1
            p.grad /= norms.clamp_min(1.0).view(-1, *[1] * (p.ndim - 1))
        optimizer.step()
        scheduler.step()
    best = (fractions * (margins > 0.001)).sum(dim=1).argmax()
    models[0].load_state_dict({name: value[best] for name, value in weights.items()})
    return models[0].cpu()


def check_on_all_strings(model, seq_len):
    """Accuracy on all 2^T strings, in float64 to limit rounding, and the smallest difference between the two logits."""
    strings = torch.cartesian_prod(*[torch.arange(2)] * seq_len).view(-1, seq_len)          # (2^T, T)
    logits = copy.deepcopy(model).double().requires_grad_(False)(strings)   # (2^T, 2)
    correct = logits.argmax(dim=1) == strings.sum(dim=1) % 2                # (2^T,)
    return correct.double().mean().item(), logits.diff(dim=1).abs().min().item()


def sweep(args):
    """Find the best model of each size, save those without a block, and return the smallest sizes that work."""
    print("d_model d_key n_heads mlp_factor n_layers | params accuracy sign_changes logits_apart")
    results = []
    for sizes in [(width, 1, 1, 1, 0) for width in WIDTHS] + list(WITH_BLOCKS):
        n_seeds = WITH_BLOCKS.get(sizes)
        model = train_many(sizes, n_seeds, args.seq_len, args.device) if n_seeds else search(sizes[0], args.seq_len)
        params = sum(p.numel() for p in model.parameters())
        accuracy, apart = check_on_all_strings(model, args.seq_len)
        sign_changes = (exact_accuracy(model, args.seq_len)[2] > 0).int().diff().abs().sum().item()
        print("{:7} {:5} {:7} {:10} {:8} |".format(*sizes),
              f"{params:6} {accuracy:8.4f} {sign_changes:12} {apart:12.2g}", flush=True)
        results.append((params, accuracy, sizes, model))
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for label, style, chosen in (("no block", "s--", results[:len(WIDTHS)]), ("blocks", "o-", results[len(WIDTHS):])):
        params, accuracies, *_ = zip(*chosen)
        axis.semilogx(params, accuracies, style, label=label)
    axis.axhline(0.95, color="grey", linestyle=":", label="accuracy 0.95")
    axis.set_xticks([result[0] for result in results], [result[0] for result in results], rotation=90, fontsize=7)
    axis.minorticks_off()
    axis.set(xlabel="parameters", ylabel="accuracy on all strings, best model")
    axis.legend()
    path = os.path.join(args.out_dir, "parity_sweep.png")
    figure.savefig(path, dpi=100)
    print(f"saved {path}")
    for params, _, sizes, model in results[:len(WIDTHS)]:
        path = os.path.join(args.out_dir, f"parity_{params}")
        torch.save({"sizes": sizes, "weights": model.state_dict()}, f"{path}.pt")
        plot_units(model, args.seq_len, f"{path}.png")
    return [min((params for params, accuracy, *_ in results if accuracy >= goal), default=None) for goal in (0.95, 1.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Figures
@torch.no_grad()
def plot_units(model, seq_len, path):
    """Left: the terms of f(c) of a model without blocks. Right: their sum, the sawtooth."""
    first, silu, last = model.classifier
    zero, one = model.final_layer_norm(model.token_embedding.weight)        # (d_model,) each
    c = torch.linspace(0, seq_len, 401)                                     # also between the integers
    pooled = zero + (c / seq_len).unsqueeze(1) * (one - zero)               # (401, d_model)
    units = silu(first(pooled)) * last.weight.diff(dim=0)                   # (401, d_model)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    labels = [f"$a_{j}$ SiLU($w_{j} c + b_{j}$)" for j in range(1, units.size(1) + 1)]
    left.plot(c.tolist(), units.tolist(), label=labels)
    left.set(title="each hidden unit (log scale beyond 1)", xlabel="number of ones c")
    left.set_yscale("symlog", linthresh=1)
    left.legend()
    _, _, f = exact_accuracy(model, seq_len)                                # (T+1,)
    right.axhline(0, color="grey", linewidth=0.8)
    right.plot(c.tolist(), (units.sum(dim=1) + last.bias.diff()).tolist(), color="lightgrey")
    right.plot(range(0, seq_len + 1, 2), f[::2].tolist(), "o", label="even: should be below 0")
    right.plot(range(1, seq_len + 1, 2), f[1::2].tolist(), "^", label="odd: should be above 0")
    right.set(title="their sum and a constant: f(c) = logit(odd) - logit(even)", xlabel="number of ones c", ymargin=0.2)
    right.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=100)
    print(f"saved {path}")


@torch.no_grad()
def plot_heads(model, seq_len, path):
    """Weights of the first two heads of the first two blocks, for a string in which every third bit is one."""
    string = (torch.arange(seq_len) % 3 == 1).long()                        # (T,)
    x = model.token_embedding(string.to(next(model.parameters()).device))   # (T, d_model)
    panels, titles = [], []
    for i, block in enumerate(model.transformer_model[:2]):
        for j, head in enumerate(block.attn.heads[:2]):
            h = block.ln1(x)
            panels.append(attention(head.w_q(h), head.w_k(h), head.w_v(h))[1])              # (T, T)
            titles.append(f"block {i + 1}, head {j + 1}")
        x = block(x)
    plot_attention(torch.stack(panels), string.tolist(), string.tolist(), path, titles, columns=4)


if __name__ == "__main__":
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seq_len", type=positive(int), default=10, help="bits in each string")
    parser.add_argument("--n_samples", type=positive(int), default=1000, help="random strings, 4/5 of them to train on")
    parser.add_argument("--d_model", type=positive(int), default=8, help="width of the model")
    parser.add_argument("--d_key", type=positive(int), default=8, help="width of queries and keys")
    parser.add_argument("--n_heads", type=positive(int), default=2, help="heads in each block")
    parser.add_argument("--mlp_factor", type=positive(int), default=4, help="hidden width of the MLP / d_model")
    parser.add_argument("--n_layers", type=int, default=2, help="blocks, may be 0")
    parser.add_argument("--lr", type=positive(float), default=0.006, help="peak learning rate")
    parser.add_argument("--steps", type=positive(int), default=650, help="training steps at most; stops when done")
    parser.add_argument("--batch_size", type=positive(int), default=800, help="strings in each step")
    parser.add_argument("--sweep", action="store_true", help="find the smallest model; of these uses only --seq_len")
    args = parse_args(parser)
    torch.set_num_threads(1)  # threading overhead dominates at this size
    if args.sweep:
        smallest_95, smallest_all = sweep(args)
        print(f"result: {smallest_95=} {smallest_all=} seconds={time.perf_counter() - start:.1f}")
        sys.exit()

    x = torch.randint(2, (args.n_samples, args.seq_len))                    # (N, T)
    counts = x.sum(dim=1).to(args.device)                                   # (N,)
    n_train = args.n_samples * 4 // 5
    sizes = args.d_model, args.d_key, args.n_heads, args.mlp_factor, args.n_layers
    model = TransformerClassifier(2, 2, *sizes).to(args.device)
    params = sum(p.numel() for p in model.parameters())
    print(f"{params:,} parameters, {n_train:,} strings to train on, {args.n_samples - n_train:,} to validate")

    # The plateau: parity is uncorrelated with all polynomials of the count of degree below T, so until f is a sawtooth,
    # gradients are tiny, and small batches drown them in noise. Then they grow tenfold within a few steps. The default
    # beta2 = 0.999 averages their squares over 1,000 steps, lags behind, and the update overshoots. 0.9 adapts in ten.
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.9))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, cycle_momentum=False)
    strings, _, _ = one_string_per_count(args.seq_len, args.device)         # (T+1, T)
    n_low = 0
    for step in range(args.steps):
        rows = torch.randint(n_train, (args.batch_size,)) if args.batch_size < n_train else torch.arange(n_train)
        # Equals model(x[rows]) up to rounding, but five times faster: only one string per count goes through the model.
        logits = model(strings)[counts[rows]]                               # (B, 2)
        loss = F.cross_entropy(logits, counts[rows] % 2)
        if step == 0:
            print(f"step 0: loss {loss:.4f}, uniform prediction ln 2 = {math.log(2):.4f}")
        elif step % 50 == 0:
            accuracy_all, _, _ = exact_accuracy(model, args.seq_len)
            print(f"step {step}: loss {loss:.4f}, accuracy on all strings {accuracy_all:.4f}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        n_low = n_low + 1 if loss < 0.002 else 0                            # done after 5 low losses in a row
        if n_low == 5:
            break

    accuracy_all, correct, _ = exact_accuracy(model, args.seq_len)
    accuracy_val = correct[counts[n_train:].cpu()].float().mean().item()          # right if the count is
    print(f"step {step + 1}: loss {loss:.4f}, wrong counts of ones: {(~correct).nonzero().flatten().tolist()}")
    path = os.path.join(args.out_dir, "parity.pt")
    torch.save({"sizes": sizes, "weights": model.state_dict()}, path)
    print(f"saved {path}")
    if args.n_layers > 0:
        plot_heads(model, args.seq_len, os.path.join(args.out_dir, "parity_heads.png"))
    print(f"result: {accuracy_val=:.4f} {accuracy_all=:.4f} {params=} seconds={time.perf_counter() - start:.1f}")
