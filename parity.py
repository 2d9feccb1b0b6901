"""Can a Transformer encoder tell odd from even, and how small may it be?
The input is a string of bits, the class is its parity: 1 if the number of ones is odd, else 0. A Transformer encoder
built from its parts (attention, multi-head attention, block, classifier) learns it from 800 random strings.

It is a harder task than it looks. The answer changes with every single bit, so nothing less than all of them helps, and
the loss stays near ln 2 for a hundred steps or more before it suddenly falls. And the model has no positions: it cannot
tell 0011 from 1010. For parity that is no loss, since the order of the bits does not matter, and it has three
consequences:

  * Of the 2^T strings of length T the model sees only T + 1 different ones, one for each number of ones. So its
    accuracy need not be estimated on a test set: it is *computed*, over all 2^T strings, from T + 1 of them.
  * About half of the 200 validation strings also occur among the 800 training strings, and nearly all the others are a
    training string in another order. `accuracy_all`, the computed one, is the number to believe.
  * A string and the same string written twice have the same logits (the outputs, one for each class, whose softmax are
    the probabilities) at any width and any depth: attention is a weighted mean over the tokens, at the end the plain
    mean over them is taken (pooling), and doubling every token changes no weighted mean. But the doubled string is
    always even. So no member of this family, however large, is right at all strings of both length T
    and length 2T, and none computes parity for *all* lengths.

    python parity.py                    two blocks of width 8, 2,426 parameters, strings of length 10
    python parity.py --d_model 16       a wider one
    python parity.py --sweep            the smallest configuration that still works, in a few minutes

You will see the loss start near ln 2 and the accuracy over all 1,024 strings go from 0.5 to nearly 1, and two pictures
in out/: the curves beside the sawtooth that the model has learned (the difference of its two logits against the number
of ones), and what its heads attend to.

The sweep's answer. 100 parameters (d_model 3, everything else 1) get all 1,024 strings right, and 58 parameters
(d_model 2) all but one. Few seeds get there: a LayerNorm over two features is nearly a sign function, and gradients see
little of a sign. With d_model 1 it cannot work: a LayerNorm over one feature subtracts the feature from itself and
returns its bias whatever comes in, so the final one hands the same number to the classifier for every string, and
parity is odd for exactly half of them. As every other size is 1 already, 58 is the smallest with a block that can work
at all. Without a block mean pooling alone can count, at a fixed length: 122 parameters (width 8) get all but one right.

Transformers *with* positions can do more, but not with one layer: no one-layer Transformer computes it for all lengths
(Kozachinskiy, Steifer and Walega 2026, https://arxiv.org/abs/2602.05896, version 2). With two layers there is a
construction (Chiang and Cholak 2022, https://arxiv.org/abs/2202.12172). Learning it is another matter: one bit among T
moves the output of soft attention by no more than about 1 / T (Hahn 2020, https://arxiv.org/abs/1906.06755).

The model is the encoder of Vaswani et al. 2017, "Attention Is All You Need" (https://arxiv.org/abs/1706.03762) without
positions and dropout, with SiLU for ReLU, heads as wide as the model, and the LayerNorms moved in front of the
sublayers, as in Xiong et al. 2020 (https://arxiv.org/abs/2002.04745).
"""

import collections
import math
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from attention import attention, check_finite, fail, make_parser, number, plot_attention, print_first_loss, \
    print_result, progress, run, save_figure, save_weights, start

# ----------------------------------------------------------------------------------------------------------------------
# The model. B strings, T bits in each; every module but the last keeps the shape (B, T, d_model).


class SelfAttention(nn.Module):
    """One head: every token asks all tokens (Vaswani et al. 2017, section 3.2.1). (B, T, d_model) -> same shape."""

    def __init__(self, d_model, d_key):
        super().__init__()
        self.w_q = nn.Linear(d_model, d_key)
        self.w_k = nn.Linear(d_model, d_key)
        self.w_v = nn.Linear(d_model, d_model)

    def forward(self, x):
        query, key, value = self.w_q(x), self.w_k(x), self.w_v(x)        # (B, T, d_key) twice, (B, T, d_model)
        output, _ = attention(query, key, value)                         # (B, T, d_model)
        return output


class MultiHeadSelfAttention(nn.Module):
    """Several heads side by side, mixed by one linear map (section 3.2.2). (B, T, d_model) -> same shape.

    Each head is a module of its own because that is how the formula reads; `nn.MultiheadAttention` computes all heads
    in one matrix product, and lets each return only d_model / n_heads numbers.
    """

    def __init__(self, d_model, d_key, n_heads):
        super().__init__()
        self.heads = nn.ModuleList(SelfAttention(d_model, d_key) for _ in range(n_heads))
        self.w_o = nn.Linear(n_heads * d_model, d_model)

    def forward(self, x):
        x = torch.cat([head(x) for head in self.heads], dim=-1)          # (B, T, n_heads * d_model)
        return self.w_o(x)                                               # (B, T, d_model)


class TransformerBlock(nn.Module):
    """Attention mixes the tokens, then an MLP works on each alone; both *add* to x. (B, T, d_model) -> same shape.

    The MLP is two linear maps with SiLU(x) = x * sigmoid(x) between them. LayerNorm takes each token alone: subtract
    the mean of its features, divide by their standard deviation, then scale and shift by learned numbers. It stands
    before attention and before the MLP (pre-norm), so x itself is only ever added to (the residual connection), and the
    gradient has a direct way back through the sums.
    """

    def __init__(self, d_model, d_key, n_heads, mlp_factor=4):
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.attn = MultiHeadSelfAttention(d_model, d_key, n_heads)
        self.ln2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, mlp_factor * d_model), nn.SiLU(),
                                 nn.Linear(mlp_factor * d_model, d_model))

    def forward(self, x):
        x = x + self.attn(self.ln1(x))                                   # (B, T, d_model)
        x = x + self.mlp(self.ln2(x))                                    # (B, T, d_model)
        return x


class TransformerClassifier(nn.Module):
    """Token numbers (B, T) -> logits (B, n_classes). There is no positional encoding: the order is invisible."""

    def __init__(self, n_embeds, n_classes, d_model=256, d_key=64, n_heads=4, mlp_factor=4, n_layers=2):
        super().__init__()
        self.token_embedding = nn.Embedding(n_embeds, d_model)
        self.transformer_model = nn.Sequential(*[TransformerBlock(d_model, d_key, n_heads, mlp_factor)
                                                 for _ in range(n_layers)])
        self.final_layer_norm = nn.LayerNorm(d_model)
        self.classifier = nn.Sequential(nn.Linear(d_model, d_model), nn.SiLU(), nn.Linear(d_model, n_classes))

    def forward(self, tokens):
        x = self.token_embedding(tokens)                                 # (B, T, d_model)
        x = self.transformer_model(x)                                    # (B, T, d_model)
        x = self.final_layer_norm(x).mean(dim=1)                         # (B, d_model)
        return self.classifier(x)                                        # (B, n_classes)


# ----------------------------------------------------------------------------------------------------------------------
# Data, and an accuracy without a test set


def make_strings(n_samples, seq_len):
    """Random bit strings (B, T) and their parities (B,), both integers; B = n_samples, T = seq_len."""
    strings = torch.randint(2, (n_samples, seq_len))                     # (B, T)
    return strings, strings.sum(dim=1) % 2                               # (B, T), (B,)


def one_string_per_count(seq_len):
    """Strings with 0, 1, ..., seq_len ones (T+1, T), their parities (T+1,), and their shares of all 2^T strings (T+1,).

    Of the 2^T strings, binomial(T, c) have c ones, and the model cannot tell these apart.
    """
    counts = torch.arange(seq_len + 1)                                   # (T+1,)
    strings = (torch.arange(seq_len) < counts.unsqueeze(1)).long()       # (T+1, T)
    shares = torch.tensor([math.comb(seq_len, c) / 2 ** seq_len for c in range(seq_len + 1)])    # (T+1,)
    return strings, counts % 2, shares


@torch.no_grad()
def exact_accuracy(model, seq_len):
    """The share of all 2^seq_len strings that `model` gets right, and whether it does so with c ones (T+1,)."""
    strings, parities, shares = (t.to(next(model.parameters()).device) for t in one_string_per_count(seq_len))
    correct = model(strings).argmax(dim=1) == parities                   # (T+1,)
    return shares[correct].sum().item(), correct


# ----------------------------------------------------------------------------------------------------------------------
# Training
#
# Why does it so often fail, and what helps? Parity has a plateau: no polynomial of the number of ones, of any degree
# below T, is correlated with it at all, so until the model zigzags its gradients are tiny.
#  - All 800 strings in every step: what little gradient there is would drown in the noise of small batches.
#  - Adam divides each gradient by a running mean of its size, which by default (beta2 = 0.999) looks back 1,000 steps.
#    When the way out opens, the gradients grow many times over within a few steps, are still divided by the tiny ones
#    of the plateau, and throw the model past the exit. With beta2 = 0.9 it looks back 10.
#  - Clipping the gradient bounds the worst of these leaps, and the learning rate rises first (to leave the plateau) and
#    falls to zero (to settle: a zigzag through 11 points is steep).


def train(model, strings, parities, args):
    """Train on strings (B, T) until the loss stays low or the steps are done; return a list of (step, loss, accuracy).

    The accuracy is that over all 2^T strings, computed every ten steps and at the end. Of args it takes seq_len, lr,
    steps, batch_size, weight_decay and device.
    """
    batch_size = min(args.batch_size, len(strings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.9), weight_decay=args.weight_decay,
                                  fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, cycle_momentum=False)
    history, n_low, report = [], 0, progress(args.steps)
    for step in range(args.steps):
        rows = slice(None)
        if batch_size < len(strings):
            rows = torch.randint(len(strings), (batch_size,), device=args.device)         # (B,)
        loss = F.cross_entropy(model(strings[rows]), parities[rows])     # (B, 2), (B,) -> ()
        if step == 0:
            print_first_loss(loss.item(), 2)
        if step % 10 == 0:
            history.append((step, loss.item(), exact_accuracy(model, args.seq_len)[0]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        check_finite([loss], step + 1)
        report(step + 1, loss=loss.item(), accuracy=history[-1][2])
        n_low = n_low + 1 if loss < 0.002 else 0
        if n_low == 5:
            break
    check_finite(model.parameters(), step + 1)
    history.append((step + 1, loss.item(), exact_accuracy(model, args.seq_len)[0]))
    print(f"ended after {step + 1} steps: loss {loss.item():.4f}")
    return history


# ----------------------------------------------------------------------------------------------------------------------
# The smallest configuration: many seeds of one configuration at once, down a ladder of sizes
#
# The sweep asks what can be *learned*, not whether it generalises: it trains on the whole distribution of inputs, all
# 2^T strings, which is to say on T + 1 of them weighted by their shares. Models this small leave a computer idle, so
# up to 256 of them are trained side by side.

SWEEP_STEPS = 2000
LADDER = [  # d_model, d_key, n_heads, mlp_factor, n_layers; how many seeds
    ((8, 8, 2, 4, 2), 8),
    ((8, 4, 1, 1, 1), 32),
    ((3, 1, 1, 1, 1), 64),
    ((2, 1, 1, 1, 1), 256),
    ((1, 1, 1, 1, 1), 4),
    ((8, 1, 1, 1, 0), 64),  # no block at all: d_key, n_heads and mlp_factor mean nothing here
    ((5, 1, 1, 1, 0), 64),
    ((2, 1, 1, 1, 0), 64),
]


Rung = collections.namedtuple("Rung", "sizes params best weights")      # best: the accuracy of each seed


def train_many(sizes, seeds, seq_len, steps, device, lr=0.01):
    """Train one model for each seed, all at once; returns each one's best accuracy (S,) and its weights at that moment.

    A string counts as right only if its logits are at least 0.001 apart. Without that, chance wins: where all logits
    are equal but for rounding, each step draws 11 random answers, and one such draw in 2^11 = 2,048 is all right.
    """
    strings, parities, shares = (t.to(device) for t in one_string_per_count(seq_len))
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(TransformerClassifier(2, 2, *sizes).to(device))
        for p in models[-1].classifier[0].parameters():
            p.data *= 10    # another 1 in the string moves the mean by about 1 / T only, so the classifier starts steep
    weights, _ = torch.func.stack_module_state(models)                   # each (S, ...): a slice for each of S seeds
    # vmap runs for all slices at once what is written for one: the logits are (S, T+1, 2)
    forward = torch.func.vmap(lambda one: torch.func.functional_call(models[0], one, (strings,)))
    # Adam works number by number, so no model disturbs another; and its beta2 is small again.
    optimizer = torch.optim.Adam(weights.values(), lr=lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    best = torch.zeros(len(models), device=device)                       # (S,)
    kept = {name: value.detach().clone() for name, value in weights.items()}
    for _ in range(steps):
        margins = forward(weights).diff(dim=-1).squeeze(-1) * (2 * parities - 1)         # (S, T+1) above 0 is right
        with torch.no_grad():  # the smallest models do not stay where they work, so keep the best moment of each
            accuracy = ((margins > 0.001) * shares).sum(dim=1)           # (S,)
            better = accuracy > best
            best[better] = accuracy[better]
            for name, value in weights.items():
                kept[name][better] = value[better]
        optimizer.zero_grad()
        (F.softplus(-margins) * shares).sum().backward()                 # with two classes -ln p(right), cross-entropy
        gradients = [value.grad for value in weights.values()]           # each (S, ...)
        norms = sum(g.flatten(1).square().sum(dim=1) for g in gradients).sqrt()          # (S,)
        for g in gradients:                                              # clip each model's gradient to norm 1
            g /= norms.clamp_min(1.0).view(-1, *[1] * (g.ndim - 1))
        optimizer.step()
        scheduler.step()
    return best, kept


def check_on_all_strings(sizes, weights, seq_len):
    """Accuracy over all 2^seq_len real strings in float64, and the smallest distance between the two logits."""
    model = TransformerClassifier(2, 2, *sizes)
    model.load_state_dict(weights)
    strings = torch.cartesian_prod(*[torch.arange(2)] * seq_len).view(-1, seq_len)       # (2^T, T)
    with torch.no_grad():
        logits = model.double()(strings)                                 # (2^T, 2)
    correct = logits.argmax(dim=1) == strings.sum(dim=1) % 2             # (2^T,)
    return correct.double().mean().item(), logits.diff(dim=1).abs().min().item()


def sweep(args):
    """Train every rung of the ladder, print the table, draw it; check and save the smallest models that work."""
    print("d_model  d_key  n_heads  mlp_factor  n_layers | params  seeds    best  median  > 0.95  all right")
    rungs = []
    for sizes, n_seeds in LADDER:
        best, weights = train_many(sizes, range(args.seed, args.seed + n_seeds), args.seq_len, SWEEP_STEPS, args.device)
        weights = {name: value[best.argmax()].cpu().clone() for name, value in weights.items()}
        params = sum(value.numel() for value in weights.values())
        print("{:7} {:6} {:8} {:11} {:9} |".format(*sizes), f"{params:6} {n_seeds:6} {best.max():7.4f}",
              f"{best.median():7.4f} {(best > 0.95).float().mean():7.3f} {(best == 1).float().mean():10.3f}",
              flush=True)
        rungs.append(Rung(sizes, params, best.cpu(), weights))
    plot_sweep(rungs, os.path.join(args.out_dir, "parity_sweep.png"), args.show)
    accuracy, params = math.nan, 0
    for threshold in (1.0, 0.95):
        working = [rung for rung in rungs if rung.sizes[-1] > 0 and rung.best.max() >= threshold]
        if not working:
            print(f"no model with a block reached {threshold}: try another --seed")
            continue
        sizes, params, _, weights = min(working, key=lambda rung: rung.params)
        accuracy, margin = check_on_all_strings(sizes, weights, args.seq_len)
        path = os.path.join(args.out_dir, f"parity_{params}.pt")
        save_weights(path, sizes=sizes, weights=weights)
        print(f"smallest with a block and accuracy >= {threshold}: {params} parameters, saved: {path}\n    in float64 "
              f"on all {2 ** args.seq_len:,} strings: accuracy {accuracy:.6f}, logits at least {margin:.2g} apart")
    return accuracy, params


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def plot_sweep(rungs, path, show):
    """Accuracy against parameters, one dot for each seed, models with a block beside models without."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for with_block, label, style, color in ((True, "best, at least one block", "o-", "tab:blue"),
                                            (False, "best, no block: mean pooling alone", "s--", "tab:orange")):
        chosen = sorted((rung for rung in rungs if (rung.sizes[-1] > 0) == with_block), key=lambda rung: rung.params)
        for rung in chosen:
            axis.plot([rung.params] * len(rung.best), rung.best.tolist(), style[0], color=color, alpha=0.3,
                      markersize=4, markeredgewidth=0)
        axis.plot([rung.params for rung in chosen], [rung.best.max().item() for rung in chosen], style, color=color,
                  label=label)
    axis.axhline(0.95, color="grey", linestyle=":", label="accuracy 0.95")
    axis.set(xscale="log", title="pale: every seed; lines: the best of them", xlabel="parameters",
             ylabel="accuracy over all strings")
    axis.set_xticks([rung.params for rung in rungs], [rung.params for rung in rungs], rotation=90, fontsize=7)
    axis.minorticks_off()
    axis.legend(loc="lower right")
    save_figure(figure, path, show)


def plot_training(model, history, seq_len, path, show):
    """Left: loss and accuracy over training. Right: the sawtooth, logit difference against the number of ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps, losses, accuracies = zip(*history)
    left.plot(steps, losses, color="tab:blue", label="training loss")
    left.axhline(math.log(2), color="grey", linestyle=":", label="ln 2: the loss of knowing nothing")
    left.plot(steps, accuracies, "--", color="tab:orange", label=f"accuracy over all 2^{seq_len} strings")
    left.set(title="training", xlabel="step", ylabel="loss, accuracy", ylim=(-0.03, 1.08))
    left.legend()
    strings, parities, _ = (t.to(next(model.parameters()).device) for t in one_string_per_count(seq_len))
    with torch.no_grad():
        difference = model(strings).diff(dim=1).squeeze(1).tolist()      # (T+1,) logit of odd - logit of even
    right.axhline(0, color="grey", linewidth=0.8)
    right.plot(range(seq_len + 1), difference, color="lightgrey", zorder=0)
    for parity, name, marker in ((0, "even", "o"), (1, "odd", "^")):
        right.scatter(range(parity, seq_len + 1, 2), difference[parity::2], marker=marker, label=f"{name}: should be "
                      + ("above 0" if parity else "below 0"))
    right.set(xlabel="number of ones in the string", ylabel="logit(odd) - logit(even)", title="the learned sawtooth")
    right.legend()
    save_figure(figure, path, show)


@torch.no_grad()
def plot_heads(model, seq_len, path, show):
    """Draw what the heads of the first two blocks attend to, in two strings that differ in one bit."""
    device = next(model.parameters()).device
    strings = (torch.arange(seq_len) % 3 == 1).long().repeat(2, 1).to(device)              # (2, T)
    strings[1, -1] = 1 - strings[1, -1]
    x = model.token_embedding(strings)                                   # (2, T, d_model)
    panels, titles = [], []
    for n, block in enumerate(model.transformer_model[:2]):
        h = block.ln1(x)                                                 # (2, T, d_model)
        for i, head in enumerate(block.attn.heads[:4]):
            panels.append(attention(head.w_q(h), head.w_k(h), head.w_v(h))[1])             # (2, T, T)
            titles += [f"block {n + 1}, head {i + 1}, string {k}" for k in (1, 2)]
        x = block(x)                                                     # (2, T, d_model)
    labels = strings.tolist() * len(panels)
    plot_attention(torch.cat(panels), labels, labels, path, titles, show=show)             # (2 * panels, T, T)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """Train one classifier and draw what it learned, or sweep for the smallest one."""
    parser = make_parser(__doc__)
    parser.add_argument("--seq_len", type=number(int, 1, 500), default=10, help="bits in each string")
    parser.add_argument("--n_samples", type=number(int, 5, 10 ** 6), default=1000, help="random strings, 4/5 to train")
    parser.add_argument("--d_model", type=number(int, 1, 4096), default=8, help="width of the model")
    parser.add_argument("--d_key", type=number(int, 1, 4096), default=8, help="width of queries and keys")
    parser.add_argument("--n_heads", type=number(int, 1, 64), default=2, help="heads in each block")
    parser.add_argument("--mlp_factor", type=number(int, 1, 64), default=4, help="hidden width of the MLP / d_model")
    parser.add_argument("--n_layers", type=number(int, 0, 64), default=2, help="blocks")
    parser.add_argument("--lr", type=number(float, 0, 1e30), default=0.006, help="highest learning rate")
    parser.add_argument("--steps", type=number(int, 1, 10 ** 7), default=650, help="training steps at most")
    parser.add_argument("--batch_size", type=number(int, 1, 10 ** 9), default=800, help="strings in each step")
    parser.add_argument("--weight_decay", type=number(float, 0, 1e3), default=0.0, help="weight decay of AdamW")
    parser.add_argument("--sweep", action="store_true", help="find the smallest configuration (of the options above "
                        "only --seq_len matters)")
    args = start(parser, argv)
    if args.sweep:
        if args.seq_len > 16:
            fail("argument --seq_len: the sweep tries all 2^seq_len strings, so it takes at most 16")
        accuracy, params = sweep(args)
        print_result(args, accuracy_all=accuracy, params=params)
        return
    strings, parities = (t.to(args.device) for t in make_strings(args.n_samples, args.seq_len))  # (B, T), (B,)
    n_train = args.n_samples * 4 // 5
    train_x, train_y, val_x = strings[:n_train], parities[:n_train], strings[n_train:]
    sizes = args.d_model, args.d_key, args.n_heads, args.mlp_factor, args.n_layers
    model = TransformerClassifier(2, 2, *sizes).to(args.device)
    params = sum(p.numel() for p in model.parameters())
    print(f"{params:,} parameters, {n_train:,} strings to train on, {len(val_x):,} to validate")
    history = train(model, train_x, train_y, args)

    accuracy_all, correct = exact_accuracy(model, args.seq_len)
    accuracy_val = correct[val_x.sum(dim=1)].float().mean().item()       # the number of ones decides
    seen = set(map(tuple, train_x.tolist()))
    repeats = sum(tuple(string) in seen for string in val_x.tolist()) / len(val_x)
    print(f"validation: accuracy {accuracy_val:.4f} on {len(val_x)} strings, {repeats:.0%} of them seen in training")
    wrong = [count for count, right in enumerate(correct.tolist()) if not right]
    print(f"all 2^{args.seq_len} strings, computed: accuracy {accuracy_all:.4f}, wrong for",
          f"those with {', '.join(map(str, wrong))} ones" if wrong else "none")
    path = os.path.join(args.out_dir, "parity.pt")
    save_weights(path, sizes=sizes, weights=model.state_dict())
    print("saved:", path)
    plot_training(model, history, args.seq_len, os.path.join(args.out_dir, "parity_training.png"), args.show)
    if args.n_layers > 0:
        plot_heads(model, args.seq_len, os.path.join(args.out_dir, "parity_heads.png"), args.show)
    print_result(args, accuracy_val=accuracy_val, accuracy_all=accuracy_all, params=params)


if __name__ == "__main__":
    run(main)
