"""
Translate German to English with the Transformer of "Attention Is All You Need".

The encoder reads the German sentence. The decoder writes the English one, token by token, and
cross-attention lets each step attend to the German tokens. There are three corpora:

toy       a small German grammar. Training takes half a minute. We know the right source word of
          every target word, so we can measure how well each attention head finds it, and how
          well the gradient does.
tatoeba   169,813 pairs of everyday sentences.
multi30k  29,000 captions of photographs, a common benchmark.

Trained weights for all three are in assets/. Weights that you train yourself are saved in
--out_dir, and the script prefers them.

$ python translate.py --text "Wie geht es dir?"     # any text, with the weights for tatoeba
$ python translate.py --text -                      # every line that you type
$ python translate.py                               # train on the toy language
$ python translate.py --line 7 --plot               # translate line 7, plot the attention
$ python translate.py --test                        # exact matches, BLEU, alignment
$ python translate.py --data tatoeba                # train on everyday sentences
$ python translate.py --data multi30k --test        # BLEU on the captions' test set

Paper: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. Read attention.py and parity.py
first: they explain attention, heads, LayerNorm and residual connections.
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
# softmax turns scores into probabilities. In the shapes there are B sentences, S source tokens, T
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
# are learned instead of sinusoidal, the feed-forward network is 2 instead of 4 times as wide as the
# model, there is word dropout, and the learning rate falls along a cosine.

PAD, BOS, EOS = 0, 1, 2     # padding, start of sentence, end of sentence
MAX_LEN = 100               # number of positions


class MultiHeadAttention(nn.Module):
    """H attention heads side by side (section 3.2.2)."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.w_q = nn.Linear(d_model, d_model)  # makes the queries of all heads
        self.w_k = nn.Linear(d_model, d_model)  # the keys
        self.w_v = nn.Linear(d_model, d_model)  # the values
        self.w_o = nn.Linear(d_model, d_model)  # mixes the outputs of the heads

    def split(self, x):
        """Cut the last dimension into heads: (B, T, d_model) -> (B, H, T, d_k)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x, memory, mask=None, cache=None):
        """Queries from x (B, T, d_model), keys and values from memory (B, S, d_model).

        Self-attention passes x as memory. Returns the output (B, T, d_model) and the attention
        weights (B, H, T, S).

        When we decode token by token, earlier tokens do not attend to the new one, so their keys
        and values stay the same. The source does not change at all. The dict `cache` keeps all keys
        and values, and memory is only what is new (None: nothing):

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
    """Causal self-attention, cross-attention to the source, then the feed-forward network."""

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
        if cache is not None and self.cross_attention in cache:
            memory = None                                       # the source is in the cache
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
        # layer (section 3.4). Attention does not see the order of tokens, so positions are added.
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_len, d_model)
        self.dropout = nn.Dropout(dropout)
        # In training, dropout sets randomly chosen values to 0, so the model learns not to rely on
        # any one of them. Word dropout zeroes whole rows of (T, d_model), the embeddings of tokens,
        # so that the model does not rely on any single word (https://arxiv.org/abs/1905.11901).
        # Half the rate of ordinary dropout worked well on the validation part of multi30k.
        self.token_dropout = nn.Dropout1d(dropout / 2)
        self.encoder = nn.ModuleList(
            EncoderBlock(d_model, n_heads, dropout) for _ in range(n_enc_layers))
        self.decoder = nn.ModuleList(
            DecoderBlock(d_model, n_heads, dropout) for _ in range(n_dec_layers))
        # LayerNorm gives the output layer d_model inputs of standard deviation 1. Weights of
        # standard deviation 1 / sqrt(d_model) make logits of standard deviation 1. The loss at step
        # 0 is above that of a uniform prediction for two reasons. Such random logits add about 1/2,
        # because the mean of e^logit is about e^(1/2) instead of 1. And the input token's own logit
        # is about 6 (toy) or 10 (tatoeba), because residual connections carry its embedding to
        # the output.
        nn.init.normal_(self.token_embedding.weight, std=d_model ** -0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.5)    # tokens have 1, see embed

    def embed(self, tokens, start=0):
        """Tokens (B, T) at the positions start, start + 1, ... -> embeddings (B, T, d_model)."""
        d_model = self.token_embedding.embedding_dim
        positions = torch.arange(start, start + tokens.size(1), device=tokens.device)
        x = self.token_embedding(tokens) * math.sqrt(d_model)   # now with standard deviation 1
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

        The weights are a list, (B, H, T, S) for each block. With a cache, tgt is only what is new,
        and memory is used only the first time.
        """
        start = 0                                               # number of tokens in the cache
        if cache:
            cached_key, _ = cache[self.decoder[0].self_attention]
            start = cached_key.size(2)
        end = start + tgt.size(1)
        # The causal mask. 1 means may attend.
        #     1 0 0 0    Row i predicts token i + 1. It may attend to tokens 0 to i, but not to the
        #     1 1 0 0    one that it predicts. So in training the input can be the whole sentence,
        #     1 1 1 0    and one forward pass trains all positions. With 3 tokens in the cache, tgt
        #     1 1 1 1    is token 3 alone, and only row 3 is needed.
        # Padding comes after all real tokens, so this mask hides it from them. What the rows of
        # padding predict does not matter, because the loss ignores it.
        # Without cross-attention, these blocks are GPT, which has no source and predicts the next
        # token from the text so far.
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
# Data 1: the toy language
#
# English shows by position who does what: the subject comes before the verb. In German, the article
# marks a masculine object ("der" becomes "den", "ein" becomes "einen"), so it may come first:
#
#     Der Mann sieht den Hund.                      The man sees the dog.
#     Den Mann sieht der Hund.                      The dog sees the man.
#     Gestern hat die Ärztin einen Vogel gehört.    Yesterday the doctor heard a bird.
#
# The finite verb (sieht, hat) is the second element, and a participle or infinitive comes last. In
# our grammar other objects never come first, because their articles do not mark them. So every
# German sentence has exactly one translation. This lets us count any other translation as wrong,
# and we know the German words of every English word.

N_TOY_LINES = 209_773       # for --line; `toy_pair` works for every n
N_TOY_TRAINING_LINES = 100_000

NOUNS = {  # German, gender, English
    "person": [
        ("König", "m", "king"), ("Lehrer", "m", "teacher"), ("Mann", "m", "man"),
        ("Bäcker", "m", "baker"), ("Ingenieur", "m", "engineer"), ("Frau", "f", "woman"),
        ("Ärztin", "f", "doctor"), ("Königin", "f", "queen"), ("Künstlerin", "f", "artist"),
        ("Kind", "n", "child"), ("Mädchen", "n", "girl"),
    ],
    "animal": [
        ("Hund", "m", "dog"), ("Vogel", "m", "bird"), ("Fuchs", "m", "fox"),
        ("Esel", "m", "donkey"), ("Katze", "f", "cat"), ("Maus", "f", "mouse"),
        ("Ziege", "f", "goat"), ("Pferd", "n", "horse"), ("Schaf", "n", "sheep"),
    ],
    "thing": [
        ("Lampe", "f", "lamp"), ("Uhr", "f", "clock"), ("Tasche", "f", "bag"),
        ("Gitarre", "f", "guitar"), ("Stuhl", "m", "chair"), ("Koffer", "m", "suitcase"),
        ("Regenschirm", "m", "umbrella"), ("Fahrrad", "n", "bicycle"), ("Radio", "n", "radio"),
        ("Boot", "n", "boat"),
    ],
}
ADJECTIVES = {  # German stem, English
    "person": [("jung", "young"), ("müd", "tired"), ("klug", "clever"), ("hungrig", "hungry"),
               ("freundlich", "friendly")],
    "animal": [("alt", "old"), ("jung", "young"), ("klein", "small"), ("groß", "big"),
               ("hungrig", "hungry")],
    "thing": [("alt", "old"), ("neu", "new"), ("klein", "small"), ("groß", "big"),
              ("rot", "red"), ("schwer", "heavy")],
}
ARTICLES = {  # of each gender: (indefinite, adjective ending), (definite, adjective ending)
    "m": [("ein", "er"), ("der", "e")],
    "f": [("eine", "e"), ("die", "e")],
    "n": [("ein", "es"), ("das", "e")],
    "m object": [("einen", "en"), ("den", "en")],
}
# German: finite form, infinitive, participle. English: base form, third person, past. Then the
# kinds of nouns that can be the subject and the object.
VERBS = [
    ("sieht", "sehen", "gesehen", "see", "sees", "saw",
     ["person", "animal"], ["person", "animal", "thing"]),
    ("hört", "hören", "gehört", "hear", "hears", "heard",
     ["person", "animal"], ["person", "animal"]),
    ("findet", "finden", "gefunden", "find", "finds", "found",
     ["person", "animal"], ["person", "animal", "thing"]),
    ("besucht", "besuchen", "besucht", "visit", "visits", "visited",
     ["person"], ["person"]),
    ("jagt", "jagen", "gejagt", "chase", "chases", "chased",
     ["animal"], ["person", "animal"]),
    ("weckt", "wecken", "geweckt", "wake", "wakes", "woke",
     ["person", "animal"], ["person", "animal"]),
    ("malt", "malen", "gemalt", "paint", "paints", "painted",
     ["person"], ["person", "animal", "thing"]),
    ("fotografiert", "fotografieren", "fotografiert", "photograph", "photographs", "photographed",
     ["person"], ["person", "animal", "thing"]),
    ("trägt", "tragen", "getragen", "carry", "carries", "carried",
     ["person"], ["thing"]),
    ("kauft", "kaufen", "gekauft", "buy", "buys", "bought",
     ["person"], ["animal", "thing"]),
    ("verkauft", "verkaufen", "verkauft", "sell", "sells", "sold",
     ["person"], ["animal", "thing"]),
    ("repariert", "reparieren", "repariert", "repair", "repairs", "repaired",
     ["person"], ["thing"]),
]


def _pick(rng, options):
    """A random element. Unlike rng.choice, the same in every version of Python."""
    return options[int(rng.random() * len(options))]


def _noun_phrase(rng, noun, kind, definite, is_object):
    """An article, perhaps an adjective, and a noun: a list of (German word, English word)."""
    german, gender, english = noun
    if gender == "m" and is_object:
        gender = "m object"
    indefinite_forms, definite_forms = ARTICLES[gender]
    article, ending = definite_forms if definite else indefinite_forms
    words = [(german, english)]
    if rng.random() < 0.4:
        stem, adjective = _pick(rng, ADJECTIVES[kind])
        words.insert(0, (stem + ending, adjective))
    if definite:
        english_article = "the"
    else:
        _, first_word = words[0]
        english_article = "an" if first_word[0] in "aeiou" else "a"
    return [(article, english_article)] + words


def toy_pair(n):
    """Line n of the toy language, from 1 on: the German sentence, the English one, the alignment.

    The alignment lists for every English word and the full stop the indices of its German words.
    """
    rng = random.Random(n)
    verb = _pick(rng, VERBS)
    present, infinitive, participle, base, third_person, past, subject_kinds, object_kinds = verb
    subject_kind = _pick(rng, subject_kinds)
    subject_definite = rng.random() < 0.7
    subject_noun = _pick(rng, NOUNS[subject_kind])
    subject = _noun_phrase(rng, subject_noun, subject_kind, subject_definite, is_object=False)
    object_kind = _pick(rng, object_kinds)
    object_noun = _pick(rng, [noun for noun in NOUNS[object_kind] if noun != subject_noun])
    object_definite = rng.random() < 0.7
    object_ = _noun_phrase(rng, object_noun, object_kind, object_definite, is_object=True)

    # The tense decides the verb forms and which adverbs make sense.
    tense = _pick(rng, ["past", "present", "can"])
    if tense == "past":         # Der Mann hat gestern den Hund gesehen.
        finite = [("hat", past)]
        last = [(participle, "")]               # no word of its own: "hat gesehen" is "saw"
        adverbs = [[("gestern", "yesterday")], []]
    elif tense == "present":    # Der Mann sieht den Hund.
        finite = [(present, third_person)]
        last = []
        adverbs = [[]]
    else:                       # Der Mann kann heute den Hund sehen.
        finite = [("kann", "can")]
        last = [(infinitive, base)]
        adverbs = [[("heute", "today")], [("morgen", "tomorrow")], []]
    adverb = _pick(rng, adverbs)

    # Choose what comes first in German. In English an adverb can come first, too.
    can_be_first = ["subject"]
    if object_noun[1] == "m" and subject_definite:      # "Den Mann sieht ein Hund" sounds odd
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
    """The part of a pair: "val" or "test" with a probability of 1/32 each, otherwise "train".

    A hash of the German sentence decides, so a sentence that occurs twice is in one part only.
    """
    bucket = zlib.crc32(german.encode()) % 32
    if bucket == 0:
        return "test"
    if bucket == 1:
        return "val"
    return "train"


def toy_lines(part, n_lines):
    """The results of `toy_pair` in a part of the first `n_lines` lines, each sentence once."""
    lines = {}
    for n in range(1, n_lines + 1):
        german, english, alignment = toy_pair(n)
        if part_of(german) == part:
            lines[german] = (german, english, alignment)
    return list(lines.values())


# --------------------------------------------------------------------------------------------------
# Data 2: everyday sentences, captions, and text files of your own
#
# tatoeba: English-German pairs from https://tatoeba.org, collected by
# https://www.manythings.org/anki, license CC BY 2.0 (the edition of 2018-05-13).
# multi30k: Elliott et al. 2016, https://arxiv.org/abs/1605.00459.

TATOEBA_URL = ("https://raw.githubusercontent.com/rioyshky/translation/"
               "de48b7027f7318d77010a6e08ed928c10748c23d/deu-eng.zip")
TATOEBA_SHA256 = "b7688f84f99fa33c17397c14d8bd9cef1fdeb2ee0bf50074767023aee8926e28"
MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K_SHA256 = {
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
}


def normalize(text):
    """A text with composed characters (Unicode NFC) and single spaces.

    "ä" can be one character or two (a, then dots): they look the same, but the tokens differ.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def fold(german):
    """German in lower case, with ae, oe, ue and ss for ä, ö, ü and ß.

    People also type "MÄDCHEN" or "maedchen" for "Mädchen". Folded, these are the same tokens.
    """
    german = german.casefold()      # also turns "ß" into "ss"
    return german.replace("ä", "ae").replace("ö", "oe").replace("ü", "ue")


def read_file(data):
    """The normalized (German, English) pairs of "tatoeba" or a text file, one for each line."""
    try:
        if data == "tatoeba":
            path = os.path.join("data", "tatoeba", "deu-eng.zip")
            download(TATOEBA_URL, path, TATOEBA_SHA256)
            with zipfile.ZipFile(path) as archive:
                text = archive.read("deu.txt").decode("utf-8-sig")
        else:
            with open(data, encoding="utf-8-sig") as file:
                text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"cannot read {data}: {error}")
    pairs = []
    for n, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        columns = [normalize(column) for column in line.split("\t")]
        if len(columns) < 2 or not columns[0] or not columns[1]:
            sys.exit(f"{data}, line {n}: expected English, a tab and German, found {line[:40]!r}")
        english, german = columns[:2]
        pairs.append((german, english))
    return pairs


def read_multi30k(part):
    """The normalized (German, English) pairs of a part of Multi30k."""
    if part == "test":
        part = "test_2016_flickr"
    sentences = {}
    for language in ("de", "en"):
        name = f"{part}.{language}.gz"
        path = os.path.join("data", "multi30k", name)
        download(MULTI30K_URL + name, path, MULTI30K_SHA256[name])
        with gzip.open(path, "rt", encoding="utf-8") as file:
            sentences[language] = [normalize(line) for line in file]
    return list(zip(sentences["de"], sentences["en"]))


def _key(text):
    """A text without case and punctuation."""
    return " ".join(re.findall(r"\w+", fold(text)))


def split_pairs(pairs, part):
    """The pairs in one part of a corpus. Those of "val" and "test" are new to the model.

    "Komm!" and "Komm her!" are both "Come here!", so the translation of a held-out sentence may
    occur in training. Therefore a held-out pair counts only if neither its German nor its English
    sentence occurs there, compared without case and punctuation. Of several translations of a
    German sentence, the first one counts.
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
        n_lines = {"train": N_TOY_TRAINING_LINES, "val": 10_000, "test": 30_000}[part]
        pairs = [(german, english) for german, english, _ in toy_lines(part, n_lines)]
    elif data == "multi30k":
        pairs = read_multi30k(part)
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
# (In a tie, such as n + d and u + n, the pair with the smaller numbers is merged.)

WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s+")  # a word with the space before it; merges stay inside
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
        # Only the words that contain the pair change: count their pairs again.
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
        """The tokens of a word: its bytes, merged in the order in which the merges were learned."""
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


def encode_source(tokenizer, german):
    """What the encoder reads: the tokens of the folded German text, then EOS."""
    return tokenizer.encode(fold(german)) + [EOS]


def encode_pairs(tokenizer, pairs):
    """(German, English) pairs -> pairs of lists of tokens (src, tgt)."""
    examples = []
    for german, english in pairs:
        src = encode_source(tokenizer, german)
        tgt = [BOS] + tokenizer.encode(english) + [EOS]
        examples.append((src, tgt))
    return examples


def drop_long(tokenizer, pairs, part):
    """The pairs with fewer than MAX_LEN tokens in each language. Prints how many are left out."""
    short = []
    for (german, english), (src, tgt) in zip(pairs, encode_pairs(tokenizer, pairs)):
        if len(src) <= MAX_LEN and len(tgt) <= MAX_LEN + 1:     # the last EOS is never an input
            short.append((german, english))
    if not short:
        sys.exit(f"every pair of the {part} part has {MAX_LEN} tokens or more")
    n_dropped = len(pairs) - len(short)
    if n_dropped:
        print(f"{part} part: {n_dropped} pairs of {MAX_LEN} tokens or more are left out")
    return short


# --------------------------------------------------------------------------------------------------
# Training: batches, loss, learning rate
def make_batches(examples, batch_tokens, seed):
    """Endless batches: lists of indices of examples, about `batch_tokens` tokens each.

    All sentences of a batch are padded to the longest one. So we sort them by length before we
    cut them into batches, and hardly any padding is needed.
    """
    for epoch in itertools.count():
        rng = random.Random(seed + epoch)
        # Adding 0 or 1 to the lengths at random gives every epoch different batches.
        order = []
        for i, (src, tgt) in enumerate(examples):
            noisy_length = len(tgt) + int(2 * rng.random())
            order.append((noisy_length, len(src), i))
        order.sort()
        batches = []
        batch = []
        longest = 0
        for _, _, i in order:
            src, tgt = examples[i]
            length = len(src) + len(tgt)
            longest = max(longest, length)
            if batch and longest * (len(batch) + 1) > batch_tokens:
                batches.append(batch)
                batch = []
                longest = length
            batch.append(i)
        batches.append(batch)
        rng.shuffle(batches)
        yield from batches


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
    # finite, and the model does not become overconfident. The lowest possible loss is then not 0,
    # but the entropy of these targets, 1.23 for tatoeba's 8,259 tokens.
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

    At first Adam's averages cover few gradients, so its steps are unreliable and must be small.
    Large post-norm Transformers do not train without a warm-up
    (https://arxiv.org/abs/2002.04745). At the end, small steps let the weights settle.
    """
    warmup = max(1, min(n_steps // 10, 1000))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup))) / 2


# --------------------------------------------------------------------------------------------------
# Decoding: greedy, and beam search
@torch.no_grad()
def greedy(model, src):
    """Translate src (B, S) by taking the most probable token at every step. Returns (B, T).

    A translation ends with EOS or has max_len - 1 tokens, and is filled with PAD.
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


# Greedy decoding cannot go back, but the most probable first word need not lead to the best
# sentence. So beam search keeps the `beam` best hypotheses. A hypothesis is a partial translation,
# and its score is the sum of the log probabilities of its tokens. Every step extends each
# hypothesis by every token and keeps the best results. With beam = 2:
#
#   step 1    I (-0.4)               We (-1.3)              ...     the 2 best first tokens
#   step 2    I sleep (-0.9)         I am (-1.5)
#             We sleep (-1.4)        ...                            keep the left column
#   step 3    I sleep <eos> (-1.7)   We sleep <eos> (-2.6)
#             We sleep well (-1.8)   ...                            keep the left column
#   step 4    I sleep <eos> (-1.7)   We sleep well <eos> (-2.0)     both have ended
#
# Every token lowers the score, which favors short translations. So every step ranks all hypotheses,
# including those that have ended, by score / length: -1.7 / 3 = -0.57 and -2.0 / 4 = -0.50, and "We
# sleep well" wins. A longer hypothesis can still win, so the search goes on until all have ended.


@torch.no_grad()
def beam_search(model, src, beam, length_penalty=1.0):
    """Translate src (B, S): the hypothesis with the highest score / length ** length_penalty.

    A larger length_penalty favors longer translations, because scores are negative. Returns (B, T)
    as `greedy` does. The hypotheses of a sentence are neighboring rows.
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
        lengths = lengths + ~ended
        extended = scores.unsqueeze(-1) + log_probs
        ranking = extended / lengths.unsqueeze(-1) ** length_penalty
        _, best = ranking.flatten(1).topk(beam)                             # (B, beam), best first
        parent = best // vocab_size                 # which hypothesis is extended
        token = best % vocab_size                   # by which token
        scores = extended.flatten(1).gather(1, best)
        lengths = lengths.gather(1, parent)
        ended = ended.gather(1, parent) | (token == EOS)
        # The hypotheses continue in a new order, and so do their keys and values.
        rows = (first_row + parent).flatten()                               # (B * beam,)
        tokens = torch.cat([tokens[rows], token.view(-1, 1)], dim=1)
        for module, (key, value) in cache.items():
            cache[module] = (key[rows], value[rows])
    return tokens.view(B, beam, -1)[:, 0, 1:]       # the best hypothesis, without BOS


def translate(model, tokenizer, sentences, beam):
    """Translate a list of strings, in batches of similar length.

    Blank strings become empty. So do strings that are too long, with a message on standard error.
    """
    device = model.token_embedding.weight.device
    sentences = [normalize(sentence) for sentence in sentences]
    sources = [encode_source(tokenizer, sentence) for sentence in sentences]
    order = []
    for i, sentence in enumerate(sentences):
        n_tokens = len(sources[i]) - 1                  # without EOS
        if n_tokens >= model.max_len:
            print(f"not translated, because a text can have at most {model.max_len - 1} tokens and "
                  f"this one has {n_tokens}: {sentence[:40]}...", file=sys.stderr)
        elif sentence:
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
            translations[i] = tokenizer.decode(tokens)  # EOS and PAD have no bytes
    return translations


# --------------------------------------------------------------------------------------------------
# BLEU (Papineni et al. 2002, https://aclanthology.org/P02-1040): how similar to the references?
#
# An n-gram is a sequence of n words. For n = 1 to 4, the precision is the fraction of the
# translations' n-grams that occur in the reference. BLEU is the geometric mean of the four, times
# 100, with a penalty if the translations are shorter than the references. Human translators score
# far below 100 as well, because there are many good translations and only one reference.
#
#     reference      the old king sees the dog today
#     translation    the old king sees the cat
#
# The precisions are 5/6, 4/5, 3/4 and 2/3, with the geometric mean 0.76. Six words instead of seven
# cost a factor of exp(1 - 7/6) = 0.85, so BLEU is 64.3.
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
# baselines are the word at the same position (diagonal) and a random word (chance).
#
# A head may look up the word that comes next, or the word that was just written. So we score two
# rows of the weights for each word: the one that *produces* it (as output) and the next one, which
# *consumes* it (as input; Chen et al. 2020, https://arxiv.org/abs/2004.14837). After training, the
# rows of the last block attend to the source of the word that they produce: the best head is right
# for 96% of the words. This block does most of the translating: with the cross-attention of the
# first block set to 0, the model still predicts every word of 150 sentences, given the words before
# it. With that of the last block set to 0, it predicts about half of them. (In real languages, Chen
# et al. find that rows which consume a word are better.)
def right_words(alignment, n_source_words):
    """(T, S) booleans: True where source word s is right for target word t."""
    right = torch.zeros(len(alignment), n_source_words, dtype=torch.bool)
    for t, source_words in enumerate(alignment):
        right[t, source_words] = True
    return right


def encode_line(model, tokenizer, line):
    """A line of the toy language: src (1, S + 1), tgt (1, T + 2) and the right words (T, S).

    S does not count EOS. T counts neither BOS nor the full stop, which is too easy to find.
    """
    german, english, alignment = line
    src = encode_source(tokenizer, german)
    tgt = [BOS] + tokenizer.encode(english)
    n_source_words = len(german.split()) + 1
    if len(src) != n_source_words + 1 or len(tgt) != len(alignment) + 1:
        sys.exit("the alignment needs one token for each word: train with more --merges")
    device = model.token_embedding.weight.device
    right = right_words(alignment[:-1], n_source_words)
    return pad([src], device), pad([tgt], device), right


def alignment_accuracy(model, tokenizer, lines):
    """How often each head (2, n_dec_layers, H), chance and the diagonal are right.

    Index 0 is for the rows that produce a word, index 1 for the rows that consume it.
    """
    hits = 0
    chance = 0
    diagonal = 0
    n_words = 0
    for line in lines:
        src, tgt, right = encode_line(model, tokenizer, line)
        T, S = right.shape
        memory, src_mask = model.encode(src)
        _, weights = model.decode(tgt, memory, src_mask)    # the reference is the decoder's input
        weights = torch.cat(weights)                        # (n_dec_layers, H, T + 2, S + 1)
        attended = weights[..., :S].argmax(dim=-1).cpu()    # without EOS
        words = torch.arange(T)
        produces = right[words, attended[..., :T]]          # (n_dec_layers, H, T)
        consumes = right[words, attended[..., 1:T + 1]]
        hits += torch.stack([produces, consumes]).sum(dim=-1)
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
        # With a copy of the sentence for each target word, one backward pass gives all gradients.
        src_mask = (src != PAD)[:, None, None, :]
        embeddings = model.embed(src).repeat(T, 1, 1).requires_grad_()      # (T, S + 1, d_model)
        memory = embeddings
        for block in model.encoder:
            memory = block(memory, src_mask)
        logits, _ = model.decode(tgt.repeat(T, 1), memory, src_mask)
        log_probs = logits.log_softmax(dim=-1)              # (T, T + 2, vocab_size)
        words = torch.arange(T)
        produced = log_probs[words, words, tgt[0, 1:T + 1]]     # copy t: of target word t alone
        gradient = torch.autograd.grad(produced.sum(), embeddings)[0]
        guess = gradient.norm(dim=-1)[:, :S].argmax(dim=-1).cpu()
        hits += right[words, guess].sum()
        n_words += T
    return hits / n_words


def plot_cross_attention(model, tokenizer, sentence, beam, path, reference=None, alignment=None):
    """Heatmaps of the last decoder block's heads. A row is labeled with the token it produces.

    If the translation is equal to the reference, dots mark the right cells.
    """
    device = model.token_embedding.weight.device
    src = pad([encode_source(tokenizer, sentence)], device)             # (1, S)
    tokens = beam_search(model, src, beam)
    tokens = tokens[:, tokens[0] != PAD]                                # (1, T)
    decoder_input = F.pad(tokens, (1, 0), value=BOS)[:, :-1]            # BOS first, no last token
    _, weights = model(src, decoder_input)                              # (1, H, T, S)
    source_labels = [_label(tokenizer, token) for token in src[0].tolist()]
    produced_labels = [_label(tokenizer, token) for token in tokens[0].tolist()]
    marks = None
    if alignment and tokenizer.decode(tokens[0].tolist()) == reference:
        right = right_words(alignment, src.size(1) - 1)
        right = F.pad(right, (0, 1, 0, 1))                              # EOS has no right cell
        if right.shape == weights.shape[-2:]:                           # one token for each word
            marks = right.expand_as(weights[0])
    plot_attention(weights[0], source_labels, produced_labels, path,
                   x_name="source token", y_name="produced token", marks=marks)


def _label(tokenizer, token):
    """A token as the label of a heatmap, with "_" for a space."""
    return tokenizer.decode([token]).replace(" ", "_") or "<eos>"


# --------------------------------------------------------------------------------------------------
# Using a trained model: --test, --line and --text
def path_of(folder, data, ending):
    """A path such as out/translate_toy.pt."""
    return os.path.join(folder, f"translate_{os.path.basename(data)}{ending}")


def save(content, path):
    """Save to a file. If the run is killed meanwhile, the old file is still there."""
    torch.save(content, path + ".tmp")
    os.replace(path + ".tmp", path)


def load_model(data, out_dir, device):
    """The trained model for this data and its tokenizer, from `out_dir` or else from assets/."""
    path = path_of(out_dir, data, ".pt")
    if not os.path.exists(path):
        path = path_of(os.path.join(os.path.dirname(__file__), "assets"), data, ".pt")
    if not os.path.exists(path):
        sys.exit(f"there are no weights for {data}: train them with "
                 f"python translate.py --data {data} --out_dir {out_dir}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = TransformerModel(*saved["sizes"], dropout=0.0)
        model.load_state_dict(saved["weights"])
        tokenizer = Tokenizer(saved["merges"])
        steps = saved["steps"]
    except Exception as error:
        sys.exit(f"{path} does not hold weights of translate.py ({type(error).__name__}): "
                 "delete it or train again")
    print(f"weights from {path}, trained for {steps} steps", file=sys.stderr)
    model.to(device).eval().requires_grad_(False)
    return model, tokenizer


def score(model, tokenizer, pairs, beam):
    """The fraction of translations that are equal to their reference, and BLEU."""
    translations = translate(model, tokenizer, [german for german, _ in pairs], beam)
    references = [english for _, english in pairs]
    n_exact = sum(ours == theirs for ours, theirs in zip(translations, references))
    return n_exact / len(pairs), bleu(translations, references)


def test(args):
    """Score the test part, and the alignment of the toy language. Returns the results."""
    model, tokenizer = load_model(args.data, args.out_dir, args.device)
    pairs = drop_long(tokenizer, load_pairs(args.data, "test"), "test")
    exact, bleu_score = score(model, tokenizer, pairs, args.beam)
    n_params = sum(p.numel() for p in model.parameters())
    result = f"exact={exact:.4f} bleu={bleu_score:.2f}"
    if args.data == "toy":
        alignment, gradient = test_alignment(model, tokenizer, args.out_dir)
        result += f" alignment={alignment:.4f} gradient={gradient:.4f}"
    if args.data == "tatoeba":
        # Careless typing: after `fold`, only the missing full stop makes a difference.
        careless = [(german.lower().removesuffix("."), english) for german, english in pairs]
        _, careless_bleu = score(model, tokenizer, careless, args.beam)
        print(f"in lower case and without the final full stop: BLEU {careless_bleu:.2f}")
    return f"{result} params={n_params}"


def test_alignment(model, tokenizer, out_dir):
    """Print and plot how often every head and the gradient find a right source word.

    Returns the accuracies of the best head (on the validation part) and of the gradient.
    """
    val_accuracy, _, _ = alignment_accuracy(model, tokenizer, toy_lines("val", 10_000))
    test_lines = toy_lines("test", 30_000)
    accuracy, chance, diagonal = alignment_accuracy(model, tokenizer, test_lines)
    gradient = gradient_accuracy(model, tokenizer, test_lines[:300])    # slower: a part is enough
    _, n_blocks, n_heads = accuracy.shape
    heads = []
    for block in range(1, n_blocks + 1):
        heads += [f"{block}.{head}" for head in range(1, n_heads + 1)]
    produces, consumes = accuracy.flatten(1).tolist()
    print("fraction of the target words whose most attended source word is right")
    print("decoder block.head         ", *(f"{head:>5}" for head in heads))
    print("row that produces the word ", *(f"{value:.3f}" for value in produces))
    print("row that consumes the word ", *(f"{value:.3f}" for value in consumes))
    print(f"gradient {gradient:.3f}, diagonal {diagonal:.3f}, chance {chance:.3f}")

    make_folder(out_dir)
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(heads, produces, "o", label="row that produces the word")
    axis.plot(heads, consumes, "s", label="row that consumes the word")
    axis.axhline(gradient, color="tab:red", label="gradient")
    axis.axhline(diagonal, color="gray", linestyle="--", label="diagonal")
    axis.axhline(chance, color="gray", linestyle=":", label="chance")
    axis.set(xlabel="decoder block.head", ylabel="accuracy", ylim=(-0.05, 1.05))
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    path = path_of(out_dir, "alignment", ".png")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"saved {path}")
    best_head = val_accuracy.argmax()           # an index into all heads
    return accuracy.flatten()[best_head].item(), gradient.item()


def translate_line(args):
    """Translate line --line of the data, and print it beside the reference."""
    if args.data == "toy":
        n_lines = N_TOY_LINES
    else:
        pairs = read_multi30k("test") if args.data == "multi30k" else read_file(args.data)
        n_lines = len(pairs)
    if not 1 <= args.line <= n_lines:
        sys.exit(f"--line {args.line}: {args.data} has lines 1 to {n_lines}")
    alignment = None
    if args.data == "toy":
        german, english, alignment = toy_pair(args.line)
    else:
        german, english = pairs[args.line - 1]
    model, tokenizer = load_model(args.data, args.out_dir, args.device)
    translation = translate(model, tokenizer, [german], args.beam)[0]
    print(f"source:      {german}")
    print(f"reference:   {english}")
    print(f"translation: {translation}")
    if args.data == "multi30k":
        held_out = "yes"                # --line counts the lines of the test part
    elif args.data == "toy" and args.line > N_TOY_TRAINING_LINES:
        held_out = "yes, unless it is also among the first 100,000 lines"
    elif part_of(german) == "train":
        held_out = "no"
    elif args.data == "toy" or (german, english) in split_pairs(pairs, part_of(german)):
        held_out = "yes"
    else:
        held_out = "yes, but it is not scored (see split_pairs)"
    print(f"held out:    {held_out}")
    if args.plot and translation:
        make_folder(args.out_dir)
        path = path_of(args.out_dir, args.data, ".png")
        plot_cross_attention(model, tokenizer, german, args.beam, path, english, alignment)


def read_stdin():
    """The lines of standard input, decoded as UTF-8, one by one."""
    for n, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8-sig" if n == 1 else "utf-8")
        except UnicodeDecodeError:
            sys.exit(f"line {n} of standard input is not UTF-8")


def translate_texts(args):
    """Translate the texts of --text, or with --text - the lines of standard input."""
    model, tokenizer = load_model(args.data, args.out_dir, args.device)
    if args.text != ["-"]:
        groups = [args.text]
    elif sys.stdin.isatty():
        print("type German, one sentence on each line; Ctrl-D ends", file=sys.stderr)
        groups = ([line] for line in read_stdin())      # answer every line at once
    else:
        groups = [list(read_stdin())]                   # in batches, which is faster
    n = 0
    for sentences in groups:
        translations = translate(model, tokenizer, sentences, args.beam)
        for sentence, translation in zip(sentences, translations):
            n += 1
            print(translation, flush=True)
            if args.plot and translation:
                make_folder(args.out_dir)
                path = path_of(args.out_dir, args.data, f"_{n}.png")
                plot_cross_attention(model, tokenizer, normalize(sentence), args.beam, path)


if __name__ == "__main__":
    start = time.perf_counter()

    # options; those of training have a default for each corpus
    DEFAULTS = {
        "toy": {
            "steps": 500, "batch_tokens": 4000, "lr": 0.003, "dropout": 0.1, "merges": 600,
            "d_model": 64, "n_heads": 4, "n_enc_layers": 2, "n_dec_layers": 2,
        },
        "tatoeba": {
            "steps": 30_000, "batch_tokens": 2000, "lr": 0.0015, "dropout": 0.1, "merges": 8000,
            "d_model": 192, "n_heads": 4, "n_enc_layers": 3, "n_dec_layers": 3,
        },
        "multi30k": {
            "steps": 25_000, "batch_tokens": 2000, "lr": 0.0015, "dropout": 0.25, "merges": 4000,
            "d_model": 192, "n_heads": 4, "n_enc_layers": 3, "n_dec_layers": 3,
        },
    }
    parser = argparse.ArgumentParser(description=__doc__)
    not_given = argparse.SUPPRESS
    parser.add_argument("--data", default=not_given,
                        help="toy (the default), tatoeba (the default with --text), multi30k, or a "
                             "text file with English, a tab and German on every line")
    parser.add_argument("--test", action="store_true",
                        help="do not train: score the test part (unless --line or --text is given)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--line", type=int,
                      help="do not train: translate this line of the data, from 1 on")
    mode.add_argument("--text", nargs="+",
                      help="do not train: translate these texts; - reads lines from stdin")
    mode.add_argument("--resume", action="store_true",
                      help="continue an interrupted training run")
    parser.add_argument("--plot", action="store_true",
                        help="with --line or --text: plot the cross-attention")
    parser.add_argument("--beam", type=number(int, 1), default=5,
                        help="hypotheses in beam search; 1 is greedy decoding (default: 5)")
    parser.add_argument("--steps", type=number(int, 1), default=not_given,
                        help="training steps")
    parser.add_argument("--batch_tokens", type=number(int, 1), default=not_given,
                        help="tokens in each batch, both languages together")
    parser.add_argument("--lr", type=number(float, 0), default=not_given,
                        help="peak learning rate")
    parser.add_argument("--dropout", type=number(float, 0, 1), default=not_given,
                        help="dropout probability")
    parser.add_argument("--merges", type=number(int, 1), default=not_given,
                        help="byte-pair merges")
    parser.add_argument("--d_model", type=number(int, 1), default=not_given,
                        help="width of the model")
    parser.add_argument("--n_heads", type=number(int, 1), default=not_given,
                        help="attention heads")
    parser.add_argument("--n_enc_layers", type=number(int, 1), default=not_given,
                        help="encoder blocks")
    parser.add_argument("--n_dec_layers", type=number(int, 1), default=not_given,
                        help="decoder blocks")
    defaults = [f"{data}: {values}" for data, values in DEFAULTS.items()]
    parser.add_argument_group("defaults for training", "\n".join(defaults))
    args = parse_args(parser)
    vars(args).setdefault("data", "tatoeba" if args.text else "toy")
    defaults = DEFAULTS.get(args.data, DEFAULTS["tatoeba"])     # a text file has those of tatoeba
    for name, value in defaults.items():
        vars(args).setdefault(name, value)
    if args.d_model % args.n_heads != 0:
        parser.error(f"--n_heads {args.n_heads} does not divide --d_model {args.d_model}")

    # without training
    if args.line is not None:
        translate_line(args)
        sys.exit()
    if args.text:
        translate_texts(args)
        sys.exit()
    if args.plot:
        parser.error("--plot needs --line or --text")
    if args.test:
        result = test(args)
        print(f"result: {result} seconds={time.perf_counter() - start:.1f}")
        sys.exit()

    # several processes, started by torchrun (skip this on a first reading): each takes a part of
    # every batch, and DistributedDataParallel averages the gradients
    rank = 0            # the number of this process
    world_size = 1      # the number of processes
    if distributed.is_torchelastic_launched():
        rank = int(os.environ["RANK"])
        world_size = int(os.environ["WORLD_SIZE"])
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")

    make_folder(args.out_dir)

    # files: the weights, and beside them the checkpoint of an unfinished run
    weights_path = path_of(args.out_dir, args.data, ".pt")
    checkpoint_path = weights_path + ".checkpoint"
    if args.resume and not os.path.exists(checkpoint_path):
        sys.exit(f"there is nothing to resume: {checkpoint_path} does not exist")
    if not args.resume and os.path.exists(checkpoint_path):
        sys.exit(f"{checkpoint_path} holds an unfinished run: continue it with --resume, "
                 "or delete the file")

    # data; the tokenizer learns from the training part alone
    train_pairs = load_pairs(args.data, "train")
    val_pairs = load_pairs(args.data, "val")
    texts = [fold(german) for german, _ in train_pairs]
    texts += [english for _, english in train_pairs]
    merges = learn_merges(texts, args.merges)
    tokenizer = Tokenizer(merges)
    checksum = zlib.crc32(repr(train_pairs).encode())       # for --resume: is it the same data?
    train_pairs = drop_long(tokenizer, train_pairs, "train")
    val_pairs = drop_long(tokenizer, val_pairs, "val")
    examples = encode_pairs(tokenizer, train_pairs)
    val_examples = encode_pairs(tokenizer, val_pairs)

    # model and optimizer; betas and eps are those of section 5.3
    vocab_size = len(tokenizer.pieces)
    sizes = [vocab_size, MAX_LEN, args.d_model, args.n_heads, args.n_enc_layers, args.n_dec_layers]
    model = TransformerModel(*sizes, dropout=args.dropout).to(args.device)
    n_params = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    if rank == 0:
        print(f"{n_params:,} parameters, {len(examples):,} training pairs, "
              f"{len(val_examples):,} validation pairs")

    # resume an interrupted run, with the options and the data that it had
    settings = {"data": args.data, "seed": args.seed, "checksum of the data": checksum,
                "processes": world_size}
    for name in defaults:
        settings[name] = getattr(args, name)
    first_step = 0
    if args.resume:
        try:
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        except Exception as error:
            sys.exit(f"cannot resume: {checkpoint_path} is damaged ({type(error).__name__}), "
                     "delete it and train again")
        different = []
        for name, value in settings.items():
            old_value = checkpoint["settings"].get(name)
            if old_value != value:
                different.append(f"{name} {old_value}, not {value}")
        if different:
            sys.exit(f"cannot resume: {checkpoint_path} was made with " + "; ".join(different))
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step = checkpoint["step"]

    # training loop
    net = model
    if world_size > 1:
        net = nn.parallel.DistributedDataParallel(model)    # shares its weights
    log_every = max(1, args.steps // 20)
    batches = make_batches(examples, args.batch_tokens, args.seed)
    batches = itertools.islice(batches, first_step, None)   # a resumed run skips the old batches
    for step in range(first_step, args.steps):
        model.train()
        torch.manual_seed(args.seed + step * world_size + rank)     # for dropout, also if resumed

        # get a batch
        indices = next(batches)
        if len(indices) < world_size:
            continue                                        # every process needs a sentence
        batch = [examples[i] for i in indices[rank::world_size]]
        n_targets = sum(len(examples[i][1]) - 1 for i in indices)   # of all processes

        # forward: the mean loss of all targets (DistributedDataParallel divides the sum of the
        # gradients by world_size, so multiply by it)
        loss = batch_loss(net, batch, args.device, label_smoothing=0.1) / n_targets * world_size

        # backward, update; clipping limits the norm of the gradient to 1, so that no single batch
        # dominates Adam's averages
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)   # before clipping
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()

        # log, and save a checkpoint
        if step == 0 and rank == 0:
            print(f"step 0/{args.steps}: loss {loss:.4f}, uniform prediction ln {vocab_size} = "
                  f"{math.log(vocab_size):.4f}", flush=True)
        if (step + 1) % log_every == 0 and rank == 0:
            model.eval()
            val_loss = validation_loss(model, val_examples, args.device)
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{args.steps}: loss {loss:.4f}, "
                  f"validation loss {val_loss:.4f}, {seconds:.0f} s")
            print("   ", *translate(model, tokenizer, [val_pairs[0][0]], args.beam), flush=True)
            checkpoint = {"settings": settings, "step": step + 1, "model": model.state_dict(),
                          "optimizer": optimizer.state_dict()}
            save(checkpoint, checkpoint_path)

    if world_size > 1:
        distributed.destroy_process_group()
    if rank != 0:
        sys.exit()

    # save the weights in half precision: half the size, and the translations are as good
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save({"sizes": sizes, "merges": merges, "steps": args.steps, "weights": weights}, weights_path)
    if os.path.exists(checkpoint_path):
        os.remove(checkpoint_path)
    print(f"saved {weights_path}")

    # evaluation, with the weights as saved
    model, tokenizer = load_model(args.data, args.out_dir, args.device)
    exact, bleu_score = score(model, tokenizer, val_pairs, args.beam)
    seconds = time.perf_counter() - start
    print(f"result: exact={exact:.4f} bleu={bleu_score:.2f} params={n_params} "
          f"seconds={seconds:.1f}")
