"""
Translate German to English with the Transformer of "Attention Is All You Need".

The encoder reads the German sentence. The decoder writes the English one, token by token, and
cross-attention lets each step attend to the German tokens. There are two corpora:

toy      a small German grammar. Training takes a minute. We know the right source word of
         every target word, so we can measure how well each attention head finds it, and how well
         the gradient of the output does (as in saliency.py).
tatoeba  169,813 pairs of everyday sentences. Training takes two hours.

Trained weights for both are in assets/.

$ python translate.py --text "Wie geht es dir?"     # translate any text, with the tatoeba weights
$ python translate.py --text -                      # translate the lines that you type
$ python translate.py                               # train on the toy language
$ python translate.py --line 7 --plot               # translate line 7, plot the attention
$ python translate.py --test                        # exact matches, BLEU, alignment
$ python translate.py --test --load out/translate_toy.pt    # the same with your own weights
$ python translate.py --data tatoeba                # train on everyday sentences

Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762. Read
attention.py and parity.py first: they explain attention, heads, LayerNorm and residual connections.
"""

import argparse
import collections
import itertools
import math
import os
import random
import re
import sys
import time
import unicodedata
import zipfile
import zlib

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import distributed, nn

from attention import attention, download, make_folder, number, parse_args, plot_attention

# --------------------------------------------------------------------------------------------------
# The Transformer (Figure 1 of the paper)
#
# A token is a word or a piece of one, stored as an integer. A logit is the score of a token before
# softmax turns scores into probabilities. The decoder starts by reading BOS (beginning of sentence)
# and finishes by writing EOS (end of sentence). The shapes are for B sentences, S source tokens, T
# target tokens, and H heads of width d_k = d_model / H. Read from bottom to top:
#
#                                                        logits (B, T, vocab_size)
#                                                      token embedding, transposed
#                                                                   |
#              memory (B, S, d_model) --.     +-- DecoderBlock -----|-------------+
#                      |                |     |             add & LayerNorm       |
#  +-- EncoderBlock ---|-------------+  |     |           feed-forward            |
#  |             add & LayerNorm     |  |     |             add & LayerNorm       |
#  |           feed-forward          |  '------> cross-attention to the source    |
#  |             add & LayerNorm     |        |             add & LayerNorm       |
#  |           self-attention        |        |     causal self-attention         |
#  +-------------------|-------------+        +---------------------|-------------+
#         token + position embedding                 token + position embedding
#         src: German, EOS (B, S)                 tgt: BOS, English so far (B, T)
#
# "add & LayerNorm" adds a layer's input to its output (the residual connection) and normalizes the
# sum. This is post-norm; parity.py normalizes first. The main differences from the paper: positions
# are learned instead of sinusoidal (the paper found hardly any difference), the hidden layer of the
# feed-forward network is 2 instead of 4 times as wide as the model, whole tokens are dropped at
# random, and the learning rate falls along a cosine.

PAD, BOS, EOS = 0, 1, 2     # padding, beginning of sentence, end of sentence
MAX_LEN = 100               # number of positions: the most tokens that a sentence can have


class MultiHeadAttention(nn.Module):
    """H attention heads side by side (section 3.2.2).

    A head gives each query one weighted mean. With H heads it can look up H things at once, at
    about the same cost, because each head has 1/H of the width. In the paper one head is 0.9 BLEU
    (translation quality, see `bleu`) worse than the best number of heads (table 3). The toy
    language does not need several: with --n_heads 1 all test sentences still come out right, and
    the last block's head finds the source word of 96% of the words, against 99% for the best head
    of the default model (see `alignment_accuracy`).
    """

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.w_q = nn.Linear(d_model, d_model)  # makes the queries of all heads
        self.w_k = nn.Linear(d_model, d_model)  # the keys
        self.w_v = nn.Linear(d_model, d_model)  # the values
        self.w_o = nn.Linear(d_model, d_model)  # mixes the outputs of the heads

    def split(self, x):
        """Cut the last dimension into heads: (B, T, d_model) -> (B, H, T, d_k).

        The heads come before T, so `attention` treats each head on its own.
        """
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x, memory, mask=None, cache=None):
        """Queries from x (B, T, d_model), keys and values from memory (B, S, d_model).

        Self-attention passes x as memory, cross-attention the output of the encoder. Returns the
        output (B, T, d_model) and the attention weights (B, H, T, S).

        The KV cache: when we decode token by token (see `greedy`), earlier tokens do not attend to
        the new one, so in every layer their keys and values stay the same. The source does not
        change either. (Old queries are not needed, because we only want the new token's logits.) So
        the dict `cache` keeps the keys and values of each attention layer, and only those of new
        tokens are computed: without it, beam search takes six times as long. With a cache, memory
        holds only tokens whose keys are not cached yet, or is None if there are none:

                   self-attention              cross-attention (7 source tokens)
                   memory     all keys         memory     all keys
            step 1 1 token    (B, H, 1, d_k)   7 tokens   (B, H, 7, d_k)
            step 2 1 token    (B, H, 2, d_k)   None       (B, H, 7, d_k)
            step 3 1 token    (B, H, 3, d_k)   None       (B, H, 7, d_k)
        """
        query = self.split(self.w_q(x))                         # (B, H, T, d_k)
        if memory is None:
            key, value = cache[self]                            # (B, H, S, d_k)
        else:
            key = self.split(self.w_k(memory))
            value = self.split(self.w_v(memory))
            if cache is not None and self in cache:
                old_key, old_value = cache[self]
                key = torch.cat([old_key, key], dim=2)
                value = torch.cat([old_value, value], dim=2)
        if cache is not None:
            cache[self] = (key, value)
        output, weights = attention(query, key, value, mask)    # (B, H, T, d_k), (B, H, T, S)
        output = output.transpose(1, 2).flatten(2)              # (B, T, d_model)
        return self.w_o(output), weights


def feed_forward(d_model):
    """A network with one hidden layer, applied to each token on its own."""
    return nn.Sequential(
        nn.Linear(d_model, 2 * d_model),
        nn.ReLU(),
        nn.Linear(2 * d_model, d_model),
    )


class EncoderBlock(nn.Module):
    """Self-attention over all source tokens, then the feed-forward network."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = feed_forward(d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        output, _ = self.self_attention(x, x, mask)
        x = self.norm1(x + self.dropout(output))
        x = self.norm2(x + self.dropout(self.feed_forward(x)))
        return x                                                # (B, S, d_model)


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the source, then the feed-forward network.

    Without cross-attention this is much like GPT, which has no source and predicts the next token
    from the text so far.
    """

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads)
        self.cross_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = feed_forward(d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, tgt_mask, memory, src_mask, cache=None):
        output, _ = self.self_attention(x, x, tgt_mask, cache)
        x = self.norm1(x + self.dropout(output))
        output, weights = self.cross_attention(x, memory, src_mask, cache)
        x = self.norm2(x + self.dropout(output))
        x = self.norm3(x + self.dropout(self.feed_forward(x)))
        return x, weights                                       # (B, T, d_model), (B, H, T, S)


class TransformerModel(nn.Module):
    """Source and target tokens -> the logits of the token that follows each target token."""

    def __init__(self, vocab_size, max_len, d_model, n_heads, n_enc_layers, n_dec_layers,
                 dropout=0.1):
        super().__init__()
        self.max_len = max_len
        # Both languages share their tokens, so one matrix embeds them all. It is also the output
        # layer (section 3.4): the logit of a token is the dot product of its embedding and the
        # decoder's output. This works because tokens that are used in similar ways need similar
        # vectors in both jobs: as inputs they should have similar effects, and as outputs they
        # should get similar logits. It saves a second matrix of this size, and it makes copying a
        # name easy: cross-attention only has to bring the embedding of the source token to the
        # output, where its dot product with the same embedding is large.
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        # Attention does not see the order of tokens, so positions are added. The sum still holds
        # both, because they use mostly different directions, so a linear map can read one and
        # ignore the other: in the tatoeba model, projected on 10 directions of 192, the first 20
        # positions keep 81% of their variance, the tokens only 3%. (With 10 random directions they
        # would keep 5%.)
        self.position_embedding = nn.Embedding(max_len, d_model)
        self.dropout = nn.Dropout(dropout)
        # In training, dropout sets randomly chosen values to 0, so the model learns not to rely on
        # any one of them. Word dropout zeroes the whole embedding of a token, so that the model
        # does not rely on any one word (https://arxiv.org/abs/1905.11901). Dropout1d does this,
        # because in (B, T, d_model) it zeroes whole rows. Half the rate of ordinary dropout worked
        # well.
        self.token_dropout = nn.Dropout1d(dropout / 2)
        self.encoder = nn.ModuleList(
            EncoderBlock(d_model, n_heads, dropout) for _ in range(n_enc_layers))
        self.decoder = nn.ModuleList(
            DecoderBlock(d_model, n_heads, dropout) for _ in range(n_dec_layers))
        # LayerNorm gives the output layer d_model inputs of standard deviation 1. Weights of
        # standard deviation 1 / sqrt(d_model) turn them into logits of standard deviation 1. Even
        # so, tatoeba's loss at step 0 is 10.3, not the ln(8,259) = 9.0 of a uniform prediction. The
        # loss is ln(sum of all e^logit) minus the right logit, and for normal random logits the
        # mean of e^logit is e^(1/2) = 1.65 instead of 1. Residual connections also carry the
        # embedding of the input token to the output, so the untrained model predicts the token that
        # it has just read, with a logit of about 9 (measured). Together these give about
        # ln(1.65 * 8,259 + e^9) = 10.0.
        nn.init.normal_(self.token_embedding.weight, std=d_model ** -0.5)
        # `embed` gives tokens a standard deviation of 1. Positions start with 0.5, a fifth of the
        # variance of the sum, because the word usually says more than its position.
        nn.init.normal_(self.position_embedding.weight, std=0.5)

    def embed(self, tokens, start=0):
        """Tokens (B, T) at the positions start, start + 1, ... -> embeddings (B, T, d_model)."""
        d_model = self.token_embedding.embedding_dim
        positions = torch.arange(start, start + tokens.size(1), device=tokens.device)
        x = self.token_embedding(tokens) * math.sqrt(d_model)   # standard deviation 1
        x = self.token_dropout(x)
        return self.dropout(x + self.position_embedding(positions))

    def encode(self, src):
        """Source tokens (B, S) -> memory (B, S, d_model) and the source mask (B, 1, 1, S)."""
        src_mask = (src != PAD)[:, None, None, :]               # True = may attend: no padding
        x = self.embed(src)
        for block in self.encoder:
            x = block(x, src_mask)
        return x, src_mask

    def decode(self, tgt, memory, src_mask, cache=None):
        """Target tokens (B, T) -> logits (B, T, vocab_size) and the cross-attention weights.

        The weights are a list, (B, H, T, S) for each block. With a cache, tgt holds only the new
        tokens, and memory is used only the first time.
        """
        start = 0                                               # number of tokens in the cache
        if cache:                                               # neither None nor empty
            cached_key, _ = cache[self.decoder[0].self_attention]
            start = cached_key.size(2)
            memory = None                                       # its keys and values are there
        end = start + tgt.size(1)
        # The causal mask. 1 means may attend.
        #     1 0 0 0    Row i predicts token i + 1. It may attend to tokens 0 to i, but not to the
        #     1 1 0 0    one that it predicts. So in training the input can be the whole reference
        #     1 1 1 0    (the given translation), and one forward pass trains all positions. With 3
        #     1 1 1 1    tokens in the cache, tgt is token 3 alone, and only row 3 is needed.
        # Padding comes after all real tokens, so none of them attends to it. The predictions at
        # padding do not matter, because the loss ignores them.
        tgt_mask = torch.ones(end, end, dtype=torch.bool, device=tgt.device).tril()
        tgt_mask = tgt_mask[start:]                             # (T, end)
        x = self.embed(tgt, start)
        weights = []
        for block in self.decoder:
            x, block_weights = block(x, tgt_mask, memory, src_mask, cache)
            weights.append(block_weights)
        logits = F.linear(x, self.token_embedding.weight)
        return logits, weights

    def forward(self, src, tgt):
        """Logits (B, T, vocab_size) and the last block's cross-attention weights (B, H, T, S)."""
        memory, src_mask = self.encode(src)
        logits, weights = self.decode(tgt, memory, src_mask)
        return logits, weights[-1]


# --------------------------------------------------------------------------------------------------
# Data 1: the toy language (read the examples, skip the code on a first reading)
#
# In English, position shows who does what: the subject comes before the verb. In German, the
# article marks a masculine object ("der" becomes "den", "ein" becomes "einen"), so the object may
# come first:
#
#     Der Mann sieht den Hund.                      The man sees the dog.
#     Den Mann sieht der Hund.                      The dog sees the man.
#     Gestern hat die Ärztin einen Vogel gehört.    Yesterday the doctor heard a bird.
#
# The finite verb (sieht, hat) is the second element, and a participle (gehört) comes last. In our
# grammar only masculine objects come first, because the other articles do not change. So every
# German sentence has exactly one translation. This lets us count any other translation as wrong,
# and we know which German words every English word comes from.

TOY_SEED = 1_218_789        # with this seed line 7 is a good example
N_TOY_LINES = {"train": 100_000, "val": 10_000, "test": 30_000}     # see `toy_lines`

NOUNS = [  # German, gender, English
    ("König", "m", "king"), ("Lehrer", "m", "teacher"), ("Mann", "m", "man"),
    ("Bäcker", "m", "baker"), ("Hund", "m", "dog"), ("Vogel", "m", "bird"), ("Esel", "m", "donkey"),
    ("Frau", "f", "woman"), ("Ärztin", "f", "doctor"), ("Königin", "f", "queen"),
    ("Katze", "f", "cat"), ("Maus", "f", "mouse"),
    ("Kind", "n", "child"), ("Mädchen", "n", "girl"), ("Pferd", "n", "horse"),
]
ADJECTIVES = [  # German stem, English
    ("jung", "young"), ("alt", "old"), ("klug", "clever"), ("klein", "small"), ("groß", "big"),
    ("hungrig", "hungry"), ("freundlich", "friendly"),
]
ARTICLES = {  # of each gender: (indefinite, adjective ending), (definite, adjective ending)
    "m": [("ein", "er"), ("der", "e")],
    "f": [("eine", "e"), ("die", "e")],
    "n": [("ein", "es"), ("das", "e")],
    "m object": [("einen", "en"), ("den", "en")],
}
VERBS = [  # German: present, participle; English: present, past
    ("sieht", "gesehen", "sees", "saw"),
    ("hört", "gehört", "hears", "heard"),
    ("findet", "gefunden", "finds", "found"),
    ("besucht", "besucht", "visits", "visited"),
    ("weckt", "geweckt", "wakes", "woke"),
    ("jagt", "gejagt", "chases", "chased"),
]


def _pick(rng, options):
    """A random element, the same in every version of Python (rng.choice need not be)."""
    return options[int(rng.random() * len(options))]


def _noun_phrase(rng, noun, definite, is_object):
    """An article, perhaps an adjective, and a noun: a list of (German word, English word)."""
    german, gender, english = noun
    if gender == "m" and is_object:
        gender = "m object"
    indefinite_forms, definite_forms = ARTICLES[gender]
    article, ending = definite_forms if definite else indefinite_forms
    words = [(german, english)]
    if rng.random() < 0.4:
        stem, adjective = _pick(rng, ADJECTIVES)
        words.insert(0, (stem + ending, adjective))
    if definite:
        english_article = "the"
    else:
        _, first_word = words[0]
        english_article = "an" if first_word[0] in "aeiou" else "a"
    return [(article, english_article)] + words


def toy_pair(n):
    """Line n of the toy language: the German sentence, the English one, and the alignment.

    For every English word and the full stop, the alignment lists the indices of its German words.
    """
    rng = random.Random(TOY_SEED + n)
    subject_noun = _pick(rng, NOUNS)
    subject_is_definite = rng.random() < 0.7
    subject = _noun_phrase(rng, subject_noun, subject_is_definite, is_object=False)
    object_noun = _pick(rng, [noun for noun in NOUNS if noun != subject_noun])
    object_is_definite = rng.random() < 0.7
    object_ = _noun_phrase(rng, object_noun, object_is_definite, is_object=True)
    present, participle, english_present, english_past = _pick(rng, VERBS)
    if rng.random() < 0.5:                      # Der Mann hat gestern den Hund gesehen.
        finite = [("hat", english_past)]
        last = [(participle, "")]               # no word of its own: "hat gesehen" is "saw"
        adverb = [("gestern", "yesterday")]
    else:                                       # Der Mann sieht heute den Hund.
        finite = [(present, english_present)]
        last = []
        adverb = [("heute", "today")]
    if rng.random() < 0.5:
        adverb = []

    # Choose what comes first in German. In English an adverb can come first, too.
    can_be_first = ["subject"]
    if object_noun[1] == "m" and subject_is_definite:   # "Den Mann sieht ein Hund" sounds odd
        can_be_first.append("object")
    if adverb:
        can_be_first.append("adverb")
    first = _pick(rng, can_be_first)
    english_order = ["subject", "finite", "last", "object", "adverb"]
    if first == "subject":
        german_order = ["subject", "finite", "adverb", "object", "last"]
    elif first == "object":
        german_order = ["object", "finite", "subject", "adverb", "last"]
    else:
        german_order = ["adverb", "finite", "subject", "object", "last"]
        english_order = ["adverb", "subject", "finite", "last", "object"]

    parts = {"subject": subject, "finite": finite, "adverb": adverb, "object": object_,
             "last": last}
    german = []
    start = {}                                  # of each part: the index of its first word
    for name in german_order:
        start[name] = len(german)
        german += [word for word, _ in parts[name]]
    english = []
    alignment = []
    for name in english_order:
        for i, (_, word) in enumerate(parts[name]):
            if word:
                english.append(word)
                alignment.append([start[name] + i])
            else:
                alignment[-1].append(start[name] + i)   # the second source word of "saw"
    alignment.append([len(german)])             # the full stop
    return _sentence(german), _sentence(english), alignment


def _sentence(words):
    text = " ".join(words) + "."
    return text[0].upper() + text[1:]


def part_of(german):
    """The part that a pair belongs to: "val" or "test" (1/32 of all pairs each), or "train".

    A hash of the German sentence decides, so a sentence that occurs twice is in one part only.
    """
    bucket = zlib.crc32(german.encode()) % 32
    if bucket == 0:
        return "test"
    if bucket == 1:
        return "val"
    return "train"


def toy_lines(part):
    """The lines that belong to a part, among the first N_TOY_LINES[part], each sentence once."""
    lines = {}
    for n in range(1, N_TOY_LINES[part] + 1):
        german, english, alignment = toy_pair(n)
        if part_of(german) == part:
            lines[german] = (german, english, alignment)
    return list(lines.values())


# --------------------------------------------------------------------------------------------------
# Data 2: everyday sentences, and your own text files (how they are read can be skipped)
#
# tatoeba: English-German pairs from https://tatoeba.org, collected by
# https://www.manythings.org/anki, license CC BY 2.0 (the edition of 2018-05-13).

DATA_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
TATOEBA_URL = ("https://raw.githubusercontent.com/rioyshky/translation/"
               "de48b7027f7318d77010a6e08ed928c10748c23d/deu-eng.zip")
TATOEBA_SHA256 = "b7688f84f99fa33c17397c14d8bd9cef1fdeb2ee0bf50074767023aee8926e28"


def normalize(text):
    """A text with composed characters (Unicode NFC) and single spaces.

    "ä" can be one character or two (a, then dots): they look the same, but the tokens differ.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


# What `fold` replaces: quotation marks, apostrophes and dashes of all kinds with the usual one, two
# signs with words, and ı and ł with i and l, because Unicode does not split them into a letter and
# a mark. "↑" is dropped, because it marks capital letters (see `mark_capitals`).
REPLACEMENTS = {"…": "...", "€": " euro", "$": " dollar", "ı": "i", "ł": "l", "Ł": "l", "↑": ""}
REPLACEMENTS |= dict.fromkeys("„“”‟«»", '"')
REPLACEMENTS |= dict.fromkeys("‚‘’‛ʼ‹›´`′", "'")
REPLACEMENTS |= dict.fromkeys("‐‑‒–—―−－", "-")


def fold(german):
    """German in lower case, with ae, oe, ue and ss for ä, ö, ü and ß, and plain punctuation.

    People also type "MÄDCHEN" or "maedchen" for "Mädchen", and text that is copied from a web page
    can hold invisible characters, such as soft hyphens. Folded, these are the same tokens. Other
    accents are dropped, because the training data has too few to learn them: "é" becomes "e".
    """
    # without invisible characters (Unicode category "Cf")
    german = "".join(char for char in german if unicodedata.category(char) != "Cf")
    german = normalize(german.translate(str.maketrans(REPLACEMENTS)))
    german = german.casefold()                                      # also turns "ß" into "ss"
    german = german.replace("ä", "ae").replace("ö", "oe").replace("ü", "ue")
    german = unicodedata.normalize("NFD", german)                   # "é" becomes "e" and an accent
    return "".join(char for char in german if not unicodedata.combining(char))


def read_file(data):
    """The normalized (German, English) pairs of "tatoeba" or a text file, one for each line."""
    try:
        if data == "tatoeba":
            path = download(TATOEBA_URL, os.path.join(DATA_FOLDER, "tatoeba"), TATOEBA_SHA256)
            with zipfile.ZipFile(path) as archive:
                text = archive.read("deu.txt").decode("utf-8-sig")
        else:
            with open(data, encoding="utf-8-sig") as file:
                text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"cannot read {data}, use --data with another file: {error}")
    pairs = []
    for n, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        columns = [normalize(column) for column in line.split("\t")]
        if len(columns) < 2 or not columns[0] or not columns[1]:
            sys.exit(f"{data}, line {n}: expected English, a tab and German, found {line[:40]!r}")
        english, german = columns[:2]
        pairs.append((german, english))
    return pairs


def _key(text):
    """A text without case and punctuation."""
    return " ".join(re.findall(r"\w+", fold(text)))


def split_pairs(pairs, part):
    """The pairs in one part of a corpus. "val" and "test" are held out: new to the model.

    "Komm her!" and "Komm hierher." are both "Come here.", so the translation of a held-out sentence
    may occur in training. Therefore a held-out pair counts only if neither its German nor its
    English sentence occurs there, compared without case and punctuation. Of several translations of
    a German sentence, the first one counts.
    """
    train = [(german, english) for german, english in pairs if part_of(german) == "train"]
    if part == "train":
        return train
    seen = set()
    for german, english in train:
        seen.add(_key(german))
        seen.add(_key(english))
    held_out = {}
    for german, english in pairs:
        new = _key(german) not in seen and _key(english) not in seen
        if part_of(german) == part and new and german not in held_out:
            held_out[german] = english
    return list(held_out.items())


def load_pairs(data, part):
    """The (German, English) pairs of a part ("train", "val" or "test") of a corpus or text file."""
    if data == "toy":
        pairs = [(german, english) for german, english, _ in toy_lines(part)]
    else:
        pairs = split_pairs(read_file(data), part)
    if not pairs:
        sys.exit(f"{data} has too few lines: its {part} part is empty")
    return pairs


# --------------------------------------------------------------------------------------------------
# Tokens: byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909)
#
# With one token for each word, a model cannot read or write new words. With one for each letter,
# sequences are long. Byte-pair encoding is in between: frequent words are one token, rare words are
# several. It starts with the 256 bytes, because every text is a sequence of bytes (UTF-8). Then the
# most frequent pair of neighboring tokens becomes a new token, again and again:
#
#     h u n d     h u n d e     h u n g e r     h a n d     b u n d
#     h u nd      h u nd e      h u n g e r     h a nd      b u nd     1. n + d    (4 times)
#     hu nd       hu nd e       hu n g e r      h a nd      b u nd     2. h + u    (3 times)
#     hund        hund e        hu n g e r      h a nd      b u nd     3. hu + nd  (2 times)
#
# (In a tie, such as n + d and u + n, the pair with the smaller token numbers is merged.)
#
# Both languages share their tokens, so the model can copy a name that it has never seen, if the
# name looks the same in both. So German is folded (see `fold`), and in English a capitalized word
# is written in lower case after "↑", a token of its own (Berard et al. 2019,
# https://arxiv.org/abs/1907.06488, call it inline casing). "Jürgen" is copied as "Juergen", and
# `restore_accents` puts the "ü" back.
#
#     Ich heiße Anna.      " ich heisse anna."
#     My name is Anna.     "↑ my name is↑ anna."
#
# Every sentence starts with a space, so its first word gets the same tokens as elsewhere. Every
# digit is a token, so that numbers can be copied digit by digit.

# "↑"; or letters, one digit, or other marks, with the space before them; or white space. These are
# the words that are cut into tokens: merges never cross their borders.
WORD = re.compile(r"↑| ?[^\W\d]+| ?\d| ?[^\w\s↑]+|\s+")
FIRST_BYTE = EOS + 1                        # tokens: PAD, BOS, EOS, 256 bytes, then the merges


def _bytes_of(text):
    """The bytes of a text as tokens. A character that UTF-8 cannot encode becomes "?"."""
    return [FIRST_BYTE + byte for byte in text.encode("utf-8", errors="replace")]


def merge(tokens, pair, token):
    """Replace every occurrence of a pair of tokens by one token."""
    merged = []
    for t in tokens:
        if merged and (merged[-1], t) == pair:
            merged[-1] = token
        else:
            merged.append(t)
    return merged


def learn_merges(texts, n_merges):
    """The first `n_merges` pairs to merge, in order. Stops early if no pair occurs twice."""
    # A word is split in the same way everywhere, so keep it once, with its frequency.
    frequency_of = collections.Counter()
    for text in texts:
        frequency_of.update(WORD.findall(text))
    words = [_bytes_of(word) for word in frequency_of]
    frequencies = list(frequency_of.values())

    # Count every pair, and remember in which words it occurs.
    counts = collections.Counter()
    words_with = collections.defaultdict(set)
    for i, tokens in enumerate(words):
        for pair in zip(tokens, tokens[1:]):
            counts[pair] += frequencies[i]
            words_with[pair].add(i)

    merges = []
    while len(merges) < n_merges:
        most = max(counts.values(), default=0)
        if most < 2:
            break
        pair = min(pair for pair, count in counts.items() if count == most)  # a tie: the smallest
        token = FIRST_BYTE + 256 + len(merges)
        merges.append(pair)
        # Only the words that contain the pair change, so only their pairs are counted again.
        # Counting all pairs again after every merge would take half an hour.
        for i in words_with.pop(pair):
            for p in zip(words[i], words[i][1:]):
                counts[p] -= frequencies[i]
            words[i] = merge(words[i], pair, token)
            for p in zip(words[i], words[i][1:]):
                counts[p] += frequencies[i]
                words_with[p].add(i)
    return merges


class Tokenizer:
    """Text to tokens and back. `merges` is what `learn_merges` returns."""

    def __init__(self, merges):
        self.token_of = {}                              # (left, right) -> the merged token
        self.pieces = [b""] * FIRST_BYTE                # the bytes of every token
        self.pieces += [bytes([byte]) for byte in range(256)]
        for left, right in merges:
            self.token_of[left, right] = len(self.pieces)
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self.known = {}                                 # word -> its tokens

    def encode(self, text):
        """The tokens of a text."""
        tokens = []
        for word in WORD.findall(text):
            if word not in self.known:
                self.known[word] = self.encode_word(word)
            tokens += self.known[word]
        return tokens

    def encode_word(self, word):
        """The tokens of a word: its bytes, merged in the order in which the merges were learned.

        In another order the word could get different tokens than it had during learning.
        """
        tokens = _bytes_of(word)
        while True:
            pairs = [pair for pair in zip(tokens, tokens[1:]) if pair in self.token_of]
            if not pairs:
                return tokens
            first = min(pairs, key=self.token_of.get)   # the earliest merge has the smallest token
            tokens = merge(tokens, first, self.token_of[first])

    def decode(self, tokens):
        """The text of a list of tokens. Invalid UTF-8, which a model can write, becomes U+FFFD."""
        data = b"".join(self.pieces[token] for token in tokens)
        return data.decode("utf-8", errors="replace")


def mark_capitals(english):
    """Write "My name is Anna." as "↑ my name is↑ anna.". TV and McDonald stay as they are."""
    # a capital and lowercase letters, with no letter before or after
    capitalized_word = r" ?(?<![A-Za-z])[A-Z][a-z]*(?![A-Za-z])"
    english = " " + english.replace("↑", "")
    return re.sub(capitalized_word, lambda match: "↑" + match[0].lower(), english)


def restore_capitals(text):
    """Undo `mark_capitals`."""
    text = re.sub("↑( ?)(.)", lambda match: match[1] + match[2].upper(), text)
    return text.replace("↑", "").strip()


def restore_accents(english, german):
    """Give names the umlauts and accents that the German text has: "Juergen" becomes "Jürgen"."""
    for word in re.findall(r"\w+", normalize(german)):
        folded = fold(word)
        if folded != word.lower():
            english = re.sub(rf"\b{folded.capitalize()}\b", word.capitalize(), english)
    return english


def encode_source(tokenizer, german):
    """What the encoder reads: the tokens of the folded German text, then EOS."""
    return tokenizer.encode(" " + fold(german)) + [EOS]


def encode_pairs(tokenizer, pairs):
    """(German, English) pairs -> pairs of lists of tokens (src, tgt), without those too long."""
    examples = []
    for german, english in pairs:
        src = encode_source(tokenizer, german)
        tgt = [BOS] + tokenizer.encode(mark_capitals(english)) + [EOS]
        if len(src) <= MAX_LEN and len(tgt) <= MAX_LEN + 1:     # the last EOS is never an input
            examples.append((src, tgt))
    if not examples:
        sys.exit(f"all pairs have {MAX_LEN} tokens or more")
    return examples


# --------------------------------------------------------------------------------------------------
# Training sentences that look like what people type (the functions can be skipped)
#
# Nearly a quarter of the everyday sentences mention Tom, numbers are rare, and nearly every line is
# a single sentence without typing errors. A model trained on them alone translates other names into
# something else, loses digits, and stumbles over a missing letter. So pairs of single words are
# added, and the training sentences are changed at random in every epoch:
#
# single words      Words that mostly occur together, such as "Hund" and "dog", become pairs,
#                   because a model that has seen only sentences turns most words into sentences.
# names, numbers    A name or number that occurs in both sentences is often replaced with an
#                   invented one. There are too many of these to memorize, so the model has to copy.
# joined sentences  A sixth of the sentences are joined in twos and threes (Kondo et al. 2021,
#                   https://arxiv.org/abs/2104.08478).
# typing errors     German words lose, double, swap or change a letter (Karpukhin et al. 2019,
#                   https://arxiv.org/abs/1902.01509). A tenth of the lines lose their commas and
#                   final marks, because people leave them out.

NUMBER_WORDS = [  # as numbers are rare, some of these are replaced by digits, too
    ("zwei", "two"), ("drei", "three"), ("vier", "four"), ("fünf", "five"), ("sechs", "six"),
    ("sieben", "seven"), ("acht", "eight"), ("neun", "nine"), ("zehn", "ten"),
]
CONSONANTS = "b d f g h j k l m n p r s t v w y z br kr sch st ch th tr cl".split()
VOWELS = "a e i o u a e i o ie ei au ae oe ue".split()
ENDINGS = ["", "", "", "n", "r", "l", "s", "t", "ck", "nn"]


def invent_name(rng):
    """A name of one to four syllables, such as "Breika", and sometimes a second one."""
    name = rng.choice(VOWELS) if rng.random() < 0.3 else ""
    for _ in range(rng.choice([1, 2, 2, 3])):
        name += rng.choice(CONSONANTS) + rng.choice(VOWELS)
    name = (name + rng.choice(ENDINGS)).capitalize()
    if rng.random() < 0.2:
        name += rng.choice(" -") + invent_name(rng)
    return name


def invent_number(rng):
    """A number of one to six digits."""
    n_digits = rng.randint(1, 6)
    return str(rng.randrange(10 ** n_digits))


def invent_names_and_numbers(german, english, rng):
    """Replace some names and numbers that occur in both sentences with the same invented ones."""
    words = re.findall(r"\b[A-Z][a-z]{2,}|\d+", english)
    pairs = [(word, word) for word in dict.fromkeys(words)]     # each word once
    pairs += NUMBER_WORDS
    for german_word, english_word in pairs:
        german_pattern = rf"\b{german_word}(?=s?\b)"            # also the Tom of "Toms"
        english_pattern = rf"\b{english_word}(?=s?\b)"
        in_both = re.search(german_pattern, german) and re.search(english_pattern, english)
        is_name = english_word[0].isupper()
        if in_both and rng.random() < (0.5 if is_name else 0.7):
            new = invent_name(rng) if is_name else invent_number(rng)
            german = re.sub(german_pattern, new, german)
            english = re.sub(english_pattern, new, english)
    return german, english


def join_some(pairs, rng):
    """Join a sixth of the pairs in twos and threes. Returns all pairs in random order."""
    pairs = rng.sample(pairs, len(pairs))
    joined = []
    start = 0
    while start < len(pairs) // 6:
        end = start + rng.choice([2, 2, 3])
        german = " ".join(german for german, _ in pairs[start:end])
        english = " ".join(english for _, english in pairs[start:end])
        joined.append((german, english))
        start = end
    return joined + pairs[start:]


def mistype(word, rng):
    """A word with one letter, but not the first, lost, doubled, swapped or changed."""
    i = rng.randrange(1, len(word))
    before = word[:i]
    letter = word[i]
    after = word[i + 1:]
    return rng.choice([
        before + after,
        before + letter + letter + after,
        before + after[:1] + letter + after[1:],
        before + rng.choice("abcdefghijklmnopqrstuvwxyz") + after,
    ])


def word_pairs(pairs):
    """Pairs of single words, found by counting in how many (German, English) pairs they occur.

    If "hund" occurs in n pairs, "dog" in m, and both together in k, then 2 * k / (n + m) is 1 if
    they always occur together and 0 if never (the Dice coefficient).
    """
    german_counts = collections.Counter()
    english_counts = collections.Counter()
    together = collections.Counter()
    for german, english in pairs:
        german_words = set(re.findall(r"[^\W\d]+", fold(german)))
        # skip the first English word, which is capitalized anyway
        english_words = set(re.findall(r"[A-Za-z']+", english)[1:])
        german_counts.update(german_words)
        english_counts.update(english_words)
        together.update(itertools.product(german_words, english_words))
    # Keep pairs that occur too often to be chance, except names, which need no translation.
    found = []
    for (german, english), count in together.items():
        total = german_counts[german] + english_counts[english]
        if count >= 5 and 2 * count / total > 0.4 and german != english.lower():
            found.append((german, english))
    return sorted(found)    # the order of a set of strings differs from run to run


def as_people_type(pairs, rng):
    """The (German, English) pairs of one epoch, changed at random as described above."""
    pairs = [invent_names_and_numbers(german, english, rng) for german, english in pairs]
    changed = []
    for german, english in join_some(pairs, rng):
        words = german.split()
        for i, word in enumerate(words):
            # not in a name or a number, which the model has to copy
            can_change = len(word) > 3 and word not in english and not re.search(r"\d", word)
            if can_change and rng.random() < 0.03:
                words[i] = mistype(word, rng)
        german = " ".join(words)
        if rng.random() < 0.1:
            german = re.sub(r"[.,!?]+(?= |$)", "", german)
        changed.append((german, english))
    return changed


# --------------------------------------------------------------------------------------------------
# Training: batches, loss, learning rate (the loop itself is at the end of the file)
def make_batches(examples, batch_tokens, rng):
    """Lists of examples, about `batch_tokens` tokens each, in random order.

    All sentences of a batch are padded to the longest one. So we sort them by length before we
    cut them into batches, and hardly any padding is needed.
    """
    # Adding 0 or 1 to the lengths at random gives every epoch different batches.
    order = []
    for i, (src, tgt) in enumerate(examples):
        noisy_length = len(tgt) + int(2 * rng.random())
        order.append((noisy_length, len(src), i))
    batches = []
    batch = []
    longest = 0
    for _, _, i in sorted(order):
        src, tgt = examples[i]
        length = len(src) + len(tgt)
        longest = max(longest, length)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch = []
            longest = length
        batch.append(examples[i])
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def training_batches(tokenizer, pairs, data, batch_tokens, seed):
    """Endless batches: lists of examples. An epoch depends only on the seed and its number.

    So a resumed run, which skips the batches that it has had, goes on as if never interrupted.
    """
    for epoch in itertools.count():
        rng = random.Random(seed + epoch)
        epoch_pairs = pairs
        if data != "toy":
            epoch_pairs = as_people_type(pairs, rng)
        tokenizer.known.clear()     # do not keep invented words
        examples = encode_pairs(tokenizer, epoch_pairs)
        yield from make_batches(examples, batch_tokens, rng)


def pad(rows, device):
    """Lists of tokens -> a tensor (B, T), filled with PAD."""
    longest = max(len(row) for row in rows)
    padded = [row + [PAD] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, device=device)


def batch_loss(model, examples, device, label_smoothing=0.0):
    """Cross-entropy of the next token, summed over all targets that are not padding."""
    src = pad([src for src, _ in examples], device)     # (B, S)
    tgt = pad([tgt for _, tgt in examples], device)     # (B, T + 1): BOS, the sentence, EOS
    logits, _ = model(src, tgt[:, :-1])                 # (B, T, vocab_size)
    targets = tgt[:, 1:]                                # (B, T): the token after each input token
    # A probability of 1 would need an infinite logit. With label smoothing of 0.1 (section 5.4) the
    # right token's target is 90%, and 10% are spread over all tokens. So the best logits are
    # finite, and the model does not become overconfident, which improved BLEU in the paper. The
    # lowest possible loss is then not 0, but the entropy of these targets, 1.23 for tatoeba's 8,259
    # tokens.
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD,
                           reduction="sum", label_smoothing=label_smoothing)


@torch.no_grad()
def validation_loss(model, examples, device):
    """Mean cross-entropy of all targets, without label smoothing."""
    examples = sorted(examples, key=lambda example: len(example[1]))  # little padding
    total = 0.0
    for start in range(0, len(examples), 64):
        total += batch_loss(model, examples[start:start + 64], device).item()
    n_targets = sum(len(tgt) - 1 for _, tgt in examples)
    return total / n_targets


def learning_rate(step, n_steps, peak):
    """The learning rate of a step: a linear warm-up to `peak`, then a cosine down to zero.

    Adam divides the mean of recent gradients by the root of the mean of their squares. At the start
    both cover few batches, so noise hardly cancels: the steps are long and mostly random. Large
    post-norm Transformers do not train without a warm-up, also because the gradients of their last
    layers are large at first (https://arxiv.org/abs/2002.04745). Ours are small and also learned
    without one (the toy language, and tatoeba for the first 1,000 steps). At the end, small steps
    let the weights settle.
    """
    warmup = max(1, min(n_steps // 10, 1000))   # in steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup))) / 2


# --------------------------------------------------------------------------------------------------
# Decoding: greedy, and beam search
@torch.no_grad()
def greedy(model, src):
    """Translate src (B, S) by taking the most probable token at every step. Returns (B, T).

    A translation ends with EOS or has max_len - 1 tokens, and is padded with PAD.
    """
    memory, src_mask = model.encode(src)
    cache = {}
    tokens = torch.full((len(src), 1), BOS, device=src.device)              # (B, 1)
    ended = torch.zeros(len(src), dtype=torch.bool, device=src.device)
    while tokens.size(1) < model.max_len and not ended.all():
        logits, _ = model.decode(tokens[:, -1:], memory, src_mask, cache)   # (B, 1, vocab_size)
        logits[..., PAD] = -math.inf                # never write padding inside a sentence
        next_token = logits[:, -1].argmax(dim=-1)   # (B,)
        next_token[ended] = PAD
        tokens = torch.cat([tokens, next_token[:, None]], dim=1)
        ended = ended | (next_token == EOS)
    return tokens[:, 1:]


# Greedy decoding cannot take back a token, even if another first token would lead to a better
# sentence. So beam search keeps the `beam` best hypotheses. A hypothesis is a partial translation,
# and its score is the sum of the log probabilities of its tokens. Every step extends each
# hypothesis by every token and keeps the best results. (On the test part of tatoeba, greedy
# decoding, --beam 1, gets 50.31 BLEU, and beam search with 5 hypotheses 51.48.) In this example
# with beam = 2, one result of each hypothesis is kept, but both could come from the same one:
#
#   step 1    I (-0.4)               We (-1.3)              ...     the 2 best first tokens
#   step 2    I sleep (-0.9)         I am (-1.5)
#             We sleep (-1.4)        ...                            keep -0.9 and -1.4
#   step 3    I sleep <eos> (-1.7)   ...
#             We sleep well (-1.8)   We sleep <eos> (-2.6)          keep -1.7 and -1.8
#   step 4    I sleep <eos> (-1.7)   We sleep well <eos> (-2.0)     both have ended
#
# Every token lowers the score, which favors short translations. So every step ranks all hypotheses,
# including those that have ended, by score / length: -1.7 / 3 = -0.57 and -2.0 / 4 = -0.50, and "We
# sleep well" wins. (Greedy decoding loses it in step 1 and returns "I sleep".) A longer hypothesis
# can still win, so the search goes on until all have ended.


@torch.no_grad()
def beam_search(model, src, beam):
    """Translate src (B, S): the hypothesis with the highest score / length.

    Returns (B, T) as `greedy` does. The hypotheses of a sentence are neighboring rows.
    """
    B = len(src)
    memory, src_mask = model.encode(src)
    memory = memory.repeat_interleave(beam, dim=0)              # (B * beam, S, d_model)
    src_mask = src_mask.repeat_interleave(beam, dim=0)
    cache = {}
    tokens = torch.full((B * beam, 1), BOS, device=src.device)  # grows to (B * beam, 1 + T)
    scores = torch.full((B, beam), -math.inf, device=src.device)
    scores[:, 0] = 0.0      # only the first hypothesis counts at the start: the others are copies
    lengths = torch.zeros(B, beam, device=src.device)
    ended = torch.zeros(B, beam, dtype=torch.bool, device=src.device)
    first_row = beam * torch.arange(B, device=src.device).unsqueeze(1)      # (B, 1)
    while tokens.size(1) < model.max_len and not ended.all():
        logits, _ = model.decode(tokens[:, -1:], memory, src_mask, cache)
        log_probs = logits.log_softmax(dim=-1).view(B, beam, -1)            # (B, beam, vocab_size)
        vocab_size = log_probs.size(-1)
        log_probs[..., PAD] = -math.inf
        # A hypothesis that has ended stays as it is: its only extension is PAD, at no cost.
        log_probs[ended] = -math.inf
        log_probs[..., PAD][ended] = 0.0
        # Rank all extensions of a sentence, and keep the best.
        lengths = lengths + ~ended              # one token more, unless it has ended
        extended = scores.unsqueeze(-1) + log_probs
        ranking = extended / lengths.unsqueeze(-1)
        _, best = ranking.flatten(1).topk(beam)                             # (B, beam), best first
        parent = best // vocab_size                 # which hypothesis is extended
        token = best % vocab_size                   # by which token
        scores = extended.flatten(1).gather(1, best)
        lengths = lengths.gather(1, parent)
        ended = ended.gather(1, parent) | (token == EOS)
        # Put the tokens, keys and values in the order of the new hypotheses.
        rows = (first_row + parent).flatten()                               # (B * beam,)
        tokens = torch.cat([tokens[rows], token.view(-1, 1)], dim=1)
        for module, (key, value) in cache.items():
            cache[module] = (key[rows], value[rows])
    return tokens.view(B, beam, -1)[:, 0, 1:]       # the best hypothesis, without BOS


def translate(model, tokenizer, sentences, beam):
    """Translate a list of strings, in batches of sentences of similar length.

    Blank strings become empty. So do strings that are too long, with a message on standard error.
    """
    device = model.token_embedding.weight.device
    sources = [encode_source(tokenizer, sentence) for sentence in sentences]
    order = []
    for i, sentence in enumerate(sentences):
        n_tokens = len(sources[i]) - 1                  # without EOS
        if n_tokens >= model.max_len:
            print(f"not translated, because a text can have at most {model.max_len - 1} tokens and "
                  f"this one has {n_tokens}: {sentence.strip()[:40]}...", file=sys.stderr)
        elif fold(sentence):
            order.append(i)
    order.sort(key=lambda i: len(sources[i]))
    translations = [""] * len(sentences)
    for start in range(0, len(order), 64):
        rows = order[start:start + 64]
        src = pad([sources[i] for i in rows], device)
        if beam == 1:
            outputs = greedy(model, src)
        else:
            outputs = beam_search(model, src, beam)
        for i, tokens in zip(rows, outputs.tolist()):
            text = tokenizer.decode(tokens)             # EOS and PAD have no bytes
            translations[i] = restore_accents(restore_capitals(text), sentences[i])
    return translations


# --------------------------------------------------------------------------------------------------
# BLEU (Papineni et al. 2002, https://aclanthology.org/P02-1040): how close to the references?
#
# An n-gram is a sequence of n words. For n = 1 to 4, the precision is the fraction of the
# translations' n-grams that occur in the reference. BLEU is the geometric mean of the four, times
# 100. Translations shorter than the references get a penalty, because leaving out every doubtful
# word would make the precisions high. Even human translators score far below 100, because a
# sentence has many good translations but only one reference.
#
#     reference      the old king sees the dog today
#     translation    the old king sees the cat
#
# The precisions are 5/6, 4/5, 3/4 and 2/3, with a geometric mean of 0.76. Six words instead of
# seven cost a factor of exp(1 - 7/6) = 0.85, so BLEU is 64.3.
def bleu_words(text):
    """Split a text into words and punctuation marks as mteval-v13a, the standard script, does."""
    text = text.replace("<skipped>", "").replace("&quot;", '"')
    text = text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    text = re.sub(r"([!-&(-+/:-@[-`{-~])", r" \1 ", f" {text} ")    # all punctuation but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)               # . and , after a non-digit
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)               # . and , before a non-digit
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)                   # - after a digit
    return text.split()


def count_ngrams(words, n):
    """How often every sequence of n words occurs."""
    ngrams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return collections.Counter(ngrams)


def bleu(translations, references):
    """BLEU from 0 to 100, as sacreBLEU computes it by default, with one reference each."""
    ours = [bleu_words(text) for text in translations]
    theirs = [bleu_words(text) for text in references]
    log_precision = 0.0
    n_zeros = 0
    for n in range(1, 5):
        matches = 0
        total = 0
        for words, reference_words in zip(ours, theirs):
            counts = count_ngrams(words, n)
            # & takes the smaller count, so no n-gram of the reference is used twice.
            common = counts & count_ngrams(reference_words, n)
            matches += common.total()
            total += counts.total()
        if total == 0 or (n == 1 and matches == 0):
            return 0.0
        if matches == 0:                # smoothing: the first zero counts 1/2, the next 1/4, ...
            n_zeros += 1
            matches = 0.5 ** n_zeros
        log_precision += math.log(matches / total) / 4
    n_words = sum(len(words) for words in ours)
    n_reference_words = sum(len(words) for words in theirs)
    log_brevity_penalty = min(0.0, 1 - n_reference_words / n_words)
    return 100 * math.exp(log_precision + log_brevity_penalty)


# --------------------------------------------------------------------------------------------------
# Looking inside: which source word does each target word come from?
#
# In the toy language we know the answer, so we can score guesses. A head's guess is the source word
# with the largest attention weight. The gradient's guess, as in saliency.py, is the source word
# where a small change of the embedding changes the log probability of the target word the most. The
# baselines are the word at the same position (diagonal) and a random word (chance). With the
# shipped weights the best of the eight heads is right for 99% of the words, the gradient for 96%,
# the diagonal for 66% and chance for 14%.
#
# Row i of the weights belongs to the step that reads token i and writes token i + 1. In the last
# block the heads mostly attend to the source of the word that is written. This is the last chance
# to read the source, because only a feed-forward network follows before the output layer. Earlier
# blocks are free to look elsewhere, because the last one can still look that word up. (None of this
# is forced: an earlier block could have fetched the word, or the encoder could have moved it.)
def right_words(alignment, n_source_words):
    """(T, S) booleans: True where source word s is right for target word t."""
    right = torch.zeros(len(alignment), n_source_words, dtype=torch.bool)
    for t, source_words in enumerate(alignment):
        right[t, source_words] = True
    return right


def encode_line(model, tokenizer, line):
    """A line of the toy language: src (1, S + 1), tgt (1, T + 3) and the right words (T, S).

    S does not count EOS. T counts neither BOS nor "↑" nor the full stop, which is too easy to find.
    """
    german, english, alignment = line
    src = encode_source(tokenizer, german)
    tgt = [BOS] + tokenizer.encode(mark_capitals(english))
    n_source_words = len(german.split()) + 1
    if len(src) != n_source_words + 1 or len(tgt) != len(alignment) + 2:
        sys.exit("the alignment needs one token for each word: train with more --merges")
    device = model.token_embedding.weight.device
    right = right_words(alignment[:-1], n_source_words)
    return pad([src], device), pad([tgt], device), right


def alignment_accuracy(model, tokenizer, lines):
    """How often each head (n_dec_layers, H), chance and the diagonal are right."""
    hits = 0
    chance = 0
    diagonal = 0
    n_words = 0
    for line in lines:
        src, tgt, right = encode_line(model, tokenizer, line)
        T, S = right.shape
        memory, src_mask = model.encode(src)
        _, weights = model.decode(tgt, memory, src_mask)    # the reference is the decoder's input
        weights = torch.cat(weights)                        # (n_dec_layers, H, T + 3, S + 1)
        attended = weights[..., :S].argmax(dim=-1).cpu()    # without EOS
        # row 0 reads BOS and writes "↑", row 1 reads "↑" and writes the first word
        attended = attended[..., 1:T + 1]                   # (n_dec_layers, H, T)
        hits += right[torch.arange(T), attended].sum(dim=-1)
        chance += right.float().mean(dim=1).sum()
        diagonal += right.diagonal().sum()
        n_words += T
    return hits / n_words, chance / n_words, diagonal / n_words


def gradient_accuracy(model, tokenizer, lines):
    """How often the source word whose gradient has the largest norm is right."""
    hits = 0
    n_words = 0
    for line in lines:
        src, tgt, right = encode_line(model, tokenizer, line)
        T, S = right.shape
        # The weights are frozen (see `load_model`), so the graph starts with the embeddings.
        embeddings = model.embed(src).requires_grad_()      # (1, S + 1, d_model)
        memory = embeddings
        for block in model.encoder:
            memory = block(memory, mask=None)               # one sentence has no padding
        logits, _ = model.decode(tgt, memory, src_mask=None)
        log_probs = logits[0].log_softmax(dim=-1)           # (T + 3, vocab_size)
        for t in range(T):
            log_prob = log_probs[t + 1, tgt[0, t + 2]]      # row t + 1 writes word t
            gradient = torch.autograd.grad(log_prob, embeddings, retain_graph=True)[0]
            guess = gradient[0, :S].norm(dim=-1).argmax()
            hits += right[t, guess]
        n_words += T
    return hits / n_words


def plot_cross_attention(model, tokenizer, sentence, beam, path, reference=None, alignment=None):
    """Heatmaps of the last decoder block's heads. A row is labeled with the token that it writes.

    If the translation is equal to the reference, dots mark the right cells.
    """
    device = model.token_embedding.weight.device
    src = pad([encode_source(tokenizer, sentence)], device)             # (1, S)
    tokens = beam_search(model, src, beam)
    tokens = tokens[:, tokens[0] != PAD]                                # (1, T)
    decoder_input = F.pad(tokens, (1, 0), value=BOS)[:, :-1]            # BOS first, no last token
    _, weights = model(src, decoder_input)                              # (1, H, T, S)
    source_labels = [_label(tokenizer, token) for token in src[0].tolist()]
    written_labels = [_label(tokenizer, token) for token in tokens[0].tolist()]
    marks = None
    translation = restore_capitals(tokenizer.decode(tokens[0].tolist()))
    if alignment and translation == reference:
        right = right_words(alignment, src.size(1) - 1)
        right = F.pad(right, (0, 1, 1, 1))                  # "↑" and EOS have no right cell
        if right.shape == weights.shape[-2:]:               # one token for each word
            marks = right
    make_folder(os.path.dirname(path))
    plot_attention(weights[0], source_labels, written_labels, path,
                   x_name="source token", y_name="token written", marks=marks)


def _label(tokenizer, token):
    """A token as the label of a heatmap, with "_" for a space."""
    return tokenizer.decode([token]).replace(" ", "_") or "<eos>"


# --------------------------------------------------------------------------------------------------
# Using a trained model: --test, --line and --text (can be skipped)
def path_of(folder, data, ending):
    """A path such as out/translate_toy.pt."""
    return os.path.join(folder, f"translate_{os.path.basename(data)}{ending}")


def save(content, path):
    """Save to a file in one step: a run that is killed here leaves the old file as it was."""
    temporary_path = f"{path}.{os.getpid()}.tmp"    # another run has another process id
    torch.save(content, temporary_path)
    os.replace(temporary_path, path)


def load_model(path, device):
    """The trained model in a file, its tokenizer, and the --data that it was trained with."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = TransformerModel(*saved["sizes"], dropout=0.0)
        model.load_state_dict(saved["weights"])
        tokenizer = Tokenizer(saved["merges"])
        data = saved["data"]
    except Exception as error:
        sys.exit(f"cannot load {path} ({type(error).__name__}): --load needs a file "
                 "saved by a training run")
    print(f"weights from {path}", file=sys.stderr)
    model.to(device).eval().requires_grad_(False)
    return model, tokenizer, data


def score(model, tokenizer, pairs, beam):
    """The fraction of translations that are equal to their reference, and BLEU."""
    translations = translate(model, tokenizer, [german for german, _ in pairs], beam)
    references = [english for _, english in pairs]
    n_exact = sum(ours == theirs for ours, theirs in zip(translations, references))
    return n_exact / len(pairs), bleu(translations, references)


def test(model, tokenizer, data, args):
    """Score the test part, and the alignment of the toy language. Returns the results."""
    pairs = load_pairs(data, "test")
    exact, bleu_score = score(model, tokenizer, pairs, args.beam)
    n_params = sum(p.numel() for p in model.parameters())
    result = f"exact={exact:.4f} bleu={bleu_score:.2f}"
    if data == "toy":
        alignment, gradient = test_alignment(model, tokenizer, args.out_dir)
        result += f" alignment={alignment:.4f} gradient={gradient:.4f}"
    return f"{result} params={n_params}"


def test_alignment(model, tokenizer, out_dir):
    """Print and plot how often every head and the gradient find a right source word.

    Returns the accuracies of the best of all heads and of the gradient.
    """
    lines = toy_lines("test")
    accuracy, chance, diagonal = alignment_accuracy(model, tokenizer, lines)
    gradient = gradient_accuracy(model, tokenizer, lines[:300])     # slower: a part is enough
    n_blocks, n_heads = accuracy.shape
    heads = []
    for block in range(1, n_blocks + 1):
        heads += [f"{block}.{head}" for head in range(1, n_heads + 1)]
    values = accuracy.flatten().tolist()
    print("fraction of the target words whose most attended source word is right")
    print("decoder block.head", *(f"{head:>5}" for head in heads))
    print("                  ", *(f"{value:.3f}" for value in values))
    print(f"gradient {gradient:.3f}, diagonal {diagonal:.3f}, chance {chance:.3f}")

    make_folder(out_dir)
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(heads, values, "o", label="attention head")
    axis.axhline(gradient, color="tab:red", label="gradient")
    axis.axhline(diagonal, color="gray", linestyle="--", label="diagonal")
    axis.axhline(chance, color="gray", linestyle=":", label="chance")
    axis.set(xlabel="decoder block.head", ylabel="fraction of words right", ylim=(-0.05, 1.05))
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    path = path_of(out_dir, "alignment", ".png")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")
    return max(values), gradient.item()


def translate_line(model, tokenizer, data, args):
    """Translate line --line of the data, and print it next to the reference."""
    if data == "toy":
        german, english, alignment = toy_pair(args.line)
        held_out = part_of(german) != "train"
    else:
        pairs = read_file(data)
        if args.line > len(pairs):
            sys.exit(f"--line {args.line}: {data} has lines 1 to {len(pairs)}")
        german, english = pairs[args.line - 1]
        alignment = None
        part = part_of(german)
        held_out = part != "train" and (german, english) in split_pairs(pairs, part)
    translation = translate(model, tokenizer, [german], args.beam)[0]
    print(f"source:      {german}")
    print(f"reference:   {english}")
    print(f"translation: {translation}")
    print(f"held out:    {'yes' if held_out else 'no'}")
    if args.plot and translation:
        path = path_of(args.out_dir, data, ".png")
        plot_cross_attention(model, tokenizer, german, args.beam, path, english, alignment)


def translate_texts(model, tokenizer, data, args):
    """Translate the texts of --text, or with --text - the lines of standard input.

    Returns True if every text was translated, False if some were too long.
    """
    texts = args.text
    if texts == ["-"]:
        if sys.stdin.isatty():
            print("type German, one text per line; Ctrl-D to end", file=sys.stderr)
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
        texts = sys.stdin
    all_translated = True
    for n, text in enumerate(texts, start=1):
        translation = translate(model, tokenizer, [text], args.beam)[0]
        print(translation)
        if fold(text) and not translation:
            all_translated = False
        if args.plot and translation:
            path = path_of(args.out_dir, data, f"_{n}.png")
            plot_cross_attention(model, tokenizer, text, args.beam, path)
    return all_translated


if __name__ == "__main__":
    start = time.perf_counter()

    # options (can be skipped)
    OPTIONS = [  # of training: name, type, help, default for toy, default for all other data
        ("steps", number(int, 1), "training steps", 500, 21_000),
        ("batch_tokens", number(int, 1), "tokens in a batch, both languages", 4000, 2000),
        ("lr", number(float, 0), "peak learning rate", 0.003, 0.0015),
        ("dropout", number(float, 0, 1), "dropout probability", 0.1, 0.1),
        ("merges", number(int, 1), "byte-pair merges", 600, 8000),
        ("d_model", number(int, 1), "width of the model", 64, 192),
        ("n_heads", number(int, 1), "attention heads", 4, 4),
        ("n_enc_layers", number(int, 1), "encoder blocks", 2, 3),
        ("n_dec_layers", number(int, 1), "decoder blocks", 2, 3),
    ]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data",
                        help="toy, tatoeba, or a text file with English, a tab and German on every "
                             "line (default: toy, with --text tatoeba)")
    parser.add_argument("--test", action="store_true",
                        help="do not train: score the test part (unless --line or --text is given)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--line", type=number(int, 1),
                      help="do not train: translate this line of the data, counting from 1")
    mode.add_argument("--text", nargs="+",
                      help="do not train: translate these texts; - reads lines from stdin")
    mode.add_argument("--resume", action="store_true",
                      help="continue an interrupted training run, with its options")
    parser.add_argument("--load", metavar="FILE",
                        help="weights for --test, --line and --text (default: those in assets/)")
    parser.add_argument("--plot", action="store_true",
                        help="with --line or --text: plot the cross-attention")
    parser.add_argument("--beam", type=number(int, 1), default=5,
                        help="hypotheses in beam search; 1 is greedy decoding (default: 5)")
    group = parser.add_argument_group("training", "defaults in brackets: toy, other data")
    for name, kind, text, default_toy, default in OPTIONS:
        group.add_argument(f"--{name}", type=kind, metavar="N",
                           help=f"{text} ({default_toy}, {default})")
    args = parse_args(parser)

    # without training: --test, --line, --text (can be skipped)
    if args.test or args.line or args.text:
        if args.load:
            path = args.load
        else:
            data = args.data or ("tatoeba" if args.text else "toy")
            if data not in ("toy", "tatoeba"):
                sys.exit(f"there are no shipped weights for {data}: use --load")
            path = path_of(os.path.join(os.path.dirname(__file__), "assets"), data, ".pt")
        model, tokenizer, data = load_model(path, args.device)
        data = args.data or data
        if args.text:
            sys.exit(0 if translate_texts(model, tokenizer, data, args) else 1)
        if args.line:
            translate_line(model, tokenizer, data, args)
            sys.exit()
        result = test(model, tokenizer, data, args)
        print(f"result: {result} seconds={time.perf_counter() - start:.1f}")
        sys.exit()
    if args.load or args.plot:
        parser.error("--load and --plot need --test, --line or --text")

    # several processes, started by torchrun (can be skipped): each takes a part of every batch,
    # and DistributedDataParallel averages their gradients
    rank = 0            # the number of this process
    world_size = 1      # the number of processes
    if distributed.is_torchelastic_launched():
        rank = int(os.environ["RANK"])
        world_size = int(os.environ["WORLD_SIZE"])
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if rank > 0:
            sys.stdout = open(os.devnull, "w")      # only process 0 prints

    # files, and --resume (can be skipped): a checkpoint holds the options of an unfinished run
    args.data = args.data or "toy"
    for name, _, _, default_toy, default in OPTIONS:
        if getattr(args, name) is None:
            setattr(args, name, default_toy if args.data == "toy" else default)
    weights_path = path_of(args.out_dir, args.data, ".pt")
    checkpoint_path = weights_path + ".checkpoint"
    checkpoint = None
    if args.resume:
        try:
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
            vars(args).update(checkpoint["options"])
            merges = checkpoint["merges"]
        except Exception as error:
            sys.exit(f"cannot resume from {checkpoint_path} ({type(error).__name__}): --resume "
                     "needs the checkpoint of an interrupted run")
    elif os.path.exists(checkpoint_path):
        sys.exit(f"{checkpoint_path} holds an unfinished run: continue it with --resume, "
                 "or delete the file")
    if args.d_model % args.n_heads != 0:
        parser.error(f"--n_heads {args.n_heads} does not divide --d_model {args.d_model}")
    make_folder(args.out_dir)
    options = {name: getattr(args, name) for name, *_ in OPTIONS}
    options["seed"] = args.seed
    print(", ".join(f"{name} {value}" for name, value in options.items()))

    # data; the tokenizer learns from the training part alone
    train_pairs = load_pairs(args.data, "train")
    val_pairs = load_pairs(args.data, "val")
    checksum = zlib.crc32(repr(train_pairs).encode())
    if checkpoint is None:
        print(f"learning {args.merges:,} merges ...")
        texts = [" " + fold(german) for german, _ in train_pairs]
        texts += [mark_capitals(english) for _, english in train_pairs]
        merges = learn_merges(texts, args.merges)
    elif checkpoint["checksum"] != checksum:
        sys.exit(f"cannot resume from {checkpoint_path}: {args.data} is not the data of that run")
    tokenizer = Tokenizer(merges)
    if args.data != "toy":
        train_pairs += word_pairs(train_pairs)
    val_examples = encode_pairs(tokenizer, val_pairs)

    # model and optimizer; betas and eps are those of section 5.3
    vocab_size = len(tokenizer.pieces)
    sizes = [vocab_size, MAX_LEN, args.d_model, args.n_heads, args.n_enc_layers, args.n_dec_layers]
    model = TransformerModel(*sizes, dropout=args.dropout).to(args.device)
    n_params = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    first_step = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step = checkpoint["step"]
    print(f"{n_params:,} parameters, {len(train_pairs):,} training pairs, "
          f"{len(val_examples):,} validation pairs")

    # training loop (do not skip it: it puts all parts together)
    net = model
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(model)    # shares its weights
    batches = training_batches(tokenizer, train_pairs, args.data, args.batch_tokens, args.seed)
    batches = itertools.islice(batches, first_step, None)   # a resumed run skips the old batches
    loop_start = time.perf_counter()
    last_log = loop_start
    for step in range(first_step, args.steps):
        model.train()
        torch.manual_seed(args.seed + step * world_size + rank)     # same dropout after --resume

        # get a batch
        batch = next(batches)
        if len(batch) < world_size:
            continue                                        # every process needs a sentence
        n_targets = sum(len(tgt) - 1 for _, tgt in batch)   # of all processes
        batch = batch[rank::world_size]

        # forward: the mean loss of all targets. (We need the sum of the gradients of all processes,
        # but DistributedDataParallel averages them. Multiplying by world_size, which is 1 without
        # torchrun, turns the average back into the sum.)
        loss = batch_loss(net, batch, args.device, label_smoothing=0.1) / n_targets * world_size
        if not loss.isfinite():
            sys.exit(f"step {step}: the loss is {loss.item()}, try a smaller --lr")

        # backward and update; clipping limits the norm of the gradient to 1, so that no single
        # batch dominates Adam's averages
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()

        # log and save a checkpoint, about 20 times in all, and whenever a minute has passed
        if rank != 0:
            continue
        if step == 0:
            print(f"step 0/{args.steps}: loss {loss:.4f}, uniform prediction ln {vocab_size} = "
                  f"{math.log(vocab_size):.4f}")
        is_milestone = (step + 1) % max(1, args.steps // 20) == 0
        now = time.perf_counter()
        if is_milestone or now - last_log > 60:
            last_log = now
            line = f"step {step + 1}/{args.steps}: loss {loss:.4f}"
            if is_milestone:
                model.eval()
                val_loss = validation_loss(model, val_examples, args.device)
                line += f", validation loss {val_loss:.4f}"
            seconds_per_step = (now - loop_start) / (step + 1 - first_step)
            minutes_left = (args.steps - step - 1) * seconds_per_step / 60
            print(f"{line}, about {minutes_left:.0f} min left")
            if is_milestone:
                print("   ", *translate(model, tokenizer, [val_pairs[0][0]], args.beam))
            save({"options": options, "checksum": checksum, "merges": merges, "step": step + 1,
                  "model": model.state_dict(), "optimizer": optimizer.state_dict()},
                 checkpoint_path)

    if world_size > 1:
        distributed.destroy_process_group()
    if rank != 0:
        sys.exit()

    # save the weights in half precision: half the size, and all scores are of these weights
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save({"data": args.data, "sizes": sizes, "merges": merges, "weights": weights}, weights_path)
    if os.path.exists(checkpoint_path):
        os.remove(checkpoint_path)
    print(f"saved {weights_path}, try: python translate.py --test --load {weights_path}")

    # evaluation, with the weights as saved
    model, tokenizer, _ = load_model(weights_path, args.device)
    exact, bleu_score = score(model, tokenizer, val_pairs, args.beam)
    seconds = time.perf_counter() - start
    print(f"result: exact={exact:.4f} bleu={bleu_score:.2f} params={n_params} "
          f"seconds={seconds:.1f}")
