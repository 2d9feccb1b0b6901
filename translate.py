"""
Translate German to English with the Transformer of "Attention Is All You Need" (Vaswani et al. 2017, arXiv:1706.03762).

The encoder reads the German sentence. The decoder writes the English one token by token, and cross-attention lets each
step attend to the German tokens. The toy language is a small German grammar in which the object may come first, marked
by its article (den, einen). Training on it takes a minute, and since the right source word of every target word is
known, we can measure how well each attention head aligns. Multi30k has 29,000 real sentence pairs. The weights of both
are in assets/: only the first two commands train. Weights that you train, in --out_dir, take precedence.

$ python translate.py                                           # train on the toy language
$ python translate.py --data multi30k                           # train on Multi30k
$ python translate.py --test --line=7 --plot                    # translate line 7 of the toy language, plot attention
$ python translate.py --test                                    # exact matches, BLEU, alignment of every head
$ python translate.py --data multi30k --test                    # BLEU on test_2016_flickr
$ python translate.py --text "Ein Hund läuft durch den Schnee." # any text, with the weights trained on Multi30k
"""

import argparse
import collections
import gzip
import itertools
import math
import os
import random
import re
import sys
import time
import zlib

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import distributed, nn

from attention import attention, download, parse_args, plot_attention, positive

# ----------------------------------------------------------------------------------------------------------------------
# The Transformer (Figure 1 of the paper). B sentences, S source and T target tokens, H heads of width d_k = d_model/H.
#
#                                                          logits (B, T, vocab_size)
#                                                        token embedding, transposed
#                                                                     |
#                memory (B, S, d_model) --.     +-- DecoderBlock -----|-----------------+
#                        |                |     |             add & LayerNorm           |
#    +-- EncoderBlock ---|-------------+  |     |           feed-forward                |
#    |             add & LayerNorm     |  |     |             add & LayerNorm           |
#    |           feed-forward          |  '------> cross-attention to the source        |
#    |             add & LayerNorm     |        |             add & LayerNorm           |
#    |           self-attention        |        |     causal self-attention             |
#    +-------------------|-------------+        +---------------------|-----------------+
#           token + position embedding                   token + position embedding
#           src: German, EOS (B, S)                   tgt: BOS, English so far (B, T)
#
# Read it from bottom to top. "add & LayerNorm" adds a sublayer's output to its input (residual connection), then
# normalizes (post-norm; parity.py is pre-norm). In the paper positions are sinusoidal instead of learned, the
# feed-forward network is four times as wide as the model instead of twice, and there is no word dropout.

PAD, BOS, EOS = 0, 1, 2     # padding, start of sentence, end of sentence
MAX_LEN = 100               # number of positions


class MultiHeadAttention(nn.Module):
    """Queries from x (B, T, d_model), keys and values from memory (B, S, d_model), which is x in self-attention."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Linear(d_model, d_model) for _ in range(4))

    def split(self, x):
        """(B, T, d_model) -> (B, H, T, d_k)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x, memory, mask=None, cache=None, need_weights=False):
        # For decoding token by token, cache maps each MultiHeadAttention to its keys and values. Self-attention appends
        # those of the new tokens. Cross-attention computes them once, because the source does not change.
        query = self.split(self.w_q(x))                                    # (B, H, T, d_k)
        if cache and self in cache and memory is not x:  # cross-attention, after the first token
            key, value = cache[self]                                       # (B, H, S, d_k)
        else:
            key, value = self.split(self.w_k(memory)), self.split(self.w_v(memory))
            if cache and self in cache:
                key, value = torch.cat([cache[self][0], key], dim=2), torch.cat([cache[self][1], value], dim=2)
            if cache is not None:
                cache[self] = key, value
        output, weights = attention(query, key, value, mask)   # (B, H, T, d_k)
        return self.w_o(output.transpose(1, 2).flatten(2)), weights        # (B, T, d_model), (B, H, T, S) or None


class EncoderBlock(nn.Module):
    """Self-attention over all source tokens, then the feed-forward network. (B, S, d_model) -> (B, S, d_model)."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.ReLU(), nn.Linear(2 * d_model, d_model))
        self.norm1, self.norm2 = (nn.LayerNorm(d_model) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        output, _ = self.self_attention(x, x, mask)
        x = self.norm1(x + self.dropout(output))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to memory (B, S, d_model), then the feed-forward network."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads)
        self.cross_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.ReLU(), nn.Linear(2 * d_model, d_model))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, tgt_mask, memory, src_mask, cache=None, need_weights=False):
        output, _ = self.self_attention(x, x, tgt_mask, cache)
        x = self.norm1(x + self.dropout(output))
        output, weights = self.cross_attention(x, memory, src_mask, cache, need_weights)
        x = self.norm2(x + self.dropout(output))
        return self.norm3(x + self.dropout(self.feed_forward(x))), weights    # (B, T, d_model), (B, H, T, S) or None


class TransformerModel(nn.Module):
    """Source (B, S) and target (B, T) tokens -> logits (B, T, vocab_size) of the token after each target token."""

    def __init__(self, vocab_size, max_len, d_model, n_heads, n_enc_layers, n_dec_layers, dropout=0.1):
        super().__init__()
        self.max_len = max_len
        self.token_embedding = nn.Embedding(vocab_size, d_model)   # source, target and output share it (section 3.4)
        self.position_embedding = nn.Embedding(max_len, d_model)
        self.dropout = nn.Dropout(dropout)
        self.token_dropout = nn.Dropout1d(dropout / 2)             # word dropout, of whole tokens (arXiv:1905.11901)
        self.encoder = nn.ModuleList(EncoderBlock(d_model, n_heads, dropout) for _ in range(n_enc_layers))
        self.decoder = nn.ModuleList(DecoderBlock(d_model, n_heads, dropout) for _ in range(n_dec_layers))
        # The embedding is also the output layer. Its d_model inputs have standard deviation 1 (LayerNorm), so with this
        # scale the logits start with it, too. Only that of the input token is larger, carried by residual connections.
        nn.init.normal_(self.token_embedding.weight, std=d_model ** -0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.5)

    def embed(self, tokens, start=0):
        """Token plus position embeddings (B, T, d_model) of tokens (B, T) at positions start, start + 1, ..."""
        positions = torch.arange(start, start + tokens.size(1), device=tokens.device)
        x = self.token_dropout(self.token_embedding(tokens) * math.sqrt(self.token_embedding.embedding_dim))
        return self.dropout(x + self.position_embedding(positions))

    def encode(self, src):
        """Source tokens (B, S) -> memory (B, S, d_model) and src_mask (B, 1, 1, S), False at padding."""
        src_mask = (src != PAD)[:, None, None, :]
        x = self.embed(src)
        for block in self.encoder:
            x = block(x, src_mask)
        return x, src_mask

    def decode(self, tgt, memory, src_mask, cache=None, need_weights=False):
        """Logits (B, T, vocab_size) and a list with the cross-attention weights (B, H, T, S) of every decoder block."""
        start = cache[self.decoder[0].self_attention][0].size(2) if cache else 0    # tokens already in the cache
        #   1 0 0 0    The causal mask, 1 = may attend. Row i is the query at position i, which predicts token i + 1 and
        #   1 1 0 0    attends to tokens 0 (BOS) ... i only, so all positions train in parallel. Padding comes last, so
        #   1 1 1 0    no real token sees it, and the loss ignores the rows of padding. With a cache, tgt holds only the
        #   1 1 1 1    new tokens, so we need only their rows: the last one if tokens 0, 1 and 2 are cached.
        end = start + tgt.size(1)
        tgt_mask = torch.ones(end, end, dtype=torch.bool, device=tgt.device).tril()[start:]        # (T, end)
        x, weights = self.embed(tgt, start), []
        for block in self.decoder:
            x, block_weights = block(x, tgt_mask, memory, src_mask, cache, need_weights)
            weights.append(block_weights)
        return F.linear(x, self.token_embedding.weight), weights

    def forward(self, src, tgt, need_weights=True):
        logits, weights = self.decode(tgt, *self.encode(src), need_weights=need_weights)
        return logits, weights[-1]      # (B, T, vocab_size), and the last block's weights (B, H, T, S) or None


# ----------------------------------------------------------------------------------------------------------------------
# Data: the toy language, Multi30k, and text files of your own
#
# In English the object is known by its position. German marks a masculine object by its article (den, einen). In the
# toy language only such an object may come first, and only if the subject is definite ("Den Mann sieht ein Hund" sounds
# odd), so every German sentence has one translation. The finite verb is the second element, and a participle or
# infinitive comes last:
#
#     Der Mann sieht den Hund.                      The man sees the dog.
#     Den Mann sieht der Hund.                      The dog sees the man.
#     Gestern hat die Ärztin einen Vogel gehört.    Yesterday the doctor heard a bird.

N_TOY_LINES = 209_773  # --line accepts 1 to this; training uses most of the first 100,000
NOUNS = {kind: [entry.split() for entry in entries.split(", ")] for kind, entries in {    # German, gender, English
    "person": "König m king, Lehrer m teacher, Mann m man, Bäcker m baker, Ingenieur m engineer, Frau f woman, "
              "Ärztin f doctor, Königin f queen, Künstlerin f artist, Kind n child, Mädchen n girl",
    "animal": "Hund m dog, Vogel m bird, Fuchs m fox, Esel m donkey, Katze f cat, Maus f mouse, Ziege f goat, "
              "Pferd n horse, Schaf n sheep",
    "thing": "Lampe f lamp, Uhr f clock, Tasche f bag, Gitarre f guitar, Stuhl m chair, Koffer m suitcase, "
             "Regenschirm m umbrella, Fahrrad n bicycle, Radio n radio, Boot n boat"}.items()}
ADJECTIVES = {kind: [entry.split() for entry in entries.split(", ")] for kind, entries in {       # stem, English
    "person": "jung young, müd tired, klug clever, hungrig hungry, freundlich friendly",
    "animal": "alt old, jung young, klein small, groß big, hungrig hungry",
    "thing": "alt old, neu new, klein small, groß big, rot red, schwer heavy"}.items()}
ARTICLES = {  # of each gender: indefinite and definite article, each with the ending of an adjective
    "m": [("ein", "er"), ("der", "e")], "f": [("eine", "e"), ("die", "e")], "n": [("ein", "es"), ("das", "e")],
    "m object": [("einen", "en"), ("den", "en")]}  # only a masculine object differs from the subject
# finite form, infinitive and participle; English base form, third person and past; kinds of subjects and of objects
VERBS = [line.split() for line in """\
    sieht        sehen         gesehen      see        sees        saw          person,animal  person,animal,thing
    hört         hören         gehört       hear       hears       heard        person,animal  person,animal
    findet       finden        gefunden     find       finds       found        person,animal  person,animal,thing
    besucht      besuchen      besucht      visit      visits      visited      person         person
    jagt         jagen         gejagt       chase      chases      chased       animal         person,animal
    weckt        wecken        geweckt      wake       wakes       woke         person,animal  person,animal
    malt         malen         gemalt       paint      paints      painted      person         person,animal,thing
    fotografiert fotografieren fotografiert photograph photographs photographed person         person,animal,thing
    trägt        tragen        getragen     carry      carries     carried      person         thing
    kauft        kaufen        gekauft      buy        buys        bought       person         animal,thing
    verkauft     verkaufen     verkauft     sell       sells       sold         person         animal,thing
    repariert    reparieren    repariert    repair     repairs     repaired     person         thing""".split("\n")]


def toy_pair(n):
    """Line n: German, English, and for every English word (and the full stop) the indices of its German words."""
    draw = random.Random(n).random  # a sequence that is the same in every version of Python

    def pick(options):
        return options[int(draw() * len(options))]

    def noun_phrase(role, noun, kind, definite):
        """(slot, German word, English word) of the article, perhaps an adjective, and the noun."""
        german, gender, english = noun
        article, ending = ARTICLES.get(f"{gender} {role}", ARTICLES[gender])[definite]
        words = [(f"{role} noun", german, english)]
        if draw() < 0.4:
            stem, english = pick(ADJECTIVES[kind])
            words.insert(0, (f"{role} adjective", stem + ending, english))
        a = "an" if english[0] in "aeiou" else "a"
        return [(f"{role} article", article, "the" if definite else a), *words]

    present, infinitive, participle, base, third_person, past, subject_kinds, object_kinds = pick(VERBS)
    kind, subject_definite = pick(subject_kinds.split(",")), draw() < 0.7
    subject_noun = pick(NOUNS[kind])
    subject = noun_phrase("subject", subject_noun, kind, subject_definite)
    kind = pick(object_kinds.split(","))
    object_noun = pick([noun for noun in NOUNS[kind] if noun != subject_noun])
    object_ = noun_phrase("object", object_noun, kind, draw() < 0.7)
    # a word is (slot, German, English), or (slot, word) if it is in one sentence only; finite+last: both German verbs
    finite, last, english_verb, adverbs = pick([
        ("hat", [("last", participle)], [("finite+last", past)], ["gestern yesterday", ""]),
        (present, [], [("finite", third_person)], [""]),
        ("kann", [("last", infinitive)], [("finite", "can"), ("last", base)], ["heute today", "morgen tomorrow", ""])])
    words = pick(adverbs).split()
    adverb = [("adverb", *words)] if words else []
    first = pick(["subject"] + ["object"] * (object_noun[1] == "m" and subject_definite) + ["adverb"] * len(adverb))
    parts = {"subject": subject, "adverb": adverb, "object": object_}
    german = [*parts.pop(first), ("finite", finite), *itertools.chain(*parts.values()), *last, (".", ".")]
    english = [*subject, *english_verb, *object_, (".", ".")]
    english = [*adverb, *english] if first == "adverb" else [*english[:-1], *adverb, english[-1]]
    index = {slot: i for i, (slot, *_) in enumerate(german)}
    alignment = [[index[slot] for slot in slots.split("+")] for slots, *_ in english]
    german, english = (" ".join(words[:-1]) + "." for words in ([w[1] for w in german], [w[-1] for w in english]))
    return german[0].upper() + german[1:], english[0].upper() + english[1:], alignment


def part_of(german):
    """The part of a sentence pair, decided by a hash of the German sentence: "test" and "val" get 1 in 32 each."""
    return {0: "test", 1: "val"}.get(zlib.crc32(german.encode()) % 32, "train")


def toy_lines(part, n_lines):
    """The results of `toy_pair` for one part of the first `n_lines` lines, each German sentence once."""
    lines = {line[0]: line for line in map(toy_pair, range(1, n_lines + 1)) if part_of(line[0]) == part}
    return list(lines.values())


MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K_SHA256 = {
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"}


def load_pairs(data, part):
    """(German, English) pairs of the part "train", "val" or "test" of "toy", "multi30k" or a text file (also "all")."""
    if data == "toy":  # as many lines as each part needs
        return [line[:2] for line in toy_lines(part, {"train": 100_000, "val": 10_000, "test": 30_000}[part])]
    if data == "multi30k":  # Elliott et al. 2016, https://arxiv.org/abs/1605.00459
        texts = []
        for language in ("de", "en"):
            name = f"{'test_2016_flickr' if part == 'test' else part}.{language}.gz"
            path = os.path.join("data", "multi30k", name)
            download(MULTI30K_URL + name, path, MULTI30K_SHA256[name])
            with gzip.open(path, "rt", encoding="utf-8") as file:
                texts.append([line.strip() for line in file])
        return list(zip(*texts))
    try:
        with open(data, encoding="utf-8-sig") as file:
            lines = file.read().rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"cannot read {data}: {error}")
    pairs = []
    for n, line in enumerate(lines, start=1):                            # English, a tab, German, perhaps more columns
        english, german = ([column.strip() for column in line.split("\t")] + [""])[:2]
        if not (english and german):
            sys.exit(f"{data}, line {n}: expected English, a tab and German, found {line[:40]!r}")
        if part in ("all", part_of(german)):
            pairs.append((german, english))
    return pairs or sys.exit(f"{data} has too few lines: its {part} part is empty")


# ----------------------------------------------------------------------------------------------------------------------
# Tokens: byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909). Every text is a sequence of
# bytes, so 256 tokens can represent any of them. Then the most frequent pair of adjacent tokens becomes a new token,
# repeatedly, so frequent words become single tokens: " H" "und" becomes " Hund".
WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s+")      # merges stay within a word; the space before a word belongs to it
FIRST_BYTE = EOS + 1                            # tokens: PAD, BOS, EOS, the 256 bytes, then one for each merge


def merge(tokens, pair, token):
    """Replace every occurrence of the pair in the list of tokens by `token`."""
    merged = []
    for t in tokens:
        if merged and (merged[-1], t) == pair:
            merged[-1] = token
        else:
            merged.append(t)
    return merged


def learn_merges(texts, n_merges):
    """The first `n_merges` pairs to merge, in order. Stops early when no pair occurs twice."""
    frequency = collections.Counter(word for text in texts for word in WORD.findall(text))
    words = [([FIRST_BYTE + b for b in word.encode("utf-8", "surrogatepass")], n) for word, n in frequency.items()]
    counts, where = collections.Counter(), collections.defaultdict(set)  # of each pair: how often, in which words
    for i, (tokens, n) in enumerate(words):
        for pair in zip(tokens, tokens[1:]):
            counts[pair] += n
            where[pair].add(i)
    merges = []
    while len(merges) < n_merges and (most := max(counts.values(), default=0)) > 1:
        pair = min(pair for pair, n in counts.items() if n == most)      # ties: the smallest pair
        for i in where.pop(pair):                                        # only the counts in these words change
            old, n = words[i]
            words[i] = merge(old, pair, FIRST_BYTE + 256 + len(merges)), n
            for tokens, change in (old, -n), words[i]:
                for p in zip(tokens, tokens[1:]):
                    counts[p] += change
                    where[p].add(i)
        merges.append(pair)
    return merges


class Tokenizer:
    """Text to tokens and back, lossless for every str. `merges` is a list of pairs of tokens, in order."""

    def __init__(self, merges):
        self.merged = {tuple(pair): FIRST_BYTE + 256 + n for n, pair in enumerate(merges)}  # the token of each pair
        self.pieces = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)]                # the bytes of each token
        for left, right in merges:
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self.encoded = {}                                                # words seen before, with their tokens

    def encode(self, text):
        """The tokens of a text, a list of ints: the bytes of each word, merged in the order of `merges`."""
        words = WORD.findall(text)
        for word in words:
            if word not in self.encoded:
                tokens = [FIRST_BYTE + b for b in word.encode("utf-8", "surrogatepass")]
                while pairs := [pair for pair in zip(tokens, tokens[1:]) if pair in self.merged]:
                    first = min(pairs, key=self.merged.get)
                    tokens = merge(tokens, first, self.merged[first])
                self.encoded[word] = tokens
        return [token for word in words for token in self.encoded[word]]

    def decode(self, tokens):
        """The text of a list of tokens. Invalid UTF-8, which a model may produce, becomes U+FFFD."""
        data = b"".join(self.pieces[token] for token in tokens)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------------------------------------
# Training: batches and loss
def make_batches(examples, batch_tokens, seed):
    """Endless batches: lists of indices of examples (src, tgt), about `batch_tokens` tokens each, padding included."""
    for epoch in itertools.count():
        rng = random.Random(seed + epoch)
        # similar lengths share a batch, for little padding; adding 0 or 1 to them at random makes every epoch different
        order = sorted((int(len(tgt) + 2 * rng.random()), len(src), i) for i, (src, tgt) in enumerate(examples))
        batches, longest = [[]], 0
        for _, _, i in order:
            size = len(examples[i][0]) + len(examples[i][1])
            longest = max(longest, size)
            if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
                batches.append([])
                longest = size
            batches[-1].append(i)
        rng.shuffle(batches)
        yield from batches


def pad(rows, device):
    """Lists of tokens -> a tensor (B, T); shorter rows are filled with PAD."""
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], device=device)


def batch_loss(model, examples, device, label_smoothing=0.0):
    """Cross-entropy, summed over all target tokens of a batch that are not padding."""
    src, tgt = (pad(side, device) for side in zip(*examples))            # (B, S), (B, T + 1)
    logits, _ = model(src, tgt[:, :-1], need_weights=False)              # (B, T, vocab_size), predicts tgt[:, 1:]
    # Label smoothing (section 5.4) spreads a fraction of the target's probability over all tokens. That keeps the model
    # from becoming overconfident, and it raises the loss, whose minimum is now the entropy of the smoothed target.
    return F.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=PAD, reduction="sum",
                           label_smoothing=label_smoothing)


@torch.no_grad()
def validation_loss(model, examples, device):
    """Mean cross-entropy of all target tokens, without dropout or label smoothing. Leaves the model in eval mode."""
    model.eval()
    examples = sorted(examples, key=lambda example: len(example[1]))     # similar lengths, little padding
    total = sum(batch_loss(model, examples[i:i + 64], device).item() for i in range(0, len(examples), 64))
    return total / sum(len(tgt) - 1 for _, tgt in examples)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding, and BLEU, the score of translations
@torch.no_grad()
def beam_search(model, src, beam, length_penalty=1.0):
    """The best translation found for each sentence of src (B, S): tokens (B, T) up to EOS or max_len - 1, then PAD."""
    # A hypothesis is a partial translation, its score the sum of the log probabilities of its tokens. Every step
    # extends each hypothesis by every token and keeps the `beam` best results. With beam = 2, and scores in brackets:
    #   step 1    I (-0.4)              We (-1.3)              ...                      the 2 best first tokens
    #   step 2    I sleep (-0.9)        I am (-1.5)            We sleep (-1.4)  ...     keep "I sleep" and "We sleep"
    #   step 3    I sleep <eos> (-1.7)  We sleep <eos> (-2.6)  We sleep well (-1.8) ... keep the first and the third
    #   step 4    I sleep <eos> (-1.7)  We sleep well <eos> (-2.0)  ...                 all have ended: the second wins
    # The best have the highest score / length ** length_penalty: in step 4, -2.0 / 4 is more than -1.7 / 3. Every token
    # lowers the score, so without the division short translations would be favored. beam = 1 is greedy decoding.
    B, cache = len(src), {}
    memory, src_mask = (x.repeat_interleave(beam, dim=0) for x in model.encode(src))       # (B * beam, S, d_model)
    tokens = torch.full((B * beam, 1), BOS, device=src.device)           # grows to (B * beam, 1 + T)
    scores = torch.full((B, beam), -math.inf, device=src.device)         # (B, beam) sums of log probabilities
    scores[:, 0] = 0.0                          # all start equal: extending each would give `beam` copies
    lengths, ended = torch.zeros_like(scores), torch.zeros_like(scores, dtype=torch.bool)
    while tokens.size(1) < model.max_len and not ended.all():
        logits, _ = model.decode(tokens[:, -1:], memory, src_mask, cache)
        log_probs = logits.log_softmax(dim=-1).view(B, beam, -1)         # (B, beam, vocab_size)
        log_probs[..., PAD] = -math.inf
        log_probs[ended] = -math.inf            # after its end a hypothesis is extended by PAD only, at no cost
        log_probs[..., PAD][ended] = 0.0
        lengths = lengths + ~ended
        extended = scores.unsqueeze(-1) + log_probs                      # (B, beam, vocab_size)
        best = (extended / lengths.unsqueeze(-1) ** length_penalty).flatten(1).topk(beam).indices           # (B, beam)
        parent, token = best // log_probs.size(-1), best % log_probs.size(-1)
        scores, lengths = extended.flatten(1).gather(1, best), lengths.gather(1, parent)
        ended = ended.gather(1, parent) | (token == EOS)
        rows = (beam * torch.arange(B, device=src.device).unsqueeze(1) + parent).flatten()
        tokens = torch.cat([tokens[rows], token.view(-1, 1)], dim=1)     # new row i continues the old row rows[i]
        cache = {module: (key[rows], value[rows]) for module, (key, value) in cache.items()}
    return tokens.view(B, beam, -1)[:, 0, 1:]                            # topk sorts: the first is the best


def translate(model, tokenizer, sentences, beam):
    """Translate a list of strings, in batches of 64 sentences of similar length. A blank string gives an empty one."""
    sources = [tokenizer.encode(sentence) + [EOS] for sentence in sentences]
    for sentence, source in zip(sentences, sources):
        if len(source) > model.max_len:
            sys.exit(f"a text may have {model.max_len - 1} tokens at most, not {len(source) - 1}: {sentence[:40]}...")
    order = sorted((i for i, sentence in enumerate(sentences) if sentence.strip()), key=lambda i: len(sources[i]))
    translations = [""] * len(sentences)
    for start in range(0, len(order), 64):
        rows = order[start:start + 64]
        src = pad([sources[i] for i in rows], model.token_embedding.weight.device)         # (B, S)
        for i, tokens in zip(rows, beam_search(model, src, beam).tolist()):
            translations[i] = tokenizer.decode(tokens)                   # EOS and PAD have no bytes
    return translations


def bleu_words(text):
    """Split a text into words and punctuation marks as mteval-v13a, the standard script, does."""
    for entity, sign in ("<skipped>", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"):
        text = text.replace(entity, sign)
    text = re.sub(r"([!-&(-+/:-@[-`{-~])", r" \1 ", f" {text} ")         # all punctuation but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)                    # . and , after a non-digit
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)                    # . and , before a non-digit
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()                # - after a digit


def bleu(translations, references):
    """BLEU (Papineni et al. 2002) from 0 to 100, as sacreBLEU computes it by default, with one reference each."""
    matches, totals, reference_length = [0] * 4, [0] * 4, 0              # of n-grams, n = 1 to 4
    for words, reference_words in zip(map(bleu_words, translations), map(bleu_words, references)):
        reference_length += len(reference_words)
        for n in range(1, 5):
            ours, theirs = (collections.Counter(zip(*[w[i:] for i in range(n)])) for w in (words, reference_words))
            matches[n - 1] += (ours & theirs).total()                    # each n-gram of the reference is used once
            totals[n - 1] += ours.total()
    if not matches[0] or not totals[3]:
        return 0.0
    log_precision, n_zeros = 0.0, 0
    for match, total in zip(matches, totals):
        n_zeros += match == 0                   # smoothing: the first n without a match counts 1/2, the next 1/4, ...
        log_precision += math.log((match or 0.5 ** n_zeros) / total) / 4
    # the geometric mean of the precisions matches / totals, reduced if the translations are shorter than the references
    return 100 * math.exp(log_precision + min(0.0, 1 - reference_length / totals[0]))


# ----------------------------------------------------------------------------------------------------------------------
# Using a trained model: what does cross-attention attend to? Then --test, --line and --text
def alignment_accuracy(model, tokenizer, lines):
    """How often each head attends most to the right source word (2, n_dec_layers, H), and how often baselines do."""
    device, hits, chance, diagonal, n_words = model.token_embedding.weight.device, 0, 0, 0, 0
    for german, english, alignment in lines:                             # right for "saw": "hat" or "gesehen"
        src, tgt = tokenizer.encode(german) + [EOS], [BOS] + tokenizer.encode(english)       # the reference is fed in
        one_token_per_word = len(src) == len(german.split()) + 2 and len(tgt) == len(alignment) + 1
        assert one_token_per_word, "alignment needs one token per word: train with more --merges"
        T, S = len(alignment) - 1, len(src) - 1                          # without the target's full stop, without <eos>
        right = torch.tensor([[s in words for s in range(S)] for words in alignment[:T]])    # (T, S)
        _, weights = model.decode(pad([tgt], device), *model.encode(pad([src], device)), need_weights=True)
        attended = torch.cat(weights)[..., :S].argmax(dim=-1).cpu()      # B = 1, so cat gives (n_dec_layers, H, T + 2)
        # For the input "<bos> The man", row 0 of the weights *produces* "The" and row 1 *consumes* it. Both can be
        # read as the alignment of "The" (Chen et al. 2020, arXiv:2004.14837).
        rows = torch.stack([attended[..., :T], attended[..., 1:T + 1]])  # (2, n_dec_layers, H, T)
        hits += right[torch.arange(T), rows].sum(dim=-1)
        chance += right.float().mean(dim=1).sum()                        # baseline: a random source word
        diagonal += right.diagonal().sum()                               # baseline: the word at the same position
        n_words += T
    return hits / n_words, chance / n_words, diagonal / n_words


def plot_cross_attention(model, tokenizer, sentence, beam, path):
    """Heatmaps of the last decoder block's heads for `sentence`. A row is labeled with the token that it produces."""
    src = pad([tokenizer.encode(sentence) + [EOS]], model.token_embedding.weight.device)   # (1, S)
    tokens = beam_search(model, src, beam)
    tokens = tokens[:, tokens[0] != PAD]                                 # (1, T)
    _, weights = model(src, F.pad(tokens, (1, 0), value=BOS)[:, :-1])    # (1, H, T, S)
    labels = [[tokenizer.decode([t]).replace(" ", "_") or "<eos>" for t in row.tolist()] for row in (src[0], tokens[0])]
    plot_attention(weights[0], *labels, path, x_name="source token", y_name="produced token")


def load_model(data, out_dir, device):
    """The trained model for this data and its tokenizer, from `out_dir` or else from assets/."""
    name = f"translate_{os.path.basename(data)}.pt"
    for path in (os.path.join(out_dir, name), os.path.join(os.path.dirname(__file__), "assets", name)):
        if os.path.exists(path):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model = TransformerModel(*saved["sizes"], dropout=0.0)
            model.load_state_dict(saved["weights"])                      # stored in float16
            return model.to(device).eval().requires_grad_(False), Tokenizer(saved["merges"])
    sys.exit(f"no weights for {data}: train them with python translate.py --data {data} --out_dir {out_dir}")


def score(model, tokenizer, pairs, beam):
    """Translate the German sentences and report the fraction of exact matches and BLEU."""
    german, english = zip(*pairs)
    translations = translate(model, tokenizer, german, beam)
    exact = sum(map(str.__eq__, translations, english)) / len(english)
    return f"exact={exact:.4f} bleu={bleu(translations, english):.2f}"


def test(args):
    """Score the test part. On the toy language, also measure how well every head aligns, and plot it."""
    model, tokenizer = load_model(args.data, args.out_dir, args.device)
    result = score(model, tokenizer, load_pairs(args.data, "test"), args.beam)
    if args.data == "toy":
        val_accuracy, _, _ = alignment_accuracy(model, tokenizer, toy_lines("val", 10_000))
        accuracy, chance, diagonal = alignment_accuracy(model, tokenizer, toy_lines("test", 30_000))
        result += f" alignment={accuracy.flatten()[val_accuracy.argmax()]:.4f}"  # of the head and row chosen on val
        heads = [f"{n + 1}.{h + 1}" for n in range(accuracy.size(1)) for h in range(accuracy.size(2))]
        print(f"most attended source word is right: chance {chance:.3f}, diagonal {diagonal:.3f}")
        print("decoder block.head         ", *(f"{head:>5}" for head in heads))
        figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
        for reading, values, marker in zip(("produces", "consumes"), accuracy.flatten(1).tolist(), ("o", "s")):
            print(f"row that {reading} the word", *(f"{x:.3f}" for x in values))
            axis.plot(heads, values, marker, label=f"row that {reading} the word")
        axis.axhline(diagonal, color="grey", linestyle="--", label="diagonal")
        axis.axhline(chance, color="grey", linestyle=":", label="chance")
        axis.set(xlabel="decoder block.head", ylabel="accuracy", ylim=(-0.05, 1.05))
        figure.legend(loc="outside upper center", ncols=4, fontsize=7)
        path = os.path.join(args.out_dir, "translate_alignment.png")
        figure.savefig(path, dpi=100)
        print(f"saved {path}")
    return f"{result} params={sum(p.numel() for p in model.parameters())}"


def translate_texts(args):
    """Translate the sentences of --line or --text, print the translations, and plot the attention with --plot."""
    if args.line is None:
        sentences = [line.rstrip("\n") for line in sys.stdin] if args.text == ["-"] else args.text
    else:
        pairs = [] if args.data == "toy" else load_pairs(args.data, "test" if args.data == "multi30k" else "all")
        n_lines = len(pairs) or N_TOY_LINES
        if not 1 <= args.line <= n_lines:
            sys.exit(f"--line {args.line}: {args.data} has lines 1 to {n_lines}")
        sentence, reference = pairs[args.line - 1] if pairs else toy_pair(args.line)[:2]
        print(f"source:      {sentence}\nreference:   {reference}\ntranslation: ", end="")
        sentences = [sentence]
    model, tokenizer = load_model(args.data, args.out_dir, args.device)
    for n, translation in enumerate(translate(model, tokenizer, sentences, args.beam), start=1):
        print(translation)
        if args.plot and translation:
            name = f"translate_{os.path.basename(args.data)}_{n}.png"
            plot_cross_attention(model, tokenizer, sentences[n - 1], args.beam, os.path.join(args.out_dir, name))


if __name__ == "__main__":
    options = {  # training options whose defaults depend on the data: type, toy language, other data, help
        "steps": (positive(int), 500, 22_000, "training steps"),
        "batch_tokens": (positive(int), 4000, 2000, "tokens in each batch, both languages together"),
        "lr": (positive(float), 0.003, 0.0015, "peak learning rate"),
        "dropout": (float, 0.1, 0.25, "dropout probability"),
        "d_model": (positive(int), 64, 192, "width of the model"),
        "n_heads": (positive(int), 4, 4, "attention heads"),
        "n_enc_layers": (positive(int), 2, 3, "encoder blocks"),
        "n_dec_layers": (positive(int), 2, 3, "decoder blocks"),
        "merges": (positive(int), 600, 4000, "byte-pair merges")}
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=argparse.SUPPRESS, help="toy (the default), multi30k (the default with "
                        "--text), or a text file with English, a tab and German on every line")
    parser.add_argument("--test", action="store_true", help="do not train: score the test part")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--line", type=int, help="do not train: translate this line, counted from 1 (ignores --test)")
    mode.add_argument("--text", nargs="+", help="do not train: translate these texts; - reads lines from stdin")
    mode.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--plot", action="store_true", help="with --line or --text: plot the cross-attention")
    parser.add_argument("--beam", type=positive(int), default=5, help="hypotheses in beam search; 1 is greedy")
    for name, (kind, toy, other, text) in options.items():
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (toy {toy}, else {other})")
    args = parse_args(parser)
    vars(args).setdefault("data", "multi30k" if args.text else "toy")
    for name, (_, toy, other, _) in options.items():
        vars(args).setdefault(name, toy if args.data == "toy" else other)
    if args.d_model % args.n_heads:
        parser.error(f"--n_heads {args.n_heads} does not divide --d_model {args.d_model}")
    if args.line is not None or args.text:
        sys.exit(translate_texts(args))
    if args.plot:
        parser.error("--plot needs --line or --text")
    if args.test:
        print(f"result: {test(args)} seconds={time.perf_counter() - start:.1f}")
        sys.exit()

    # Under torchrun every process takes a part of each batch, and DistributedDataParallel averages the gradients. The
    # loss is divided by the targets of all parts, so they should be added: hence the factor world_size below.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    weights_path = os.path.join(args.out_dir, f"translate_{os.path.basename(args.data)}.pt")
    checkpoint_path = weights_path + ".checkpoint"  # an unfinished run; deleted at the end
    if args.resume and not os.path.exists(checkpoint_path):
        sys.exit(f"there is nothing to resume: {checkpoint_path} does not exist")
    if not args.resume and os.path.exists(checkpoint_path):
        sys.exit(f"{checkpoint_path} holds an unfinished run: continue it with --resume, or delete the file")

    train_pairs, val_pairs = load_pairs(args.data, "train"), load_pairs(args.data, "val")
    settings = {name: getattr(args, name) for name in ("data", "seed", *options)}
    settings.update({"checksum of the data": zlib.crc32(repr(train_pairs).encode()), "processes": world_size})
    merges = learn_merges(itertools.chain(*train_pairs), args.merges)
    tokenizer = Tokenizer(merges)
    train_pairs, val_pairs = ([pair for pair in pairs if max(len(tokenizer.encode(text)) for text in pair) < MAX_LEN]
                              for pairs in (train_pairs, val_pairs))     # without sentences that are too long
    examples, val_examples = ([(tokenizer.encode(german) + [EOS], [BOS, *tokenizer.encode(english), EOS])
                               for german, english in pairs] for pairs in (train_pairs, val_pairs))
    sizes = len(tokenizer.pieces), MAX_LEN, args.d_model, args.n_heads, args.n_enc_layers, args.n_dec_layers
    model = TransformerModel(*sizes, args.dropout).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    n_params, first_step = sum(p.numel() for p in model.parameters()), 0
    if rank == 0:
        print(f"{n_params:,} parameters, {len(examples):,} training pairs, {len(val_examples):,} validation pairs")
    if args.resume:
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        if checkpoint["settings"] != settings:
            sys.exit(f"cannot resume: {checkpoint_path} was made with {checkpoint['settings']}, not {settings}")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step = checkpoint["step"]

    net = model if world_size == 1 else nn.parallel.DistributedDataParallel(model)
    batches = itertools.islice(make_batches(examples, args.batch_tokens, args.seed), first_step, None)
    warmup = max(1, min(args.steps // 10, 1000))
    for step in range(first_step, args.steps):
        model.train()
        torch.manual_seed(args.seed + step * world_size + rank)          # so a resumed run draws the same dropout masks
        indices = next(batches)
        if len(indices) < world_size:
            continue                                                     # every process needs a sentence
        batch = [examples[i] for i in indices[rank::world_size]]
        n_targets = sum(len(examples[i][1]) - 1 for i in indices)        # of all processes
        loss = batch_loss(net, batch, args.device, label_smoothing=0.1) / n_targets * world_size
        if step < warmup:                                                # linear warm-up, then cosine decay to zero
            lr = args.lr * (step + 1) / warmup
        else:
            lr = args.lr * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup))) / 2
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if step == 0 and rank == 0:
            print(f"step 0: loss {loss:.4f}, uniform prediction ln {sizes[0]} = {math.log(sizes[0]):.4f}", flush=True)
        if (step + 1) % max(1, args.steps // 20) == 0 and rank == 0:
            val_loss, seconds = validation_loss(model, val_examples, args.device), time.perf_counter() - start
            print(f"step {step + 1}: loss {loss:.4f}, validation loss {val_loss:.4f}, {seconds:.0f} s")
            print("   ", *translate(model, tokenizer, [val_pairs[0][0]], args.beam), flush=True)
            torch.save({"settings": settings, "step": step + 1, "model": model.state_dict(),
                        "optimizer": optimizer.state_dict()}, checkpoint_path + ".tmp")
            os.replace(checkpoint_path + ".tmp", checkpoint_path)        # a kill leaves the old file or the new one

    if world_size > 1:
        distributed.destroy_process_group()
    if rank == 0:
        weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
        torch.save({"sizes": sizes, "merges": merges, "weights": weights}, weights_path + ".tmp")
        os.replace(weights_path + ".tmp", weights_path)
        os.remove(checkpoint_path)
        print(f"saved {weights_path}")
        result = score(*load_model(args.data, args.out_dir, args.device), val_pairs, args.beam)
        print(f"result: {result} params={n_params} seconds={time.perf_counter() - start:.1f}")
