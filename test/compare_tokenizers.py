#!/usr/bin/env python3
"""Compare kne's tokenizer with the tokenizers library, line by line.

    python3 test/compare_tokenizers.py build/test_tokenizer FILE... [--lines N] [--seed S]

Needs the `tokenizers` package. Each FILE is a tokenizer.json. The texts are made
from a seed: mixed scripts, emoji, runs of white space, code, odd characters,
texts of special tokens; then ids at random are decoded by both. The exit status
is 1 if anything differs. Characters assigned after Unicode 14 are left out: the
two sides carry different versions of the Unicode tables.
"""
import argparse
import random
import subprocess
import sys
import unicodedata

from tokenizers import Tokenizer

WORDS = """the of and to in is was that for it with as his on be at by had not are but from or have an
they which one you were all her she there would their we him been has when who will no more if out so
said what up its about than into them can only other time new some could these two may first then do
Paris France capital Straße naïve façade Ångström İstanbul DŽungla ﬁne ﬆop ŉ don't I'll we've they're
it's IT'S I'D O'Neill rock'n'roll 'tis ſ'ſ K'K e-mail C++ C# 3.14 1,000,000 0x7F 12345678901234567890
२०२६ ٣٤٥ Ⅷ ½ ² ③ 万 日本語 東京都 こんにちは カタカナ ﾊﾝｶｸ 한국어 조선말 русский Ёж ёлка украї́нська
ελληνικά ΜΈΓΑΣ עִבְרִית العَرَبِيَّة हिन्दी क्षत्रिय தமிழ் ไทยไม่มีวรรค ភាសាខ្មែរ မြန်မာ ქართული
Հայերեն አማርኛ ᏣᎳᎩ ᚠᚢᚦ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 Việt Nam tiếng Việt e\u0301 n\u0303 A\u030a \u1100\u1161\u11a8
q\u0307\u0323 \u0344 \u2126 \u212b \uf900 \u0958 \ufb1d""".split()
EMOJI = "😀 🤷🏽‍♀️ 👨‍👩‍👧‍👦 🇫🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ✅ ❤️ 🦙 🚀 😶‍🌫️ ☃ ™ ㊗️ 1️⃣".split()
SPACES = [" ", "  ", "   ", " " * 8, "\t", "\t\t", "\n", "\n\n", "\r\n", "\n\r", "\r", " \n", "\n ",
          "\u00a0", "\u2003", "\u3000", "\u200b", "\u200d", "\u2028", "\x0b", "\x0c", "\x85", "\u180e",
          "\u1680", "\u202f", "\ufeff", " \u00a0 ", "\n   \n", "▁", " ▁", "▁▁"]
CODE = ["def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; i++) {\n\ta[i] = b[i] & 0xFF;\n}\n",
        "SELECT * FROM t WHERE a <> 'b''c';", "<div class=\"x\">&nbsp;</div>", "#include <stdio.h>\n",
        "if __name__ == \"__main__\":", "a->b::c[0]/*d*/", "printf(\"%d\\n\", x);", "```python\n```",
        "https://example.org/a?b=c&d=%20#e", "user@example.org", "\\frac{1}{2}", "$x_i^2$", "----====",
        "...", "!!!???", "((()))", "«»", "“quoted”", "‘’", "…", "—–-", "a\x00b", "\x01\x1f\x7f"]
PUNCT = list(".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`") + ["'s", "'S", "'ll", "'re", "’s"]


def odd_char(rng):
    while True:
        c = chr(rng.choice([rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x10000),
                            rng.randrange(0x110000), rng.randrange(0x2000, 0x3100)]))
        if not 0xD800 <= ord(c) < 0xE000 and old(c):
            return c


# Blocks and characters added in Unicode 15 and later, as far as this Python knows them.
NEW = [(0xCF3, 0xCF3), (0xECE, 0xECE), (0x10EFD, 0x10EFF), (0x1123F, 0x11241), (0x11B00, 0x11B09),
       (0x11F00, 0x11F59), (0x1342F, 0x1345F), (0x1B132, 0x1B132), (0x1B155, 0x1B155),
       (0x1D2C0, 0x1D2D3), (0x1DF25, 0x1DF2A), (0x1E030, 0x1E08F), (0x1E4D0, 0x1E4F9),
       (0x1F6DC, 0x1F6DC), (0x1F774, 0x1F776), (0x1F77B, 0x1F77F), (0x1F7D9, 0x1F7D9),
       (0x1FA75, 0x1FA77), (0x1FA87, 0x1FA88), (0x1FAAD, 0x1FAAF), (0x1FABB, 0x1FABD),
       (0x1FABF, 0x1FABF), (0x1FACE, 0x1FACF), (0x1FADA, 0x1FADB), (0x1FAE8, 0x1FAE8),
       (0x1FAF7, 0x1FAF8), (0x31350, 0x323AF), (0x2EBF0, 0x2EE5D), (0x2FFC, 0x2FFF)]


def old(c):
    return unicodedata.category(c) != "Cn" and not any(a <= ord(c) <= b for a, b in NEW)


def text(rng, special):
    out = []
    for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 30])):
        kind = rng.randrange(100)
        if kind < 45:
            w = rng.choice(WORDS)
            out.append(rng.choice([w, w, w, w.upper(), w.title(), w + rng.choice(WORDS)]))
        elif kind < 55:
            out.append(rng.choice(PUNCT) * rng.choice([1, 1, 1, 2, 5]))
        elif kind < 62:
            out.append(rng.choice(EMOJI))
        elif kind < 74:
            out.append(rng.choice(SPACES) * rng.choice([1, 1, 2, 3, 17]))
        elif kind < 82:
            out.append(rng.choice(CODE))
        elif kind < 90:
            out.append("".join(odd_char(rng) for _ in range(rng.choice([1, 1, 2, 4]))))
        elif kind < 94:
            out.append(str(rng.randrange(10 ** rng.choice([1, 3, 7, 20]))))
        elif kind < 96:
            out.append(rng.choice("abzé的") * rng.choice([2, 10, 100, 300]))
        elif special:
            s = rng.choice(special)
            out.append(rng.choice([s, s, s[:-1], s[1:], s + s, " " + s + " ", "<" + s]))
        if rng.random() < 0.6:
            out.append(" ")
    return "".join(out)


def records(data):
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        n = int(data[at:end])
        yield data[end + 1:end + 1 + n]
        at = end + n + 2


def compare(binary, path, lines, seed):
    rng = random.Random(seed)
    tok = Tokenizer.from_file(path)
    tok.no_truncation()
    tok.no_padding()
    special = [t.content for t in tok.get_added_tokens_decoder().values()]
    texts = [text(rng, special) for _ in range(lines)]
    want = [e.ids for e in tok.encode_batch_fast(texts)]
    data = b"".join(b"%d\n%s\n" % (len(b), b) for b in (t.encode() for t in texts))
    out = subprocess.run([binary, "--encode", path], input=data, stdout=subprocess.PIPE, check=True)
    got = out.stdout.decode().split("\n")[:-1]
    bad = 0
    for t, w, g in zip(texts, want, got, strict=True):
        if " ".join(map(str, w)) != g:
            bad += 1
            if bad <= 5:
                print(f"encode {t!r}\n  library {w}\n  kne     {g}")

    have = sorted(tok.get_vocab().values())
    lists = want + [[rng.choice(have) for _ in range(rng.choice([1, 2, 5, 20]))]
                    for _ in range(lines)]
    data = b"".join(b"%s\n" % " ".join(map(str, ids)).encode() for ids in lists)
    out = subprocess.run([binary, "--decode", path], input=data, stdout=subprocess.PIPE, check=True)
    got = list(records(out.stdout))
    for i, ids in enumerate(lists):
        for skip in (False, True):
            w = tok.decode(ids, skip_special_tokens=skip)
            if got[2 * i + skip] != w.encode():
                bad += 1
                if bad <= 5:
                    print(f"decode {ids} skip={skip}\n  library {w!r}\n  kne     {got[2 * i + skip]!r}")
    print(f"{path}: {lines} texts, {len(lists)} lists of ids, {bad} differ")
    return bad


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("binary")
    ap.add_argument("files", nargs="+")
    ap.add_argument("--lines", type=int, default=20000)
    ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args()
    return any([compare(a.binary, f, a.lines, a.seed) for f in a.files])


if __name__ == "__main__":
    sys.exit(main())
