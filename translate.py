"""How do the pieces make the Transformer of Figure 1, and what does it look at while it translates?
The encoder reads a German sentence, the decoder writes the English one, token by token, and cross-attention joins them:
each token that is written looks at the tokens that were read. All of it is here, trained on a real language pair or on
a toy language that needs no download.

                                                          logits (B, T, vocab_size)
                                                                     ^
                                                        token embedding, transposed
                                                                     ^
                                               +---------------------^----------------------+
             memory (B, S, d_model) --.        |            + x, then LayerNorm             |
                     ^                |        |                     ^                      |
    +----------------^------------+   |        |                FeedForward                 |
    |       + x, then LayerNorm   |   |        |                     ^                      |
    |                ^            |   |        |            + x, then LayerNorm             |
    |           FeedForward       |   |  keys, |                     ^                      |
    |                ^            |   '-------------> MultiHeadAttention to the source      |
    |       + x, then LayerNorm   |     values |                     ^                      |
    |                ^            |            |            + x, then LayerNorm             |
    |        MultiHeadAttention   |            |                     ^                      |
    |         to all the source   |            |  MultiHeadAttention to the target so far   |
    |                ^            |            |                     ^                      |
    +--- EncoderBlock, n times ---+            +------------ DecoderBlock, n times ---------+
                     ^                                               ^
         token + position embedding                      token + position embedding
                     ^                                               ^
       source: German, EOS (B, S)                  target: BOS, English so far (B, T)

B sentences at once, with S tokens in the source and T in the target; BOS is a token that begins a translation, EOS one
that ends a sentence; logits are scores, one for each token that could come next. "+ x": what a part computes is added
to what came into it (the residual connection); in the code this line ends the class that stands below it. Attention to
the target is masked, so that no token sees what comes after it: all T tokens of a known translation are learned from at
once. Attention knows no order, so each place has a learned vector, which is added to that of its token. Source, target
and output share one embedding, because both languages share their tokens: a name or a number is the same in both.
Two things differ from the paper: its positions are sines, ours are learned, and its FeedForward is four times as wide.

    python translate.py                                        train on the toy language, in a minute
    python translate.py --test --line=7 --plot                 translate line 7 of it and draw the cross-attention
    python translate.py --text "Ein Hund läuft durch den Schnee."      any text, with weights trained on Multi30k
    python translate.py --data multi30k                        train on Multi30k, in two to three hours
    python translate.py --data multi30k --test                 BLEU, the usual measure, on its test set
    torchrun --nproc_per_node 4 translate.py --data multi30k   train on four GPUs: four copies share every batch

You will see the loss start near ln(vocabulary), and a sample translation grow from babble to English. The weights of
both trainings are in assets/, so all else works without training; weights that you train go to out/ and go first.

Vaswani et al. 2017, "Attention Is All You Need" (https://arxiv.org/abs/1706.03762).
"""

import collections
import copy
import gzip
import heapq
import itertools
import math
import os
import random
import re
import sys
import zlib

import torch
import torch.nn.functional as F
from torch import distributed, nn

from attention import attention, check_finite, download, fail, load, make_parser, number, plot_attention, \
    print_first_loss, print_result, progress, run, save_weights, start

# ----------------------------------------------------------------------------------------------------------------------
# The Transformer. B sentences, S source tokens and T target tokens in each, H heads, d_k = d_model / H.

PAD, BOS, EOS = 0, 1, 2     # token numbers: fills short sentences up, begins a translation, ends a sentence


class MultiHeadAttention(nn.Module):
    """All heads at once, then the residual connection and the LayerNorm (section 3.2.2). (B, T, d_model) -> same shape.

    Also returns the weights (B, H, T, S), or None without `need_weights`. Keys and values come from `keys_and_values`
    and are passed in: while a sentence is produced token by token (see `beam_search`), they are made once and kept.
    """

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"{n_heads} heads do not divide a width of {d_model}")
        self.n_heads = n_heads
        self.w_q = nn.Linear(d_model, d_model)
        self.w_kv = nn.Linear(d_model, 2 * d_model)
        self.w_o = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(d_model)

    def split(self, x):
        """(B, T, d_model) -> (B, H, T, d_k): head h gets the h-th stretch of the features."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)       # (B, H, T, d_k)

    def keys_and_values(self, seen):
        """The keys and the values, (B, H, S, d_k) each, of the tokens that can be attended to, seen (B, S, d_model)."""
        key, value = self.w_kv(seen).chunk(2, dim=-1)                    # (B, S, d_model) each
        return self.split(key), self.split(value)

    def forward(self, x, key, value, mask=None, need_weights=True):
        query = self.split(self.w_q(x))                                  # (B, H, T, d_k)
        output, weights = attention(query, key, value, mask, need_weights=need_weights)       # (B, H, T, d_k)
        output = self.w_o(output.transpose(1, 2).flatten(2))             # (B, T, d_model)
        return self.norm(x + self.dropout(output)), weights


class FeedForward(nn.Module):
    """An MLP, its hidden layer twice as wide, on each token; residual and LayerNorm. (B, T, d_model) -> same shape."""

    def __init__(self, d_model, dropout):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.ReLU(), nn.Linear(2 * d_model, d_model),
                                    nn.Dropout(dropout))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x):
        return self.norm(x + self.layers(x))                             # (B, T, d_model)


class EncoderBlock(nn.Module):
    """Every source token looks at all source tokens, then works on what it saw. (B, S, d_model) -> same shape."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.feed_forward = FeedForward(d_model, dropout)

    def forward(self, x, mask):
        key, value = self.self_attention.keys_and_values(x)              # (B, H, S, d_k) each
        x, _ = self.self_attention(x, key, value, mask, need_weights=False)               # (B, S, d_model)
        return self.feed_forward(x)                                      # (B, S, d_model)


class DecoderBlock(nn.Module):
    """Every target token looks at the target up to itself, then at the source. (B, T, d_model) -> same shape."""

    def __init__(self, d_model, n_heads, dropout):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.cross_attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.feed_forward = FeedForward(d_model, dropout)

    def forward(self, x, tgt_mask, src_key, src_value, src_mask, past=None, need_weights=True):
        """`past`: keys and values of the tokens before x, or None; with those of x added, they are returned as well."""
        kept = self.self_attention.keys_and_values(x)                    # (B, H, T, d_k) each
        if past is not None:
            kept = [torch.cat(both, dim=2) for both in zip(past, kept)]  # (B, H, n_past + T, d_k) each
        x, _ = self.self_attention(x, *kept, tgt_mask, need_weights=False)                # (B, T, d_model)
        x, weights = self.cross_attention(x, src_key, src_value, src_mask, need_weights)
        return self.feed_forward(x), weights, kept                       # (B, T, d_model), (B, H, T, S)


class TransformerModel(nn.Module):
    """Source (B, S) and target (B, T) token numbers -> logits (B, T, vocab_size) of the token after each target token.

    Also returns the weights (B, H, T, S) of the last block's cross-attention, or None without `need_weights`.
    """

    def __init__(self, vocab_size, max_len, d_model, n_heads, n_enc_layers, n_dec_layers, dropout=0.1):
        super().__init__()
        self.max_len = max_len
        self.token_embedding = nn.Embedding(vocab_size, d_model)         # shared: source, target, output (section 3.4)
        self.position_embedding = nn.Embedding(max_len, d_model)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderBlock(d_model, n_heads, dropout) for _ in range(n_enc_layers))
        self.decoder = nn.ModuleList(DecoderBlock(d_model, n_heads, dropout) for _ in range(n_dec_layers))
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)
        # As output layer the embedding meets d_model features of size 1 each: with this spread logits have size 1 too.
        nn.init.normal_(self.token_embedding.weight, std=d_model ** -0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.5)

    def embed(self, tokens, start=0):
        """What the tokens (B, T) are plus where they stand, the first one at position `start`: (B, T, d_model)."""
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)    # (T,)
        x = self.token_embedding(tokens) * math.sqrt(self.token_embedding.embedding_dim)  # (B, T, d_model)
        return self.dropout(x + self.position_embedding(positions))      # (B, T, d_model)

    def encode(self, src):
        """What the decoder needs of the source: for each of its blocks keys and values, and the mask of the padding.

        That is not `memory` of the figure, but what each block's cross-attention makes of it, once for each sentence.
        """
        src_mask = (src != PAD)[:, None, None, :]                        # (B, 1, 1, S)
        memory = self.embed(src)                                         # (B, S, d_model)
        for block in self.encoder:
            memory = block(memory, src_mask)                             # (B, S, d_model)
        return [block.cross_attention.keys_and_values(memory) for block in self.decoder], src_mask

    def decode(self, tgt, encoded, past=None, need_weights=True):
        """Logits, weights and the keys and values of all target tokens so far, which make the next call's `past`.

        With `past`, `tgt` holds only the tokens that follow: one at a time costs as much as one token, not T.
        """
        src_keys_and_values, src_mask = encoded
        n_past = past[0][0].shape[2] if past else 0
        n_all = n_past + tgt.shape[1]
        # No token sees a later one. That hides the padding from all tokens too, since it comes after them.
        tgt_mask = torch.ones(n_all, n_all, dtype=torch.bool, device=tgt.device).tril()[n_past:]  # (T, n_past + T)
        x, kept = self.embed(tgt, n_past), []                            # (B, T, d_model)
        for block, (key, value), before in zip(self.decoder, src_keys_and_values, past or [None] * len(self.decoder)):
            x, weights, now = block(x, tgt_mask, key, value, src_mask, before, need_weights)
            kept.append(now)
        return F.linear(x, self.token_embedding.weight), weights, kept   # (B, T, vocab_size), (B, H, T, S)

    def forward(self, src, tgt, need_weights=True):
        logits, weights, _ = self.decode(tgt, self.encode(src), need_weights=need_weights)
        return logits, weights                                           # (B, T, vocab_size), (B, H, T, S)


# ----------------------------------------------------------------------------------------------------------------------
# The toy language. German shows by the *ending* who does what to whom, English by the *place*. The German verb stands
# second, after the subject, an adverb or the object; an infinitive or a participle goes to the very end:
#
#     Der Mann sieht den Hund.                      The man sees the dog.
#     Den Mann sieht der Hund.                      The dog sees the man.
#     Heute sieht die Ärztin einen Mann.            Today the doctor sees a man.
#     Der Mann kann einen Hund sehen.               The man can see a dog.
#     Die Königin hat gestern den Hund gesehen.     The queen saw the dog yesterday.
#
# Each German sentence has exactly one English one, so answers can be compared word for word. What could be read in two
# ways is left out: "sie" as object or plural, "er" and "sie" for things, "groß" of people (big or tall?), an object in
# front that looks like a subject. So are nouns such as Junge, which change as objects (den Jungen).

N_TOY_LINES = 209_773  # any number would do; this one is the size of a well-known corpus of real sentence pairs

# Kinds keep the sentences sensible: p person, c child, a animal, f food, d drink, b book, l letter, t thing.
Noun = collections.namedtuple("Noun", "german gender english kind")
NOUNS = {kind: [Noun(*word.split(), kind) for word in words.split(", ")] for kind, words in {
    "p": "Frau f woman, Ärztin f doctor, Mann m man, Königin f queen, Lehrer m teacher, Sängerin f singer, "
         "Ingenieur m engineer, König m king, Bäcker m baker, Künstlerin f artist",
    "a": "Katze f cat, Vogel m bird, Maus f mouse, Hund m dog, Pferd n horse, Esel m donkey, Schaf n sheep, "
         "Fuchs m fox",
    "f": "Apfel m apple, Kuchen m cake, Tomate f tomato, Orange f orange, Ei n egg",
    "t": "Stuhl m chair, Regenschirm m umbrella, Lampe f lamp, Tasche f bag, Fahrrad n bicycle, Auto n car",
    "c": "Kind n child, Mädchen n girl", "d": "Kaffee m coffee, Tee m tea, Limonade f lemonade",
    "b": "Buch n book, Roman m novel, Zeitung f newspaper", "l": "Brief m letter, Postkarte f postcard, Gedicht n poem",
}.items()}
ADJECTIVES = {kind: [word.split()[:2] for word in (  # German without its ending, English, the kinds it goes with
    "alt old pabt, jung young pca, klug clever pca, müd tired pca, hungrig hungry pca, ehrlich honest pc, "
    "klein little cat, groß big aft, frisch fresh f, kalt cold d, rot red t, nützlich useful t, neu new blt, "
    "interessant interesting bl").split(", ") if kind in word.split()[2]] for kind in NOUNS}
ARTICLES = {  # each with the ending of an adjective after it: a subject's a and the, an object's a and the
    "m": (("ein", "er"), ("der", "e"), ("einen", "en"), ("den", "en")),
    "f": (("eine", "e"), ("die", "e"), ("eine", "e"), ("die", "e")),
    "n": (("ein", "es"), ("das", "e"), ("ein", "es"), ("das", "e"))}
# Pronouns come with the place of their form in the tables of verbs; noun phrases take that of er and sie, the third.
PRONOUNS = [("ich", "I", 0), ("du", "you", 1), ("er", "he", 2), ("sie", "she", 2), ("wir", "we", 3)]
AUXILIARIES = {"haben": ("habe", "hast", "hat", "haben"), "sein": ("bin", "bist", "ist", "sind")}
MODALS = [(("will", "willst", "will", "wollen"), "want to", "wants to"),
          (("kann", "kannst", "kann", "können"), "can", "can"),
          (("muss", "musst", "muss", "müssen"), "have to", "has to")]
# Each frame: the word that a verb must have in its last column ("": any verb will do), the form that the verb takes, a
# German adverb and its English. Only states such as seeing go with heute in the present: of the others English says "is
# ...ing" today.
FRAMES = [
    ("", "perfect", "", ""), ("adverbs", "perfect", "gestern", "yesterday"),
    ("adverbs", "future", "morgen", "tomorrow"), ("modals", "modal", "", ""), ("modals", "modal", "heute", "today"),
    ("heute", "present", "heute", "today"), ("adverbs", "habit", "oft", "often"),
    ("adverbs", "habit", "manchmal", "sometimes"), ("adverbs", "habit", "selten", "rarely"),
    *[("", "present", "", "")] * 3]  # three times, for it is the most common
# Infinitive, forms for du and for er, auxiliary, participle; English and its past; kinds of subject and of object; and
# what the verb is fit for: some of the frames, and "again", which can be done to one object many times (one often reads
# *the* letter, but eats *the* apple once).
VERBS = []
for line in """\
kennen     kennst      kennt     haben gekannt     | know   knew     | pca | pca     |
sehen      siehst      sieht     haben gesehen     | see    saw      | pca | pcat    | modals adverbs heute again
hören      hörst       hört      haben gehört      | hear   heard    | pca | pca     | adverbs heute again
brauchen   brauchst    braucht   haben gebraucht   | need   needed   | pc  | bt      | adverbs heute again
lesen      liest       liest     haben gelesen     | read   read     | pc  | bl      | modals adverbs again
besuchen   besuchst    besucht   haben besucht     | visit  visited  | pc  | p       | modals adverbs again
zeichnen   zeichnest   zeichnet  haben gezeichnet  | draw   drew     | pc  | pca     | modals adverbs again
reparieren reparierst  repariert haben repariert   | repair repaired | p   | t       | modals adverbs again
schreiben  schreibst   schreibt  haben geschrieben | write  wrote    | pc  | l       | modals adverbs
kaufen     kaufst      kauft     haben gekauft     | buy    bought   | p   | fbt     | modals adverbs
finden     findest     findet    haben gefunden    | find   found    | pca | afblt   | modals adverbs
essen      isst        isst      haben gegessen    | eat    ate      | pc  | f       | modals adverbs
fressen    frisst      frisst    haben gefressen   | eat    ate      | a   | f       | modals adverbs
trinken    trinkst     trinkt    haben getrunken   | drink  drank    | p   | d       | modals adverbs
schlafen   schläfst    schläft   haben geschlafen  | sleep  slept    | pca |         | modals
arbeiten   arbeitest   arbeitet  haben gearbeitet  | work   worked   | p   |         | modals adverbs
kommen     kommst      kommt     sein  gekommen    | come   came     | pca |         | modals adverbs
schwimmen  schwimmst   schwimmt  sein  geschwommen | swim   swam     | pca |         | modals adverbs
""".splitlines():
    german, english, *kinds, uses = [column.split() for column in line.split("|")]
    subjects, objects = ([noun for kind in "".join(column) for noun in NOUNS[kind]] for column in kinds)
    VERBS.append((german, english, subjects, objects, [frame for frame in FRAMES if frame[0] in ("", *uses)], uses))


def toy_pair(n):
    """Line n (1 to N_TOY_LINES) of the toy language: a German sentence and its English translation.

    Every choice comes from `random.Random(n).random()`, which every version of Python computes alike.
    """
    draw = random.Random(n).random

    def pick(options):
        """A random one of the options."""
        return options[int(draw() * len(options))]

    def noun_phrase(noun, is_object, definite):
        """Article, perhaps an adjective, and noun, in German and in English."""
        german, english = noun.german, noun.english
        article, ending = ARTICLES[noun.gender][2 * is_object + definite]
        if draw() < 0.4:
            adjective, meaning = pick(ADJECTIVES[noun.kind])
            german, english = f"{adjective}{ending} {german}", f"{meaning} {english}"
        a = "an" if english.startswith(("a", "e", "i", "o", "um", "hon")) else "a"  # an umbrella, a useful bag
        return f"{article} {german}", f"{'the' if definite else a} {english}"

    (infinitive, du, er, auxiliary, participle), (base, past_tense), subjects, objects, frames, uses = pick(VERBS)
    _, form, adverb, english_adverb = pick(frames)
    noun, definite = pick(subjects), draw() < 0.6
    person = 2                                  # where the verb's form stands in the tables: that of er, sie and nouns
    if noun.kind == "p" and draw() < 0.4:
        (subject, english_subject, person), definite = pick(PRONOUNS), True
    else:
        subject, english_subject = noun_phrase(noun, False, definite)
    object_, english_object, fronts = "", "", ["subject"] + ["adverb"] * bool(adverb)
    if objects:
        thing = pick([other for other in objects if other != noun])
        definite_thing = draw() < 0.6 and (form != "habit" or "again" in uses)
        object_, english_object = noun_phrase(thing, True, definite_thing)
        if thing.gender == "m" and (definite or definite_thing):  # "Einen Hund sieht ein Mann." would sound odd
            fronts.insert(0, "object")

    if form == "modal":
        forms, want, wants = pick(MODALS)
        finite, last, english_verb = forms[person], infinitive, f"{wants if person == 2 else want} {base}"
    elif form == "perfect":
        finite, last, english_verb = AUXILIARIES[auxiliary][person], participle, past_tense
    else:
        finite, last = (infinitive[:-1], du, er, infinitive)[person], ""
        english_verb = f"will {base}" if form == "future" else base + "s" * (person == 2)
    if form == "habit":  # often goes before the verb; other adverbs go first if the German ones do, else last
        english_verb, english_adverb = f"{english_adverb} {english_verb}", ""

    parts, first = {"subject": subject, "adverb": adverb, "object": object_}, pick(fronts)    # in this order
    if first == "object" and not definite:  # "Den Hund sieht oft ein Mann.": what is new comes after the adverb
        parts = {"adverb": adverb, **parts}
    german = [parts.pop(first), finite, *parts.values(), last]
    english = [english_subject, english_verb, english_object]
    english.insert(0 if first == "adverb" else 3, english_adverb)
    german, english = (" ".join(filter(None, words)) for words in (german, english))
    return german[0].upper() + german[1:] + ".", english[0].upper() + english[1:] + "."


def toy_part(german):
    """Where a German sentence of the toy language belongs: 1 in 64 each to "test" and "val", the others to "train".

    It is the sentence that decides, since several lines may say the same: none that is tested occurs in training.
    """
    return {7: "test", 39: "val"}.get(zlib.crc32(german.encode()) % 64, "train")      # with 7, line 7 is in "test"


# ----------------------------------------------------------------------------------------------------------------------
# Sentences: the real corpus, and a file of your own

MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K_SHA256 = {
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"}


def multi30k_pairs(part):
    """The (German, English) pairs of "train", "val" or "test" of Multi30k (Elliott et al. 2016, arXiv 1605.00459)."""
    columns = []
    for language in ("de", "en"):
        name = f"{'test_2016_flickr' if part == 'test' else part}.{language}.gz"
        content = download(MULTI30K_URL + name, os.path.join("data", "multi30k", name), MULTI30K_SHA256[name])
        columns.append([line.strip() for line in gzip.decompress(content).decode().strip("\n").split("\n")])
    return list(zip(*columns))


def file_pairs(path):
    """The (German, English) pairs of a UTF-8 file: English, a tab and German in each line, further columns ignored."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().rstrip("\n").split("\n")
    except OSError as error:
        fail(f"argument --data: takes toy, multi30k or a file; cannot read {path} ({error.strerror})")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start})")
    if lines == [""]:
        fail(f"{path} is empty")
    pairs = []
    for n, line in enumerate(lines, 1):
        english, german = ([part.strip() for part in line.split("\t")] + [""])[:2]
        if not english or not german:
            fail(f"line {n} of {path} is not English, a tab and German: {line[:40]!r}")
        pairs.append((german, english))
    return pairs


def load_pairs(data, part):
    """The (German, English) pairs of a part, "train", "val" or "test", of the toy language, Multi30k or a file.

    In the toy language and in a file no German sentence is in two parts.
    """
    if data == "multi30k":
        return multi30k_pairs(part)                                      # its authors made the parts
    if data == "toy":
        pairs = (pair for pair in map(toy_pair, range(1, N_TOY_LINES + 1)) if toy_part(pair[0]) == part)
        n_lines = {"train": None, "val": 500, "test": 2000}[part]        # None: all
        return [*dict.fromkeys(itertools.islice(pairs, n_lines))]        # each sentence once
    pairs = file_pairs(data)
    sentences = sorted({german for german, _ in pairs}, key=lambda german: (zlib.crc32(german.encode()), german))
    n = min(1000, math.ceil(len(sentences) / 20))
    if len(sentences) < 3:
        fail(f"{data} needs at least 3 different German sentences: to train, to validate and to test")
    wanted = set({"test": sentences[:n], "val": sentences[n:2 * n], "train": sentences[2 * n:]}[part])
    return [pair for pair in pairs if pair[0] in wanted]


def line_pair(data, n):
    """The (German, English) pair in line n, from 1, of the toy language, the test set of Multi30k, or a file."""
    pairs = [] if data == "toy" else multi30k_pairs("test") if data == "multi30k" else file_pairs(data)
    n_lines = len(pairs) or N_TOY_LINES
    if not 1 <= n <= n_lines:
        fail(f"argument --line: takes a line from 1 to {n_lines} of {data}, not {n}")
    return pairs[n - 1] if pairs else toy_pair(n)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens: byte-pair encoding
#
# Any text is bytes, so 256 tokens can write everything. Frequent neighbours are then merged into one token, again and
# again (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909): " H" "u" "n" "d" becomes " Hund".

WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s+")      # merges stay within a word; the space before it is part of it
FIRST_BYTE = EOS + 1                            # the tokens: PAD, BOS, EOS, the 256 bytes, one for each merge


class Tokenizer:
    """Text to token numbers and back, without loss for every str. `merges`: pairs of token numbers, in order."""

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: n for n, pair in enumerate(self.merges)}
        self.pieces = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)]                # what each token spells
        for left, right in self.merges:
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self.known = {}                                                  # words that were encoded before

    def encode(self, text):
        """Text -> a list of token numbers."""
        tokens = []
        for word in WORD.findall(text):
            tokens += self.known.get(word) or self.encode_word(word)
        return tokens

    def encode_word(self, word):
        """The tokens of one word: its bytes, merged in the order in which the merges were learned."""
        tokens = word_bytes(word)
        while len(tokens) > 1:
            pair = min(zip(tokens, tokens[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if pair not in self.rank:
                break
            tokens = merge(tokens, pair, FIRST_BYTE + 256 + self.rank[pair])
        self.known[word] = tokens
        return tokens

    def decode(self, tokens):
        """The text that the tokens spell; what is not UTF-8 (a model may produce that) shows as a question mark."""
        spelled = b"".join(self.pieces[token] for token in tokens)
        try:
            return spelled.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return spelled.decode("utf-8", "replace")


def word_bytes(word):
    """One token for each byte."""
    return [FIRST_BYTE + byte for byte in word.encode("utf-8", "surrogatepass")]


def merge(tokens, pair, token):
    """The list `tokens` with `token` in place of every occurrence of `pair`."""
    merged = []
    for t in tokens:
        if merged and (merged[-1], t) == pair:
            merged[-1] = token
        else:
            merged.append(t)
    return merged


def learn_merges(texts, n_merges):
    """The pairs to merge: each time the most frequent pair of neighbours, the first in order among equals.

    Counting all pairs again after each merge would take hours. Instead each distinct word is kept once, with how often
    it occurs; a merge touches only the words that contain the pair, and updates only their counts.
    """
    frequency = collections.Counter(word for text in texts for word in WORD.findall(text))
    words = [(word_bytes(word), n) for word, n in frequency.items()]
    counts, where = collections.Counter(), collections.defaultdict(set)  # of each pair: how often, in which words
    for i, (tokens, n) in enumerate(words):
        for pair in zip(tokens, tokens[1:]):
            counts[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        minus_n, pair = heapq.heappop(heap)     # the smallest: that is why the counts are negative
        if counts[pair] != -minus_n or minus_n > -2:    # an entry that is out of date, or a pair that occurs once
            continue
        token, changed = FIRST_BYTE + 256 + len(merges), set()
        merges.append(pair)
        for i in where.pop(pair):
            old, n = words[i]
            new = merge(old, pair, token)
            words[i] = new, n
            for p in zip(old, old[1:]):
                counts[p] -= n
            for p in zip(new, new[1:]):
                counts[p] += n
                where[p].add(i)
            changed.update(zip(old, old[1:]), zip(new, new[1:]))
        for p in changed:
            heapq.heappush(heap, (-counts[p], p))
    return merges


# ----------------------------------------------------------------------------------------------------------------------
# Training: batches, loss, learning rate


def make_batches(examples, batch_tokens, seed):
    """Endless lists of row numbers: sentences of similar lengths, together about `batch_tokens` tokens with padding.

    An example is two lists of tokens: the source with EOS at its end, and the target between BOS and EOS.
    Rows are sorted by length, so hardly any padding is needed, with some noise, so that no two epochs have the same
    batches. All follows from the seed: a run that was interrupted finds its place again by skipping what it had done.
    """
    for epoch in itertools.count():
        rng = random.Random(seed + epoch)
        order = sorted((int(len(tgt) + 2 * rng.random()), len(src), row) for row, (src, tgt) in enumerate(examples))
        batches, longest = [[]], 0
        for _, _, row in order:
            size = len(examples[row][0]) + len(examples[row][1])
            longest = max(longest, size)
            if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
                batches.append([])
                longest = size
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from batches


def pad(rows, device):
    """Lists of token numbers -> a tensor (B, T), the shorter ones filled up with PAD."""
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], device=device)            # (B, T)


def logits_and_wanted(model, examples, device):
    """The logits (B * T, vocab_size) and the tokens wanted (B * T,): at each place of the target the one after it."""
    src, tgt = (pad(side, device) for side in zip(*examples))            # (B, S), (B, T + 1)
    logits, _ = model(src, tgt[:, :-1], need_weights=False)              # (B, T, vocab_size)
    return logits.float().flatten(0, 1), tgt[:, 1:].flatten()            # (B * T, vocab_size), (B * T,)


def loss_sum(logits, wanted, smoothing=0.0):
    """Cross-entropy summed over the tokens wanted that are not padding.

    With label smoothing the right token shall have probability 1 - smoothing, and all tokens share the rest: that keeps
    a model from being too sure of itself (section 5.4). It learns with 0.1; a loss that is reported has none.
    """
    return F.cross_entropy(logits, wanted, ignore_index=PAD, reduction="sum", label_smoothing=smoothing)


@torch.no_grad()
def validation_losses(model, examples, device):
    """The mean loss of the target tokens of all examples: plain, to report, and smoothed, to choose by.

    A perfect model has learned to say 0.9 when it is sure, so its plain loss is -ln 0.9 = 0.105. One that is surer than
    that has a lower plain loss, though it is worse by what was asked of it.
    """
    examples = sorted(examples, key=lambda example: len(example[1]))     # similar lengths, little padding
    total = torch.zeros(2)
    for i in range(0, len(examples), 64):
        both = logits_and_wanted(model, examples[i:i + 64], device)
        total += torch.stack([loss_sum(*both), loss_sum(*both, smoothing=0.1)]).cpu()                # (2,)
    return (total / sum(len(tgt) - 1 for _, tgt in examples)).tolist()


def learning_rate(step, steps, highest):
    """Rises in a straight line for a tenth of the steps, at most 1,000, then falls along a cosine to zero.

    It begins small because Adam's first averages rest on too few gradients to be trusted.
    """
    rising = max(1, min(steps // 10, 1000))
    if step < rising:
        return highest * (step + 1) / rising
    return highest * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


@torch.no_grad()
def translate(model, tokenizer, sentences, beam=1, report=None):
    """The translations of a list of strings, in batches; `report(n)` is called when n are done."""
    device = model.token_embedding.weight.device
    sources = [tokenizer.encode(sentence) + [EOS] for sentence in sentences]
    order = sorted(range(len(sources)), key=lambda row: len(sources[row]))   # similar lengths end at similar times
    translations = [""] * len(sources)
    for i in range(0, len(order), 64):
        rows = order[i:i + 64]
        produced = beam_search(model, pad([sources[row] for row in rows], device), beam)
        for row, produced_tokens in zip(rows, produced.tolist()):
            translations[row] = tokenizer.decode(produced_tokens)
        if report:
            report(i + len(rows))
    return translations


def beam_search(model, src, beam, length_penalty=1.0):
    """The best translation found of each sentence of src (B, S): tokens (B, T) up to EOS, then PAD.

    For each sentence the `beam` best beginnings are kept, and each step tries every token after each of them; with 1 it
    always takes the most probable token (greedy). Beginnings are ranked by log probability / length ** length_penalty,
    since a plain sum of logarithms would favour the short. One that has ended stays in the race as it is. Keys and
    values are kept too, so a step costs one token.
    """
    B, K = len(src), beam
    keys_and_values, src_mask = model.encode(src)
    encoded = ([[t.repeat_interleave(K, dim=0) for t in both] for both in keys_and_values],  # (B * K, H, S, d_k)
               src_mask.repeat_interleave(K, dim=0))                     # (B * K, 1, 1, S)
    tokens, past = torch.full((B * K, 1), BOS, device=src.device), None                # (B * K, 1)
    total = torch.tensor([0.0] + [-math.inf] * (K - 1), device=src.device).repeat(B, 1)  # (B, K) all alike: count one
    length, ended = torch.zeros_like(total), torch.zeros_like(total, dtype=torch.bool)   # (B, K) each
    first_row = K * torch.arange(B, device=src.device).unsqueeze(1)      # (B, 1) where the K rows of a sentence begin
    while tokens.shape[1] < model.max_len and not ended.all():
        logits, _, past = model.decode(tokens[:, -1:], encoded, past, need_weights=False)
        gain = logits.log_softmax(dim=-1).view(B, K, -1)                 # (B, K, vocab_size)
        gain[..., PAD] = -math.inf              # a translation that goes on is not padded
        gain[ended] = -math.inf                 # after its end a translation can only be padded, which costs nothing
        gain[..., PAD][ended] = 0.0
        length = length + ~ended                                         # (B, K)
        new_total = total.unsqueeze(-1) + gain                           # (B, K, vocab_size)
        best = (new_total / length.unsqueeze(-1) ** length_penalty).flatten(1).topk(K).indices          # (B, K)
        origin, token = best // gain.shape[-1], best % gain.shape[-1]    # (B, K) which beginning, and what follows it
        total, length = new_total.flatten(1).gather(1, best), length.gather(1, origin)   # (B, K) each
        ended = ended.gather(1, origin) | (token == EOS)                 # (B, K)
        rows = (first_row + origin).flatten()                            # (B * K,)
        tokens = torch.cat([tokens[rows], token.view(-1, 1)], dim=1)     # (B * K, 1 + T)
        if K > 1:
            past = [[t[rows] for t in both] for both in past]            # each row goes on with its beginning's keys
    return tokens.view(B, K, -1)[:, 0, 1:]                               # (B, T)


# ----------------------------------------------------------------------------------------------------------------------
# BLEU


def bleu_words(text):
    """The words and signs that BLEU compares, cut as by mteval-v13a, the standard script."""
    for entity, sign in (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"),
                         ("&gt;", ">")):
        text = text.replace(entity, sign)
    text = re.sub(r"([!-&(-+/:-@[-`{-~])", r" \1 ", f" {text} ")         # signs other than ' , - . stand alone
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)                    # . and , unless a digit stands before
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)                    # and one after
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()                # a - after a digit


def bleu(translations, references):
    """BLEU (Papineni et al. 2002) of a list of strings against one reference each, from 0 to 100.

    Of all runs of 1, 2, 3 and 4 words in the translations, which share also occurs in the reference? The geometric mean
    of the four shares, made smaller if the translations are too short.
    """
    correct, total, n_words, n_reference_words = [0] * 4, [0] * 4, 0, 0  # the first two: for runs of 1 to 4 words
    for translation, reference in zip(translations, references):
        words, reference_words = bleu_words(translation), bleu_words(reference)
        n_words, n_reference_words = n_words + len(words), n_reference_words + len(reference_words)
        for n in range(1, 5):
            ours, theirs = (collections.Counter(zip(*[w[i:] for i in range(n)])) for w in (words, reference_words))
            correct[n - 1] += (ours & theirs).total()
            total[n - 1] += ours.total()
    if not correct[0] or not total[3]:
        return 0.0
    log_precision, zeros = 0.0, 0
    for right, all_of_them in zip(correct, total):
        zeros += right == 0                     # exponential smoothing: count the first zero as 1/2, the next as 1/4
        log_precision += math.log((right or 0.5 ** zeros) / all_of_them) / 4
    return 100 * math.exp(log_precision + min(0.0, 1 - n_reference_words / n_words))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@torch.no_grad()
def plot_cross_attention(model, tokenizer, sentence, beam, path, show):
    """One heatmap for each head of the last block's cross-attention while `sentence` is translated.

    Row t is what the model looked at when it produced token t, and that token is the row's label.
    """
    src = pad([tokenizer.encode(sentence) + [EOS]], model.token_embedding.weight.device)                # (1, S)
    produced = beam_search(model, src, beam)                             # (1, T) and perhaps padding
    produced = produced[:, produced[0] != PAD]                           # (1, T)
    _, weights = model(src, F.pad(produced, (1, 0), value=BOS)[:, :-1])  # (1, H, T, S)
    x_labels, y_labels = ([token_label(tokenizer, token) for token in row.tolist()] for row in (src[0], produced[0]))
    plot_attention(weights[0], x_labels, y_labels, path, x_name="source token", y_name="token produced", show=show)


def token_label(tokenizer, token):
    """A token as a label: the space that begins a word as _, what has no letter in common fonts by its number."""
    text = "<eos>" if token == EOS else tokenizer.pieces[token].decode("utf-8", "backslashreplace").replace(" ", "_")
    return "".join(c if c.isprintable() and ord(c) < 0x250 else ascii(c)[1:-1] for c in text)


# ----------------------------------------------------------------------------------------------------------------------
# Command line: translating with weights that are there


def standard_input():
    """The lines of standard input; bytes that are not UTF-8 become lone surrogates, which the tokenizer takes too."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "surrogateescape").rstrip("\r\n")


def weights_path(data, out_dir):
    """Where the weights for `data` are: in `out_dir`, or else where the shipped ones are."""
    name = f"translate_{os.path.basename(data)}.pt"
    for folder in (out_dir, os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")):
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    fail(f"there are no weights for {data}: train them with python translate.py --data {data} --out_dir {out_dir}")


def load_translator(path, device):
    """The model, ready to translate, and the tokenizer that are saved in `path`."""
    saved = load(path)
    try:
        tokenizer, model = Tokenizer(saved["merges"]), TransformerModel(*saved["sizes"], dropout=0.0)
        model.load_state_dict(saved["weights"])                          # stored as float16, used as float32
        if len(tokenizer.pieces) != len(model.token_embedding.weight):
            raise ValueError("tokenizer and model do not belong together")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        fail(f"{path} does not hold weights of translate.py")
    return model.to(device).eval(), tokenizer


def fitting(tokenizer, pairs, max_len):
    """Those of the pairs that fit into `max_len` tokens; says how many do not."""
    kept = [pair for pair in pairs if max(len(tokenizer.encode(text)) for text in pair) < max_len]
    if len(kept) < len(pairs):
        print(f"left out: {len(pairs) - len(kept)} pairs with a sentence of more than {max_len - 1} tokens")
    return kept or fail("no pair is left")


def score(model, tokenizer, pairs, beam):
    """Translate all pairs: the share that equals the reference word for word, and BLEU."""
    german, english = zip(*fitting(tokenizer, pairs, model.max_len))
    translations = translate(model, tokenizer, german, beam, progress(len(german), unit="sentence"))
    return {"exact": sum(map(str.__eq__, translations, english)) / len(english), "bleu": bleu(translations, english)}


def use(args):
    """Do what --text, --line and --test ask for."""
    if args.line is not None:
        german, english = line_pair(args.data, args.line)
    model, tokenizer = load_translator(weights_path(args.data, args.out_dir), args.device)

    def show(sentence, n):
        """Print the translation of the n-th sentence, and draw it if --plot is given."""
        length = len(tokenizer.encode(sentence))
        if length >= model.max_len:
            fail(f"a text may have {model.max_len - 1} tokens, this one has {length}: {sentence[:40]!r}...")
        print(translate(model, tokenizer, [sentence], args.beam)[0], flush=True)
        if args.plot:
            path = os.path.join(args.out_dir, f"translate_{os.path.basename(args.data)}{f'_{n}' if n > 1 else ''}.png")
            plot_cross_attention(model, tokenizer, sentence, args.beam, path, args.show)

    if args.text:
        sentences = itertools.chain.from_iterable(standard_input() if text == "-" else [text] for text in args.text)
        for n, sentence in enumerate(sentences, 1):
            show(sentence, n)
    elif args.line is not None:
        print(f"source:      {german}\nreference:   {english}\ntranslation: ", end="")
        show(german, 1)
    else:
        print_result(args, **score(model, tokenizer, load_pairs(args.data, "test"), args.beam),
                     params=sum(p.numel() for p in model.parameters()))


# ----------------------------------------------------------------------------------------------------------------------
# Command line: training

MAX_LEN = 100  # positions: a sentence may have one token less
OPTIONS = {    # of training: type, range, value for the toy language, value for real sentences
    "steps": (int, 1, 10 ** 7, 500, 9000, "training steps"),
    "batch_tokens": (int, 1, 100000, 4000, 4000, "tokens in each step, both languages"),
    "lr": (float, 0, 10, 0.003, 0.0015, "highest learning rate"),
    "dropout": (float, 0, 0.9, 0.0, 0.25, "share of features that is dropped"),
    "d_model": (int, 1, 1024, 64, 192, "width of the model"),
    "n_heads": (int, 1, 64, 4, 4, "heads in each attention"),
    "n_enc_layers": (int, 1, 16, 2, 3, "encoder blocks"),
    "n_dec_layers": (int, 1, 16, 2, 3, "decoder blocks"),
    "merges": (int, 0, 50000, 600, 4000, "merges that the tokenizer learns")}


def join_processes(device):
    """Under torchrun: join the other processes. Returns the number of this one, from 0, and how many there are."""
    if "RANK" not in os.environ:
        return 0, 1
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    if distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")      # the first one speaks for all
    return distributed.get_rank(), distributed.get_world_size()


def train(args):
    """Train a translator, or go on with a training, and score it on the validation part."""
    rank, world = join_processes(args.device)
    best_path, last_path = (os.path.join(args.out_dir, f"translate_{os.path.basename(args.data)}{end}.pt")
                            for end in ("", "_last"))
    saved = load(last_path) if args.resume else None
    if args.resume and not (isinstance(saved, dict) and isinstance(saved.get("settings"), dict)):
        fail(f"{last_path} is no checkpoint of translate.py")
    train_pairs, val_pairs = load_pairs(args.data, "train"), load_pairs(args.data, "val")
    settings = {"data": f"{args.data} (checksum {zlib.crc32(repr(train_pairs).encode())})",
                **{name: getattr(args, name) for name in (*OPTIONS, "seed")}}
    for name, value in settings.items() if saved else ():
        if saved["settings"].get(name) != value:
            fail(f"argument --resume: {last_path} was made with --{name} {saved['settings'].get(name)}, not {value}")
    tokenizer = Tokenizer(saved["merges"] if saved else learn_merges(itertools.chain(*train_pairs), args.merges))
    train_pairs, val_pairs = (fitting(tokenizer, pairs, MAX_LEN) for pairs in (train_pairs, val_pairs))
    examples, val_examples = ([[tokenizer.encode(german) + [EOS], [BOS, *tokenizer.encode(english), EOS]]
                               for german, english in pairs] for pairs in (train_pairs, val_pairs))

    # `average` is a running mean of the model's weights over about the last tenth of the steps so far, at most 1,000.
    # It is validated and kept: the weights jump around a good place, and their mean is closer to it than they are.
    sizes = len(tokenizer.pieces), MAX_LEN, args.d_model, args.n_heads, args.n_enc_layers, args.n_dec_layers
    model = TransformerModel(*sizes, args.dropout).to(args.device)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    params = sum(p.numel() for p in model.parameters())
    print(f"{params:,} parameters, {len(examples):,} pairs to train on, {len(val_examples):,} to validate")
    first, best = 0, math.inf
    if saved:
        for part, state in ((model, "model"), (average, "average"), (optimizer, "optimizer")):
            part.load_state_dict(saved[state])
        first, best = saved["step"], saved["best"]
        print(f"going on after step {first}")
    else:
        print_first_loss(validation_losses(average, val_examples, args.device)[0], len(tokenizer.pieces))

    model.train()
    learner = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    batches = itertools.islice(make_batches(examples, args.batch_tokens, args.seed), first, None)
    report = progress(args.steps, done=first)
    for step in range(first, args.steps):
        torch.manual_seed(args.seed + step * world + rank)               # what dropout draws depends on the step alone
        rows = next(batches)
        mine = [examples[row] for row in rows[rank::world]]              # each process takes its share of the batch
        n_targets = sum(len(examples[row][1]) - 1 for row in rows)       # in the whole batch
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            # DistributedDataParallel waits for every process, so also one without a share has to take an example.
            logits, wanted = logits_and_wanted(learner, mine or [examples[rows[0]]], args.device)
        loss = loss_sum(logits, wanted, smoothing=0.1) / n_targets * bool(mine)           # my part of the batch's mean
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.zero_grad()
        (loss * world).backward()                                        # DDP divides by world; here it must not
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        check_finite([loss, *model.parameters()], step + 1)
        with torch.no_grad():
            plain_loss = loss_sum(logits, wanted) / (wanted != PAD).sum()
            for mean, p in zip(average.parameters(), model.parameters()):
                mean.lerp_(p, 1 - min(0.999, (1 + step) / (10 + step)))
        report(step + 1, loss=plain_loss.item())
        if rank == 0 and ((step + 1) % max(1, args.steps // 20) == 0 or step + 1 == args.steps):
            val_loss, smoothed_loss = validation_losses(average, val_examples, args.device)
            german, english = val_pairs[step % len(val_pairs)]
            print(f"after step {step + 1}: validation loss {val_loss:.4f}\n    {german}\n    "
                  f"{translate(average, tokenizer, [german])[0]}", flush=True)
            if smoothed_loss < best:
                best, weights = smoothed_loss, {name: t.half() for name, t in average.state_dict().items()}
                save_weights(best_path, sizes=sizes, merges=tokenizer.merges, weights=weights)
            save_weights(last_path, settings=settings, merges=tokenizer.merges, step=step + 1, best=best,
                         model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict())
    if world > 1:
        distributed.destroy_process_group()
    if rank == 0:
        print(f"saved: {best_path} (the weights with the lowest smoothed validation loss, {best:.4f})")
        model, tokenizer = load_translator(best_path, args.device)
        print_result(args, **score(model, tokenizer, val_pairs, args.beam), params=params)


def main(argv=None):
    """Train a translator (or go on with a training), or use one."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="auto", help="toy, multi30k, or a file with English, tab, German in each "
                        "line (weights go by its name); auto is multi30k with --text, else toy")
    for name, (kind, low, high, toy, real, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=number(kind, low, high), default=toy,
                            help=f"{meaning}; {real} if --data is not toy")
    parser.add_argument("--resume", action="store_true", help="go on with the training saved in --out_dir")
    parser.add_argument("--test", action="store_true", help="do not train: score the test part")
    parser.add_argument("--line", type=int, help="do not train: translate this line of the data, counted from 1")
    parser.add_argument("--text", nargs="+", help="do not train: translate these texts; - stands for the lines of "
                        "standard input")
    parser.add_argument("--plot", action="store_true", help="draw the cross-attention of --line or --text")
    parser.add_argument("--beam", type=number(int, 1, 100), default=5, help="beginnings kept while translating")
    given = parser.parse_known_args(argv)[0]    # a first look at --data and --text: other defaults depend on them
    data = given.data if given.data != "auto" else "multi30k" if given.text else "toy"
    if data != "toy":
        parser.set_defaults(**{name: real for name, (_, _, _, _, real, _) in OPTIONS.items()})
    args = start(parser, argv)
    args.data = data
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")     # a text may hold what the terminal's encoding does not
    if args.plot and not args.text and args.line is None:
        fail("argument --plot: needs a --line or a --text to draw")
    if args.text and (args.test or args.line is not None):
        fail("argument --text: goes without --test and --line")
    if args.resume and (args.text or args.test or args.line is not None):
        fail("argument --resume: goes without --text, --test and --line, which do not train")
    if args.d_model % args.n_heads:
        fail(f"argument --n_heads: {args.n_heads} heads do not divide --d_model {args.d_model}")
    if args.text or args.test or args.line is not None:
        use(args)
    else:
        train(args)


if __name__ == "__main__":
    run(main)
