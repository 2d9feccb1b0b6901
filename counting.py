"""
Train one attention layer to count how often each digit occurs in a sequence, and look at what it
has learned.

    1 0 2 1 0 1 1 0 1 2  ->  3 zeros, 5 ones, 2 twos

The layer has one learned query for each digit. The query for digit d should attend to every d and
to nothing else, and with a single layer the attention weights show directly whether it does.

A sigmoid turns each score into a weight on its own, so the output is a sum with one term for every
d. With softmax it would be a mean: the value of d alone or, if other digits get some weight, a
vector that depends on the fraction of d. Writing the sequence twice would not change it.

$ python counting.py                                     # train, count, plot the attention weights
$ python counting.py --sequence "1 0 2 1 0 1 1 0 1 2"    # train, then count this sequence
$ python counting.py --activation softmax                # softmax instead of sigmoid
$ python counting.py --compare                           # sigmoid, softmax, equal weights

Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
https://arxiv.org/abs/2409.04431 (They also subtract the logarithm of the length from the scores, so
that the size of the output does not depend on the length. Counting needs the plain sum.)
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
# The input is B sequences of T digits, drawn from V different digits. L is the maximum length, and
# so the maximum count. For each digit the model outputs L + 1 logits, one for each count 0 ... L,
# and the largest logit is its answer.
#
# Keys and values are linear maps of the one-hot digits. The queries are parameters, because the
# questions are always the same: how many 0s, how many 1s, ...? After attention, the query is added
# to the output and LayerNorm follows, as in a post-norm Transformer block. The queries start with
# small numbers, so all scores are near 0, and no query strongly prefers a digit. (With 1.0 instead
# of 0.3, a softmax query can settle on a wrong digit: see the exercise in README.md.)
class CountingModel(nn.Module):
    """One-hot digits (B, T, V) -> logits of the counts (B, V, L+1) and the weights (B, V, T).

    T may be 1 to L = sequence_length. The order of the digits has no effect.
    """

    def __init__(self, vocab_size, sequence_length, hidden, activation="sigmoid"):
        super().__init__()
        self.activation = activation
        self.query = nn.Parameter(0.3 * torch.randn(1, vocab_size, hidden))
        self.key = nn.Linear(vocab_size, hidden)
        self.value = nn.Linear(vocab_size, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, sequence_length + 1)

    def forward(self, x):
        key = self.key(x)                                                  # (B, T, hidden)
        value = self.value(x)                                              # (B, T, hidden)
        output, weights = attention(self.query, key, value, activation=self.activation)
        normalized = self.norm(output + self.query)                        # (B, V, hidden)
        return self.out(normalized), weights                               # (B, V, L+1), (B, V, T)


# --------------------------------------------------------------------------------------------------
# Data
def make_sequences(n, length, vocab_size):
    """Random digits (n, length) such that all combinations of counts are equally likely.

    With uniform digits, ten equal digits occur once in 3^9 = 19,683 sequences, so training would
    hardly see a count of 10. So each sequence has its own digit probabilities, from the uniform
    Dirichlet distribution: the lengths of the three pieces (for 3 digits) if the interval from 0 to
    1 is cut at two random places. To draw a digit, choose a random point and take the number of its
    piece. The two cuts and the ten points are twelve independent uniform numbers. Sort them: the
    cuts are equally likely to be any two of the twelve, and the counts are how many points lie
    before, between and after them.
    """
    # on the CPU, because torch before version 2.13 has no Dirichlet distribution for mps
    dirichlet = torch.distributions.Dirichlet(torch.ones(n, vocab_size))
    probabilities = dirichlet.sample()                                     # (n, V)
    return torch.multinomial(probabilities, length, replacement=True)      # (n, length)


def all_sequences(length, vocab_size):
    """All V^T sequences (N, T), or 20,000 random ones if there are more than 100,000."""
    if vocab_size ** length > 100_000:
        return torch.randint(vocab_size, (20_000, length))
    digits = [torch.arange(vocab_size)] * length
    return torch.cartesian_prod(*digits).view(-1, length)


@torch.no_grad()
def accuracy(model, digits, vocab_size):
    """The fraction of the sequences (N, T) with every count right."""
    digits = digits.to(model.query.device)
    x = F.one_hot(digits, vocab_size).float()                              # (N, T, V)
    counts = x.sum(dim=1)                                                  # (N, V)
    logits, _ = model(x)
    right = logits.argmax(dim=-1) == counts                                # (N, V)
    return right.all(dim=1).sum().item() / len(digits)


# --------------------------------------------------------------------------------------------------
# Training
def train(args, activation, all_lengths=True, verbose=False):
    """Train a model. `activation` is "sigmoid", "softmax" or "equal weights" (see `compare`).

    The sequences of a batch have the same length, because they form one tensor. With probability
    1/2 their length is L, because L has the most combinations of counts; otherwise it is random
    from 1 to L. Without `all_lengths` it is always L. Then 3 zeros always come with 7 other digits,
    and the query for 0 can just as well attend to everything but 0s. Several lengths rule that out.
    """
    V = args.vocab_size
    L = args.sequence_length

    # model and optimizer
    equal = activation == "equal weights"
    model = CountingModel(V, L, args.hidden, "sigmoid" if equal else activation)
    if equal:
        # with keys of 0, all scores are 0, so all weights are 1/2
        nn.init.zeros_(model.key.weight)
        nn.init.zeros_(model.key.bias)
        model.key.requires_grad_(False)
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    # the learning rate rises from args.lr / 25 to args.lr in the first 30% of the steps, then falls
    # to almost 0
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps,
                                                    cycle_momentum=False)

    # training loop
    for step in range(args.steps):
        # get a batch
        length = L
        if all_lengths and torch.rand(()) < 0.5:
            length = torch.randint(1, L + 1, ()).item()
        digits = make_sequences(args.batch_size, length, V).to(args.device)
        x = F.one_hot(digits, V).float()                                   # (B, length, V)
        counts = x.sum(dim=1).long()                                       # (B, V)

        # forward
        logits, _ = model(x)                                               # (B, V, L+1)
        loss = F.cross_entropy(logits.flatten(0, 1), counts.flatten())
        if not loss.isfinite():
            sys.exit(f"step {step}: the loss is {loss.item()}, try a smaller --lr")

        # backward and update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

        # log. The untrained `out` favors some counts by chance, so the first loss is a little above
        # or below ln(L + 1).
        if verbose and step == 0:
            print(f"step 0/{args.steps}: loss {loss:.4f}, "
                  f"uniform prediction ln {L + 1} = {math.log(L + 1):.4f}")
        elif verbose and step % 200 == 0:
            print(f"step {step}/{args.steps}: loss {loss:.4f}")
    return model


# --------------------------------------------------------------------------------------------------
# What it has learned
#
# The weights. The default run prints them: each query gives its own digit a weight of 0.40 to 0.58
# and every other digit at most 0.01. Why not 1 and 0? Only weight * value enters the sum. Weights
# half as large with values twice as large give the same sum, so the loss does not prefer 1. The
# other digits must get almost nothing, because a 1 in the sequence must not change the answer for
# 0. They do not get exactly 0, because a sigmoid is 0 only for a score of minus infinity.
#
# The count. How does it get through LayerNorm and a single linear layer? If the query for 0 attends
# to 0s alone, the vector before LayerNorm is query[0] + count * weight * value(0). As the count
# grows, this vector moves along a straight line in equal steps. LayerNorm subtracts from each
# vector the mean of its numbers, which keeps the line straight, and divides by their standard
# deviation. Then the mean of the squares is 1, so all vectors have length sqrt(hidden) (before
# LayerNorm's learned scale and bias). They are points on a sphere, at these angles to the vector of
# count 0 (default run, the other digits are 1s):
#     count     0    1    2    3    4    5    6    7    8    9   10
#     angle     0    7   20   42   75  102  119  128  134  138  140
# The steps are no longer equal, but no two points coincide: the query moves the line away from the
# origin, so every count has its own direction. Without the query, count * weight * value(0) would
# have the same direction for every count above 0, and LayerNorm, which keeps only the direction,
# would make all these vectors equal.
#
# Different points are enough for a linear layer, because among vectors of equal length, each has
# its largest dot product with itself. So let all rows of `out` be equally long, each pointing at
# the vector of one count. Then the row of the true count has the largest logit. (LayerNorm's scale
# and bias do not matter here, because `out` can undo them. The three queries share `out`. Training
# shows that one `out` can serve all three.)
@torch.no_grad()
def angles(model, other, length):
    """How many degrees the normalized vector of the query for 0 turns as the count of 0s grows.

    Returns the angles (length+1,) for 0 to `length` zeros among `length` digits, the rest `other`.
    """
    # row i: i zeros, then `other`
    digits = other * torch.ones(length + 1, length, dtype=torch.long).triu()
    digits = digits.to(model.query.device)
    x = F.one_hot(digits, model.key.in_features).float()                   # (length+1, length, V)
    query = model.query[:, :1]                                             # (1, 1, hidden)
    key = model.key(x)
    value = model.value(x)
    output, _ = attention(query, key, value, activation=model.activation)
    vectors = (output + query).squeeze(1)                                  # (length+1, hidden)
    normalized = F.layer_norm(vectors, vectors.shape[-1:])
    cosines = F.cosine_similarity(normalized, normalized[:1])
    return cosines.clamp(-1, 1).acos().rad2deg()


@torch.no_grad()
def show_counts(models, digits, vocab_size, path):
    """Print how each of the models {title: model} counts a list of digits, and plot its weights.

    In the heatmap, a row should be bright at the dots, where its digit is, and dark elsewhere.
    Wrong counts are red.
    """
    T = len(digits)
    x = F.one_hot(torch.tensor([digits]), vocab_size).float()              # (1, T, V)
    true = [digits.count(digit) for digit in range(vocab_size)]
    print("sequence:", *digits, " true counts:", *true)

    columns = min(2, len(models))
    rows = math.ceil(len(models) / columns)
    width = columns * (0.3 * T + 2.8)                                      # in inches
    height = rows * (0.3 * vocab_size + 1.1)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False,
                                layout="constrained")
    for (title, model), axis in zip(models.items(), axes.flat):
        logits, weights = model(x.to(model.query.device))                  # (1, V, L+1), (1, V, T)
        counts = logits[0].argmax(dim=-1).tolist()
        print(f"{title}: counts", *counts)
        image = axis.imshow(weights[0].tolist(), vmin=0)
        axis.scatter(range(T), digits, s=12, color="white", edgecolors="black")
        figure.colorbar(image, ax=axis, label="attention weight")
        axis.set_title(title)
        axis.set_xlabel("sequence")
        axis.set_ylabel("digit: count")
        axis.set_xticks(range(T), digits)
        labels = []
        for digit in range(vocab_size):
            labels.append(f"{digit}: {counts[digit]} (true {true[digit]})")
        axis.set_yticks(range(vocab_size), labels)
        for digit, label in enumerate(axis.get_yticklabels()):
            if counts[digit] != true[digit]:
                label.set_color("red")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")


# --------------------------------------------------------------------------------------------------
# Sigmoid, softmax or equal weights?
#
# With softmax, this model cannot count correctly at every length. Write a sequence twice in a row.
# Every count doubles, but every weighted mean stays the same, because each digit occurs twice with
# half the weight. The rest of the model sees nothing else. So it gives both sequences the same
# answer, and at least one of the two answers is wrong.
#
# The model sees only fractions. If half of the digits are 0s, 5 is right at length 10, but 2 at
# length 4. It could be right at length 10 and wrong elsewhere. But trained at all lengths, its
# queries attend mostly to the right digits, and its answers are a compromise that differs from run
# to run.
#
# Trained at length 10 only, softmax can count by fractions, because 0.3 always means 3. For that a
# query must give the other digits some weight, too, because value(d) alone is the same for every
# count. Even that needs LayerNorm (see the appendix). It is often right at length 9, too: 4/9 lies
# between 4/10 and 5/10 and can still be read as 4. But nine 0s look exactly like ten.
#
# Why attend at all? Why not just add up the values? If all keys are 0 and stay 0, every weight is
# sigmoid(0) = 1/2, and all queries get the same sum. It contains all counts, and only the query
# that is added afterwards says which one to read off. With `out` alone that is impossible (see the
# appendix). With LayerNorm it works only in part: seeds 0 to 9 get 0.10 to 0.95 of the sequences of
# length 10 right, and none gets all. Attention selects the digit before the sum, so each query's
# sum contains only the count of its own digit.
def compare(args, digits, n_seeds=3):
    """Train both activations, and equal weights, and print their accuracy at each length.

    Returns the accuracy of sigmoid and of softmax at length L, trained at all lengths.
    """
    V = args.vocab_size
    L = args.sequence_length
    rows = [("sigmoid", False), ("sigmoid", True), ("softmax", False), ("softmax", True),
            ("equal weights", True)]
    print(f"fraction of sequences with every count right, by length (mean of {n_seeds} seeds)")
    header = " ".join(f"{length:5}" for length in range(1, L + 1))
    print(f"                trained at | {header} | all right at length {L}")
    models = {}
    result = {}
    for activation, all_lengths in rows:
        trained_at = f"lengths 1-{L}" if all_lengths else f"length {L}"
        accuracies = torch.zeros(n_seeds, L)
        for i in range(n_seeds):
            torch.manual_seed(args.seed + i)
            model = train(args, activation, all_lengths)
            for length in range(1, L + 1):
                sequences = all_sequences(length, V)
                accuracies[i, length - 1] = accuracy(model, sequences, V)
            if i == 0 and activation != "equal weights":
                models[f"{activation}, trained at {trained_at}"] = model
        means = accuracies.mean(dim=0).tolist()
        row = " ".join(f"{mean:5.3f}" for mean in means)
        exact = accuracies[:, -1] == 1
        print(f"{activation:13} {trained_at:>12} | {row} | ", end="")
        print(f"{exact.sum()} of {n_seeds} seeds")
        if all_lengths:
            result[activation] = means[-1]
    path = os.path.join(args.out_dir, "counting_compare.png")
    show_counts(models, digits, V, path)
    return result["sigmoid"], result["softmax"]


# --------------------------------------------------------------------------------------------------
# Appendix (can be skipped): softmax needs LayerNorm, even at a single length
#
# Claim: without it, softmax cannot even count sequences of equal digits. Proof: if all ten digits
# are 0s, every weighted mean is value(0), whatever the weights are. If all are 1s, it is value(1).
# The query is added, so `out` sees four vectors and has to give these answers:
#
#                  how many 0s?               how many 1s?
#     ten 0s       value(0) + query[0]: 10    value(0) + query[1]: 0
#     ten 1s       value(1) + query[0]: 0     value(1) + query[1]: 10
#
# For each of the four, take the logit of 10 minus the logit of 0. The two on the diagonal must be
# positive, and the other two negative. But `out` is linear, so both pairs have the same sum,
# because each of them adds up value(0), value(1), query[0] and query[1]. That is a contradiction.
# It is XOR: is the digit in the sequence the query's digit? A linear layer cannot tell. (The same
# holds for equal weights, with 5 value(0) and 5 value(1).) LayerNorm is not linear, so the proof
# does not apply to it. Trained at length 10, softmax gets 0.9999 of the sequences right, but 0.0000
# with nn.Identity() instead of nn.LayerNorm(hidden) (seeds 0 to 2).


if __name__ == "__main__":
    start = time.perf_counter()

    # options
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab_size", type=number(int, 1), default=3,
                        help="number of different digits (default: 3)")
    parser.add_argument("--sequence_length", type=number(int, 1), default=10,
                        help="maximum length of a sequence (default: 10)")
    parser.add_argument("--hidden", type=number(int, 1), default=16,
                        help="width of queries, keys and values (default: 16)")
    parser.add_argument("--activation", choices=["sigmoid", "softmax"], default="sigmoid",
                        help="turns scores into weights (default: sigmoid)")
    parser.add_argument("--lr", type=number(float, 0), default=0.03,
                        help="peak learning rate (default: 0.03)")
    parser.add_argument("--steps", type=number(int, 1), default=1500,
                        help="training steps (default: 1500)")
    parser.add_argument("--batch_size", type=number(int, 1), default=256,
                        help="sequences in a batch (default: 256)")
    parser.add_argument("--sequence", help="count these digits after training, and skip the tables")
    parser.add_argument("--compare", action="store_true",
                        help="train sigmoid, softmax and equal weights, three seeds each")
    args = parse_args(parser)
    V = args.vocab_size
    L = args.sequence_length
    torch.set_num_threads(1)  # at this size, more threads only add overhead
    torch.set_printoptions(precision=2, sci_mode=False)

    # data: the sequence to count after training
    digits = [1, 0, 2, 1, 0, 1, 1, 0, 1, 2][:L]
    digits = [digit % V for digit in digits]
    if args.sequence is not None:
        words = args.sequence.replace(",", " ").split()
        allowed = {str(digit) for digit in range(V)}
        if not 1 <= len(words) <= L or not allowed.issuperset(words):
            parser.error(f"argument --sequence: expected 1 to {L} digits from 0 to {V - 1}, "
                         "separated by spaces")
        digits = [int(word) for word in words]
    make_folder(args.out_dir)

    if args.compare:
        sigmoid, softmax = compare(args, digits)
        seconds = time.perf_counter() - start
        print(f"result: accuracy_all={sigmoid:.4f} accuracy_all_softmax={softmax:.4f} "
              f"seconds={seconds:.1f}")
        sys.exit()

    # training, and the figure of the sequence
    model = train(args, args.activation, verbose=True)
    path = os.path.join(args.out_dir, f"counting_{args.activation}.png")
    show_counts({args.activation: model}, digits, V, path)

    # evaluation
    scores = []
    for length in range(1, L + 1):
        sequences = all_sequences(length, V)
        scores.append(accuracy(model, sequences, V))
    mean = sum(scores) / L
    accuracy_all = scores[-1]
    print(f"every count right, at length {L}: {accuracy_all:.4f} of {len(sequences):,} sequences; "
          f"mean over lengths 1 to {L}: {mean:.4f}")
    if args.sequence is None:
        for other in range(1, V):
            turned = angles(model, other, L).tolist()
            degrees = [f"{angle:.0f}" for angle in turned]
            print(f"angles for 0 to {L} zeros, the rest {other}s:", *degrees)
        one_of_each = torch.eye(V, device=args.device).unsqueeze(0)        # (1, V, V): 0, 1, 2, ...
        with torch.no_grad():
            _, weights = model(one_of_each)
        print("weights of each query (row) on each digit (column):")
        print(weights[0])

    n_params = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - start
    print(f"result: accuracy_all={accuracy_all:.4f} params={n_params} seconds={seconds:.1f}")
