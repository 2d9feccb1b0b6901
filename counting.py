"""
Train one attention layer to count how often each digit occurs in a sequence, and look at what it has learned.

    1 0 2 1 0 1 1 0 1 2  ->  3 zeros, 5 ones, 2 twos

The layer has one trainable query for each digit. The query for digit d should attend to every d and to nothing else,
and with a single layer the attention weights show directly whether it does. Softmax would make the weights of a query
sum to 1: its output is a mean, which stays the same if the sequence is written twice. Here a sigmoid gates each key
independently, and the output is a sum with one term for every d in the sequence. --compare trains both.

$ python counting.py                                     # train, count, plot the attention weights
$ python counting.py --sequence "1 0 2 1 0 1 1 0 1 2"    # count this sequence with the saved model
$ python counting.py --activation softmax                # the same with softmax
$ python counting.py --compare                           # both, trained at one length and at all lengths

Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
https://arxiv.org/abs/2409.04431
"""

import argparse
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention, parse_args, plot_attention, positive


# ----------------------------------------------------------------------------------------------------------------------
# The model. B sequences of T digits out of V different ones. L is the maximum length, and so the maximum count.
class CountingModel(nn.Module):
    """One-hot digits (B, T, V) -> logits for the counts 0 ... L of each digit (B, V, L+1), and the weights (B, V, T).

    T may be 1 to L = sequence_length. The layer does not see positions, so the order of the digits has no effect.
    """

    def __init__(self, vocab_size, sequence_length, hidden, activation="sigmoid"):
        super().__init__()
        self.activation = activation
        self.query = nn.Parameter(torch.randn(1, vocab_size, hidden))      # (1, V, hidden), the same for all sequences
        self.key = nn.Linear(vocab_size, hidden)
        self.value = nn.Linear(vocab_size, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, sequence_length + 1)

    def forward(self, x):
        output, weights = attention(self.query, self.key(x), self.value(x), activation=self.activation)
        return self.out(self.norm(output + self.query)), weights           # (B, V, L+1), (B, V, T)


# ----------------------------------------------------------------------------------------------------------------------
# Data
def make_sequences(n, length, vocab_size, device="cpu"):
    """Random digits (n, length) such that all combinations of counts are equally likely.

    With uniform digits, ten equal digits occur once in 3^9 = 19,683 sequences, too rarely to learn a count of 10. So
    the digit probabilities are drawn anew for each sequence, from the uniform Dirichlet distribution.
    """
    probabilities = torch.distributions.Dirichlet(torch.ones(n, vocab_size, device=device)).sample()     # (n, V)
    return torch.multinomial(probabilities, length, replacement=True)      # (n, T)


def all_sequences(length, vocab_size):
    """All V^T sequences (N, T), or 20,000 random ones if there are more than two million."""
    if vocab_size ** length > 2_000_000:
        return torch.randint(vocab_size, (20_000, length))
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * length).view(-1, length)


@torch.no_grad()
def accuracy(model, digits, vocab_size):
    """The fraction of the sequences (N, T) with every count right."""
    n_right = 0
    for part in digits.to(model.query.device).split(10_000):
        x = F.one_hot(part, vocab_size).float()                            # (B, T, V)
        n_right += (model(x)[0].argmax(dim=-1) == x.sum(dim=1)).all(dim=1).sum().item()
    return n_right / len(digits)


# ----------------------------------------------------------------------------------------------------------------------
# Training
def train(args, activation, all_lengths=True, verbose=False):
    """Train a model on random sequences: half of each batch has length L, the other half a random length up to L.

    Without `all_lengths` all sequences have length L. Then 3 zeros mean 7 other digits, and a query may as well attend
    to everything but its own digit. Several lengths rule that out.
    """
    V, L = args.vocab_size, args.sequence_length
    model = CountingModel(V, L, args.hidden, activation).to(args.device)
    # Occasionally all scores of a query become so negative that its sigmoids saturate at 0: no gradient, and that digit
    # is never counted. Weight decay on the key layer shrinks the scores until gradients return.
    rest = [p for name, p in model.named_parameters() if not name.startswith("key.")]
    optimizer = torch.optim.Adam([{"params": model.key.parameters(), "weight_decay": 1e-3}, {"params": rest}], args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, cycle_momentum=False)

    for step in range(args.steps):
        lengths = (L, torch.randint(1, L + 1, ()).item() if all_lengths else L)
        digits = [make_sequences(args.batch_size, length, V, args.device) for length in lengths]
        x = [F.one_hot(half, V).float() for half in digits]                # 2 x (B, T, V)
        counts = torch.cat([half.sum(dim=1) for half in x]).long()         # (2B, V)
        logits = torch.cat([model(half)[0] for half in x])                 # (2B, V, L+1)
        loss = F.cross_entropy(logits.flatten(0, 1), counts.flatten())
        if verbose and step == 0:
            print("training sequences:", *digits[0][:3].tolist(), sep="\n")
            print(f"step 0: loss {loss:.4f}, uniform prediction ln {L + 1} = {math.log(L + 1):.4f}")
        elif verbose and step % 200 == 0:
            print(f"step {step}: loss {loss:.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# What it has learned
#
# How does a count get through LayerNorm and a single linear layer? If the query for 0 attends to 0s alone, the vector
# before LayerNorm is
#     query[0] + count * weight * value(0),
# so as the count grows, it moves along a straight line in equal steps. LayerNorm (without its scale and bias) gives all
# these vectors the same length: points on a sphere, at these angles to the first (printed by the default run):
#     count     0    1    2    3    4    5    6    7    8    9   10
#     angle     0    7   18   36   64   92  111  122  129  134  137
# The steps are no longer equal, but no two points coincide. Give `out` one row for each count, in the direction of its
# point, all equally long: the closest row has the largest logit. The added query matters: without it, all counts above
# 0 would give the same direction.
@torch.no_grad()
def angles(model, other, length):
    """How far the normalized vector of the query for 0 turns as the count of 0s grows: angles in degrees (L+1,).

    The sequences have `length` digits, 0 to `length` of them zeros, the rest `other`.
    """
    digits = torch.tensor([[0] * count + [other] * (length - count) for count in range(length + 1)])     # (L+1, L)
    x = F.one_hot(digits, model.key.in_features).float().to(model.query.device)              # (L+1, L, V)
    query = model.query[:, :1]                                             # (1, 1, hidden)
    output, _ = attention(query, model.key(x), model.value(x), activation=model.activation)
    normalized = F.layer_norm(output + query, query.shape[-1:]).squeeze(1)                   # (L+1, hidden)
    return F.cosine_similarity(normalized, normalized[:1]).clamp(-1, 1).acos().rad2deg()


@torch.no_grad()
def show_counts(models, titles, digits, vocab_size, path):
    """Print each model's counts for one sequence and plot its weights: a good row is bright at its own digit only."""
    x = F.one_hot(torch.tensor([digits]), vocab_size).float().to(models[0].query.device)     # (1, T, V)
    true = [digits.count(digit) for digit in range(vocab_size)]
    weights, labels = [], []
    print("sequence:", *digits, " true counts:", *true)
    for model, title in zip(models, titles):
        logits, model_weights = model(x)                                   # (1, V, L+1), (1, V, T)
        predicted = logits[0].argmax(dim=-1).tolist()
        print(f"{title}: counts", *predicted)
        weights.append(model_weights)
        labels.append([f"{digit}: {predicted[digit]} (true {true[digit]})" for digit in range(vocab_size)])
    plot_attention(torch.cat(weights), digits, labels, path, titles, x_name="sequence", y_name="digit: count")


# ----------------------------------------------------------------------------------------------------------------------
# Sigmoid or softmax?
#
# All lengths: softmax cannot count. Write a sequence twice in a row: every count doubles, and every weighted mean stays
# the same. Nothing after attention, neither the added query nor LayerNorm, depends on the length.
#
# One length: the counts are not lost, since 3 of 10 is a proportion. Without LayerNorm, however, a linear readout of
# the mean cannot recover them. Take sequences of 0s and 1s only. The more 0s, the more weight w they get, under *both*
# queries, because the weights sum to 1. Every logit is linear in w, with the same slope under both queries, which share
# `value` and `out`. As w grows, logits with greater slopes overtake. The query for 0 must move to higher counts, so
# these need greater slopes; the query for 1 must move to lower counts, so higher counts need smaller slopes. Both at
# once is impossible. Under sigmoid, the query for 1 simply gives the 0s no weight.
# LayerNorm is not linear: it divides by the norm of the centered vector. With it, test_all.py constructs softmax
# parameters that count all 3^10 = 59,049 sequences. In --compare, training does not find them.
def compare(args, digits, n_seeds=3):
    """Train both activations at one and at all lengths; return their accuracy at length L, trained at all lengths."""
    V, L = args.vocab_size, args.sequence_length
    print(f"fraction of the sequences with every count right, by their length; mean of {n_seeds} seeds")
    print(f"{'':9} {'trained at':>12} |", *(f"{length:5}" for length in range(1, L + 1)), f"| all right at length {L}")
    models, titles, means = [], [], {}
    for activation in ("sigmoid", "softmax"):
        for lengths in (f"length {L}", f"lengths 1-{L}"):
            rows = []
            for seed in range(args.seed, args.seed + n_seeds):
                torch.manual_seed(seed)
                model = train(args, activation, all_lengths=lengths != f"length {L}")
                rows.append([accuracy(model, all_sequences(length, V), V) for length in range(1, L + 1)])
                if seed == args.seed:
                    models.append(model)
                    titles.append(f"{activation}, trained at {lengths}")
            n_exact = sum(row[-1] == 1 for row in rows)
            means[activation] = torch.tensor(rows).mean(dim=0).tolist()    # L numbers
            print(f"{activation:9} {lengths:>12} |", *(f"{mean:5.3f}" for mean in means[activation]),
                  f"| {n_exact} of {n_seeds} seeds", flush=True)
    show_counts(models, titles, digits, V, os.path.join(args.out_dir, "counting_compare.png"))
    return means["sigmoid"][-1], means["softmax"][-1]


if __name__ == "__main__":
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocab_size", type=positive(int), default=3, help="number of different digits")
    parser.add_argument("--sequence_length", type=positive(int), default=10, help="maximum length of a sequence")
    parser.add_argument("--hidden", type=positive(int), default=16, help="width of queries, keys and values")
    parser.add_argument("--activation", choices=["sigmoid", "softmax"], default="sigmoid",
                        help="turns scores into weights")
    parser.add_argument("--lr", type=positive(float), default=0.03, help="peak learning rate")
    parser.add_argument("--steps", type=positive(int), default=1000, help="training steps")
    parser.add_argument("--batch_size", type=positive(int), default=128, help="sequences of each length in a step")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--sequence", help="count these digits with the saved model; train first if there is none")
    modes.add_argument("--compare", action="store_true", help="train sigmoid and softmax, three seeds each")
    args = parse_args(parser)
    torch.set_num_threads(1)  # threading overhead dominates at this size
    torch.set_printoptions(precision=2, sci_mode=False)
    V, L = args.vocab_size, args.sequence_length
    digits = [digit % V for digit in [1, 0, 2, 1, 0, 1, 1, 0, 1, 2]][:L]
    if args.compare:
        sigmoid, softmax = compare(args, digits)
        print(f"result: accuracy_all={sigmoid:.4f} accuracy_all_softmax={softmax:.4f} "
              f"seconds={time.perf_counter() - start:.1f}")
        sys.exit()
    if args.sequence is not None:
        words = args.sequence.replace(",", " ").split()
        if not 1 <= len(words) <= L or not set(words) <= {str(digit) for digit in range(V)}:
            parser.error(f"argument --sequence: expected 1 to {L} digits from 0 to {V - 1}, separated by spaces")
        digits = [int(word) for word in words]

    path = os.path.join(args.out_dir, f"counting_{args.activation}.pt")
    if args.sequence is not None and os.path.exists(path):
        model = CountingModel(V, L, args.hidden, args.activation).to(args.device)
        try:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except RuntimeError:
            sys.exit(f"{path} does not fit --vocab_size {V} --sequence_length {L} --hidden {args.hidden}: "
                     "give the options it was trained with, or train again without --sequence")
    else:
        model = train(args, args.activation, verbose=True)
        torch.save(model.state_dict(), path)
        print(f"saved {path}")

    scores = [accuracy(model, all_sequences(length, V), V) for length in range(1, L + 1)]
    print(f"every count right, at length {L}: {scores[-1]:.4f} of {len(all_sequences(L, V)):,} sequences; "
          f"mean over lengths 1 to {L}: {sum(scores) / L:.4f}")
    for other in range(1, V):
        print(f"angles for 0 to {L} zeros, the rest {other}s:", *(f"{angle:.0f}" for angle in angles(model, other, L)))
    one_of_each = torch.eye(V, device=args.device).unsqueeze(0)            # (1, V, V), one-hot 0 1 2 ...
    print("weights of each query (row) on each digit (column):", model(one_of_each)[1][0].detach(), sep="\n")
    show_counts([model], [args.activation], digits, V, os.path.join(args.out_dir, f"counting_{args.activation}.png"))
    n_params = sum(p.numel() for p in model.parameters())
    print(f"result: accuracy_all={scores[-1]:.4f} params={n_params} seconds={time.perf_counter() - start:.1f}")
