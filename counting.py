"""What does one attention layer learn, seen with the eye? And why not softmax?
The task is to count how often each digit occurs: [1, 0, 2, 1, 0, 1, 1, 0, 1, 2] gives [3, 5, 2]. One attention layer,
with one trainable query for each digit, learns it, and as there is only one layer its weights can be read off.

The query for digit d should attend to every d and to nothing else: some weight here, none there. If each weight is a
sigmoid of its own, the attention output is a *sum* with one term for every d in the sequence, and the number of terms
is the count. Softmax makes the weights of a row sum to one, so its output is a *mean*, and a mean does not tell of how
many numbers it was taken. Two things follow from that, and they are not the same:

  * At one fixed length the counts are not lost: 3 of 10 is a proportion, and at length 10 it means 3 and nothing else.
    Softmax does badly all the same, because a single linear map has to turn the proportions into one of 11 counts. With
    a small MLP in its place, a network with one hidden layer, they come out right (an exercise in README).
  * Across lengths softmax cannot count, whatever its weights: write the sequence twice, and every softmax-weighted mean
    stays as it was, although every count has doubled. The residual connection only adds the query, which is the same
    for every input, and LayerNorm only rescales that sum, so neither of them can bring the lost number back.

    python counting.py                                      train, count, draw the weights
    python counting.py --sequence "1 0 2 1 0 1 1 0 1 2"     count your own sequence with the saved model
    python counting.py --compare                            sigmoid and softmax, five seeds of each
    python counting.py --activation softmax                 train and count with softmax

You will see the loss start near ln 11 (the counts 0 to 10 are 11 classes) and fall, all 59,049 sequences of length 10
counted right, and the shorter ones too; a 3 x 3 table of the weight that each query gives to each digit; and in
out/counting_weights.png these weights over one sequence.

Attention is that of Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1 (https://arxiv.org/abs/1706.03762),
with a sigmoid for the softmax. Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention"
(https://arxiv.org/abs/2409.04431) study that in large models.
"""

import itertools
import math
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from attention import attention, check_finite, fail, load, make_parser, number, plot_attention, print_first_loss, \
    print_result, progress, run, save_figure, save_weights, start

# ----------------------------------------------------------------------------------------------------------------------
# The model. B sequences of T digits each, V different digits, and L, the greatest length and so the greatest count.


class CountingModel(nn.Module):
    """One-hot digits (B, T, V) -> logits of the counts 0 ... L of each digit (B, V, L+1), and the weights (B, V, T).

    One-hot: V numbers for each digit, a 1 at its place and 0 elsewhere. T may be anything from 1 to L =
    sequence_length. (Longer ones run too, but no output stands for a count above L.)
    """

    def __init__(self, vocab_size, sequence_length, hidden, activation="sigmoid"):
        super().__init__()
        self.activation = activation
        self.query = nn.Parameter(torch.randn(1, vocab_size, hidden))    # (1, V, hidden) the same for every sequence
        self.key = nn.Linear(vocab_size, hidden)
        self.value = nn.Linear(vocab_size, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, sequence_length + 1)                # one output for each possible count

    def forward(self, x):
        key, value = self.key(x), self.value(x)                          # (B, T, hidden) both
        output, weights = attention(self.query, key, value, activation=self.activation)  # (B, V, hidden), (B, V, T)
        return self.out(self.norm(output + self.query)), weights         # (B, V, L+1), (B, V, T)


# ----------------------------------------------------------------------------------------------------------------------
# Data, and an accuracy without a test set


def make_sequences(n_samples, length, vocab_size, uniform=False):
    """Random digits (B, T), for B = n_samples and T = length.

    If all digits are equally likely, ten equal digits turn up once in 20,000 sequences, too rarely to learn what a
    count of 10 looks like. So each sequence first draws how likely its digits are, from the Dirichlet distribution
    under which all such probabilities are equally likely; then all combinations of counts are equally frequent.
    `uniform` leaves that out.
    """
    likely = torch.ones(n_samples, vocab_size)                           # (B, V)
    if not uniform:
        likely = torch.distributions.Dirichlet(likely).sample()          # (B, V) each row sums to 1
    return torch.multinomial(likely, length, replacement=True)           # (B, T) drawn independently


def one_hot_and_counts(digits, vocab_size):
    """Digits (B, T) -> one-hot, as float (B, T, V), and how often each digit occurs (B, V)."""
    x = F.one_hot(digits, vocab_size)                                    # (B, T, V)
    return x.float(), x.sum(dim=1)                                       # (B, T, V), (B, V)


@torch.no_grad()
def evaluate(model, vocab_size, length, n_samples=20_000):
    """Accuracy on sequences of one length: the share with every count right, and the share right for each true count.

    Returns the two, a float and a tensor (T+1,), with NaN for a count that no sequence has, and a text that says what
    was tried: all sequences if there are at most two million, else `n_samples` random ones. To try all, one sequence
    for each combination of counts is enough, since the model does not see the order; it stands for all its orders. So
    the 59,049 of length 10 are 66.
    """
    exhaustive = vocab_size ** length <= 2_000_000
    if exhaustive:
        digits = torch.tensor(list(itertools.combinations_with_replacement(range(vocab_size), length)))  # (N, T)
    else:
        digits = make_sequences(n_samples, length, vocab_size, uniform=True)             # (N, T)
    all_right, n_sequences = 0.0, 0.0
    n_right, n_seen = torch.zeros(2, length + 1, dtype=torch.float64)    # (T+1,) each, one place for each true count
    for part in digits.split(1000):                                      # (B, T)
        x, counts = one_hot_and_counts(part, vocab_size)                 # (B, T, V), (B, V)
        logits, _ = model(x.to(model.query.device))                      # (B, V, L+1)
        right = (logits.argmax(dim=-1).cpu() == counts).double()         # (B, V) 1 where the count is right
        n_orders = torch.ones(len(part), dtype=torch.float64)            # (B,) how many sequences each stands for
        if exhaustive:                                                   # T! / (count_0! count_1! ...)
            n_orders = (math.lgamma(length + 1) - torch.lgamma(counts.double() + 1).sum(dim=1)).exp().round()
        all_right += (right.prod(dim=1) * n_orders).sum().item()
        n_sequences += n_orders.sum().item()
        n_right.index_add_(0, counts.flatten(), (right * n_orders.unsqueeze(1)).flatten())
        n_seen.index_add_(0, counts.flatten(), n_orders.repeat_interleave(vocab_size))
    tried = f"all {vocab_size ** length:,}" if exhaustive else f"{n_samples:,} random"
    return all_right / n_sequences, n_right / n_seen, f"{tried} sequences of length {length}"


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(args, activation, uniform=False, shorter=True, weight_decay=1e-3, quiet=False):
    """Train one model on fresh random sequences and return it. It takes sizes, lr, steps, batch_size, device from args.

    Half of every batch has the full length L, and half a length drawn anew in each step from 1 to L. At a single length
    a model may just as well count what is *not* there, since 3 of one digit are 7 of the others, and then its weights
    say little; with several lengths that no longer works. `shorter=False` trains at the full length alone.
    """
    model = CountingModel(args.vocab_size, args.sequence_length, args.hidden, activation).to(args.device)
    # Without weight decay about one run in fifteen ends with a digit that is never counted: all scores of its query
    # have become so low that its sigmoids give 0.00, where they are flat and let hardly any gradient through. Decay of
    # the keys shrinks all scores, until the sigmoids of that query have a slope again and it can learn. The queries do
    # not decay: those that work make up for the smaller keys by growing.
    others = [p for name, p in model.named_parameters() if not name.startswith("key.")]
    optimizer = torch.optim.Adam([{"params": model.key.parameters(), "weight_decay": weight_decay},
                                  {"params": others}], lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, cycle_momentum=False)
    report = progress(args.steps)
    for step in range(args.steps):
        other_length = torch.randint(1, args.sequence_length + 1, ()).item() if shorter else args.sequence_length
        logits, counts = [], []
        for length in (args.sequence_length, other_length):
            digits = make_sequences(args.batch_size // 2, length, args.vocab_size, uniform)              # (B/2, T)
            x, half_counts = one_hot_and_counts(digits.to(args.device), args.vocab_size)  # (B/2, T, V), (B/2, V)
            logits.append(model(x)[0])                                   # (B/2, V, L+1)
            counts.append(half_counts)
        logits, counts = torch.cat(logits), torch.cat(counts)            # (B, V, L+1), (B, V)
        loss = F.cross_entropy(logits.flatten(0, 1), counts.flatten())   # (B * V, L+1), (B * V,) -> ()
        if step == 0 and not quiet:
            print_first_loss(loss.item(), args.sequence_length + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        check_finite([loss], step + 1)
        if not quiet:
            report(step + 1, loss=loss.item(), accuracy=(logits.argmax(dim=-1) == counts).float().mean().item())
    check_finite(model.parameters(), args.steps)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# What it has learned, in a table and in pictures


@torch.no_grad()
def count(model, digits, vocab_size):
    """Count one sequence, a list of T digits: predicted and true counts, lists of V, and the weights (V, T)."""
    x, counts = one_hot_and_counts(torch.tensor([digits]), vocab_size)   # (1, T, V), (1, V)
    logits, weights = model(x.to(model.query.device))                    # (1, V, L+1), (1, V, T)
    return logits[0].argmax(dim=-1).tolist(), counts[0].tolist(), weights[0].cpu()


def print_table(model, vocab_size):
    """Print the weight that each query gives to each digit, measured on a sequence that has each digit once."""
    weights = count(model, list(range(vocab_size)), vocab_size)[2].tolist()              # V lists of V numbers
    print(f"weights: the query for each digit (row) on each digit (column), {model.activation}; beside it: by hand")
    print("   ", "".join(f"{digit:6}" for digit in range(vocab_size)), "   ", *range(vocab_size))
    for digit, row in enumerate(weights):
        print(f"{digit:4}", "".join(f"{weight:6.2f}" for weight in row), "   ",
              *(int(digit == seen) for seen in range(vocab_size)))


def plot_counts(models, digits, vocab_size, path, show):
    """Draw the weights of each model over one sequence, with predicted and true counts beside the rows."""
    counted = [count(model, digits, vocab_size) for model in models]
    rows = [[f"{digit}:  {guess} (true {true})" for digit, (guess, true) in enumerate(zip(predicted, counts))]
            for predicted, counts, _ in counted]
    plot_attention(torch.stack([weights for _, _, weights in counted]), digits, rows, path,
                   [model.activation for model in models], "the sequence", "digit:  count", show)


# ----------------------------------------------------------------------------------------------------------------------
# Sigmoid and softmax compared


def compare(args, n_seeds=5):
    """Train both activations on three kinds of data with several seeds; print and draw what they get right."""
    L = args.sequence_length
    kinds = {"Dirichlet": {"shorter": False}, "uniform": {"shorter": False, "uniform": True}, "all lengths": {}}
    print(f"{n_seeds} seeds of each, trained at length {L} on Dirichlet or uniform digits, or at all lengths on",
          f"Dirichlet digits. exact: how many seeds get all sequences of length {L} right; length {L}, shorter: share",
          "of the sequences with every count right, mean over the seeds; by true count: share of the counts that are",
          f"right at length {L}, for each true count from 0 to {L}.", "",
          f"{'activation, trained on':22} | exact  length {L:<2}  shorter | by true count", sep="\n")
    by_length, by_count, models = {}, {}, {}
    for activation in ("sigmoid", "softmax"):
        for kind, how in kinds.items():
            row, shares, counts_right = (activation, kind), [], []
            for seed in range(args.seed, args.seed + n_seeds):
                torch.manual_seed(seed)
                models[row] = train(args, activation, quiet=True, **how)
                scores = [evaluate(models[row], args.vocab_size, length) for length in range(1, L + 1)]
                shares.append([accuracy for accuracy, _, _ in scores])
                counts_right.append(scores[-1][1])
            shares = torch.tensor(shares)                                # (n_seeds, L)
            by_length[row] = shares.mean(dim=0).tolist()
            by_count[row] = torch.stack(counts_right).nanmean(dim=0).tolist()
            print(f"{', '.join(row):22} | {(shares[:, -1] == 1).sum():5}  {shares[:, -1].mean():9.3f}  "
                  f"{shares[:, :-1].mean():7.3f} |", *(f"{share:4.2f}" for share in by_count[row]), flush=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for activation, color, marker in (("sigmoid", "tab:blue", "o"), ("softmax", "tab:orange", "s")):
        for kind, style in (("Dirichlet", "-"), ("uniform", "--")):
            left.plot(range(L + 1), by_count[activation, kind], style, color=color, marker=marker,
                      label=f"{activation}, {kind} digits")
        right.plot(range(1, L + 1), by_length[activation, "all lengths"], color=color, marker=marker,
                   label=f"{activation}, Dirichlet digits")
    left.set(title=f"trained at length {L}", xlabel=f"true count, at length {L}", ylabel="share of counts right")
    right.set(title="trained at all lengths", xlabel="length of the sequence", ylabel="share of sequences all right")
    left.legend()
    right.legend()
    save_figure(figure, os.path.join(args.out_dir, "counting_compare.png"), args.show)
    both = [models["sigmoid", "all lengths"], models["softmax", "all lengths"]]
    plot_counts(both, example(args), args.vocab_size, os.path.join(args.out_dir, "counting_both.png"), args.show)
    return {"accuracy_all": by_length["sigmoid", "all lengths"][-1],
            "accuracy_all_softmax": by_length["softmax", "all lengths"][-1],
            "params": sum(p.numel() for p in both[0].parameters())}


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def example(args):
    """The sequence at the top of this file, or a random one if the sizes are others."""
    if args.vocab_size == 3 and args.sequence_length >= 10:
        return [1, 0, 2, 1, 0, 1, 1, 0, 1, 2]
    return make_sequences(1, args.sequence_length, args.vocab_size)[0].tolist()


def read_sequence(args):
    """The digits of --sequence as a list."""
    words = args.sequence.replace(",", " ").split()
    if not 1 <= len(words) <= args.sequence_length:
        fail(f"argument --sequence: takes 1 to {args.sequence_length} digits (--sequence_length), not {len(words)}")
    for word in words:
        if word not in map(str, range(args.vocab_size)):
            fail(f"argument --sequence: takes digits from 0 to {args.vocab_size - 1} (--vocab_size), with spaces "
                 f"between them, not {word!r}")
    return [int(word) for word in words]


def load_model(path, args, sizes):
    """The model that an earlier run saved to `path`; it must have the sizes that are asked for now."""
    saved = load(path)
    if not isinstance(saved, dict) or not {"sizes", "weights"} <= saved.keys():
        fail(f"{path} was not saved by counting.py")
    if saved["sizes"] != sizes:
        fail(f"{path} holds a model of other sizes (vocab_size, sequence_length, hidden, activation): "
             f"{saved['sizes']!r}, not {sizes!r}")
    model = CountingModel(*sizes)
    try:
        model.load_state_dict(saved["weights"])
    except (AttributeError, RuntimeError, TypeError):
        fail(f"{path} is damaged: its weights do not have the sizes that it names")
    return model.to(args.device)


def main(argv=None):
    """Train (or load) the model, evaluate it on all sequences, print its table and draw its weights (or compare)."""
    parser = make_parser(__doc__)
    parser.add_argument("--vocab_size", type=number(int, 1, 100), default=3, help="how many different digits")
    parser.add_argument("--sequence_length", type=number(int, 1, 100), default=10, help="greatest length")
    parser.add_argument("--hidden", type=number(int, 2, 1024), default=16, help="width of queries, keys and values "
                        "(d_model elsewhere)")
    parser.add_argument("--activation", choices=["sigmoid", "softmax"], default="sigmoid",
                        help="what makes weights of the scores")
    parser.add_argument("--lr", type=number(float, 0, 1), default=0.03, help="highest learning rate")
    parser.add_argument("--steps", type=number(int, 1, 10 ** 6), default=1000, help="training steps")
    parser.add_argument("--batch_size", type=number(int, 2, 4096), default=256, help="sequences in each step (even), "
                        "half of them of the full length")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--sequence", help="digits to count, such as '1 0 2', with the model that the last run saved "
                        "in --out_dir; if there is none, train first")
    either.add_argument("--compare", action="store_true", help="train sigmoid and softmax with several seeds")
    args = start(parser, argv)
    torch.set_num_threads(1)  # the tensors are so small that a second thread costs more than it brings
    digits = example(args) if args.sequence is None else read_sequence(args)
    if args.compare:
        print_result(args, **compare(args))
        return

    path = os.path.join(args.out_dir, "counting.pt")
    sizes = (args.vocab_size, args.sequence_length, args.hidden, args.activation)
    if args.sequence is not None and os.path.exists(path):
        model = load_model(path, args, sizes)
    else:
        model = train(args, args.activation)
        save_weights(path, sizes=sizes, weights=model.state_dict())
        print("saved:", path)
    accuracy_all, _, tried = evaluate(model, args.vocab_size, args.sequence_length)
    print(f"{tried}: {accuracy_all:.4f} with every count right")
    if args.sequence_length > 1:
        shorter = [evaluate(model, args.vocab_size, length, 1000)[0] for length in range(1, args.sequence_length)]
        print(f"shorter ones, mean over the lengths: {sum(shorter) / len(shorter):.4f}")
    if args.vocab_size <= 10:
        print_table(model, args.vocab_size)
    predicted, counts, _ = count(model, digits, args.vocab_size)
    print("sequence:", *digits, "  counts:", *predicted, "  true counts:", *counts)
    picture = "counting_weights.png" if args.sequence is None else "counting_sequence.png"
    plot_counts([model], digits, args.vocab_size, os.path.join(args.out_dir, picture), args.show)
    print_result(args, accuracy_all=accuracy_all, params=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    run(main)
