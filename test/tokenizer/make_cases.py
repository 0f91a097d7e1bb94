#!/usr/bin/env python3
"""Make cases.json: small tokenizers, one for each component and option that
kne implements, with what the tokenizers library makes of a few texts.

    python3 test/tokenizer/make_cases.py > test/tokenizer/cases.json

A case names a model from "models" and gives the other parts of a
tokenizer.json. For each text: ids with special tokens, ids without, and both
decoded (special tokens kept, left out).
"""
import json
import sys

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

ASCII = [chr(c) for c in range(32, 127)]
MERGES = ["h e", "l l", "he ll", "hell o", "w o", "r l", "wo rl", "worl d", "▁ hello", "▁ world",
          "▁ ▁", "1 2", "a b", "ab c", "b c", "abc ab", "! !", "' s", "é t"]


def model(alphabet, merges, extra=(), **options):
    vocab = {}
    for t in list(extra) + sorted(alphabet):
        vocab.setdefault(t, len(vocab))
    for m in merges:
        vocab.setdefault("".join(m) if isinstance(m, list) else m.replace(" ", ""), len(vocab))
    return {"type": "BPE", "vocab": vocab, "merges": merges, **options}


BYTES = [f"<0x{b:02X}>" for b in range(256)]
LEVEL = ["Ġ h", "Ġ w", "h e", "l l", "he ll", "hell o", "Ġ hello", "w o", "r l", "wo rl", "worl d",
         "Ġ world", "Ġ Ġ", "1 2", "Ã ©"]
MODELS = {
    "chars": model(ASCII + list("▁éétüßıi\u0301ö日本ﬁ①Éİǆ\n\t\u00a0"), MERGES, ["<unk>"],
                   unk_token="<unk>"),
    "fused": model(list("abcdehlorw ▁"), MERGES[:9], ["<unk>"], unk_token="<unk>", fuse_unk=True),
    "no_unk": model(list("abcdehlorw ▁"), MERGES[:9]),
    "fallback": model(list("abcdehlorw ▁"), MERGES[:9] + ["<0xC3> <0xA9>"], ["<unk>"] + BYTES,
                      unk_token="<unk>", byte_fallback=True, fuse_unk=True),
    "some_fallback": model(list("abcdehlorw ▁"), MERGES[:9], ["<unk>"] + BYTES[:0xC4],
                           unk_token="<unk>", byte_fallback=True, fuse_unk=False),
    "bytes": model(ByteLevel.alphabet(), LEVEL),
    "bytes_ignore": model(ByteLevel.alphabet(), [m.split(" ") for m in LEVEL], ["Ġtogether"],
                          ignore_merges=True),
    "bytes_lacking": model([c for c in ByteLevel.alphabet() if c not in "xzĊ"], LEVEL,
                           ["<unk>"], unk_token="<unk>"),
    "alphabet": model(list("abc"), [["a", "b"], ["b", "c"], ["ab", "c"], ["c", "ab"]], ["<unk>"],
                      unk_token="<unk>", dropout=None, continuing_subword_prefix="",
                      end_of_word_suffix=""),
}
TEXTS = ["hello world", "  Hello,  world!! ", "abc12 3abcabc\n\tIt's été E\u0301 №①ﬁ", "日本 ▁x▁▁y\u00a0é"]
EMPTY = ["", " "]


def added(id_, content, **flags):
    base = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    return dict(id=id_, content=content, **{**base, **flags})


def seq(key, *parts):
    return {"type": "Sequence", key: list(parts)}


def n_vocab(name):
    return len(MODELS[name]["vocab"])


def cases():
    def case(name, model_, texts=TEXTS, **parts):
        yield name, model_, texts, parts

    for m in MODELS:
        yield from case(f"model {m}", m, ["abcabcab", "hello hexllo", "zz\u00e9zz\u00e9"],
                        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}
                        if m.startswith("bytes") else None)
    for form in "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents":
        yield from case(form, "chars", ["hello E\u0301té Éİ", "ﬁ①\u00a0ö\u0308 ǅ"],
                        normalizer={"type": form})
    yield from case("normalizer ByteLevel", "bytes", TEXTS[1:3], normalizer={"type": "ByteLevel"})
    yield from case("Prepend", "chars", TEXTS[:2] + EMPTY, normalizer={"type": "Prepend", "prepend": "▁"})
    for left in False, True:
        for right in False, True:
            yield from case(f"Strip {left} {right}", "chars", [TEXTS[1], " \u2003\t", "a"],
                            normalizer={"type": "Strip", "strip_left": left, "strip_right": right})
    yield from case("Replace String", "chars", TEXTS, normalizer={
        "type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    yield from case("Replace Regex", "chars", TEXTS, normalizer={
        "type": "Replace", "pattern": {"Regex": "\\s+|[bl]"}, "content": "_"})
    yield from case("Replace by nothing", "chars", TEXTS[:2], normalizer={
        "type": "Replace", "pattern": {"Regex": "^ +|l"}, "content": ""})
    yield from case("Replace empty matches", "chars", ["abxb", "été", "bb"], normalizer={
        "type": "Replace", "pattern": {"Regex": "x*"}, "content": "-"})
    yield from case("normalizers", "chars", TEXTS[1:], normalizer=seq(
        "normalizers", {"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
        seq("normalizers", {"type": "Strip", "strip_left": True, "strip_right": False}),
        {"type": "Prepend", "prepend": "▁"}))

    for space in False, True:
        for regex in False, True:
            yield from case(f"ByteLevel {space} {regex}", "bytes", TEXTS + EMPTY, pre_tokenizer={
                "type": "ByteLevel", "add_prefix_space": space, "use_regex": regex})
    for how in "Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous":
        for invert in False, True:
            yield from case(f"Split {how} {invert}", "chars", TEXTS[1:3], pre_tokenizer={
                "type": "Split", "pattern": {"Regex": "\\s|[bl!]"}, "behavior": how, "invert": invert})
            yield from case(f"Split String {how} {invert}", "chars", ["ababcabb", "bab"], pre_tokenizer={
                "type": "Split", "pattern": {"String": "ab"}, "behavior": how, "invert": invert})
        yield from case(f"Split empty {how}", "chars", ["abxxba"], pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "x*"}, "behavior": how, "invert": False})
        yield from case(f"Punctuation {how}", "chars", [TEXTS[1], "a!!'s «b» $"], pre_tokenizer={
            "type": "Punctuation", "behavior": how})
    for one in False, True:
        yield from case(f"Digits {one}", "chars", ["12ab121 ①2Ⅷ½"], pre_tokenizer={
            "type": "Digits", "individual_digits": one})
    for kind in "Whitespace", "WhitespaceSplit":
        yield from case(kind, "chars", TEXTS[1:] + ["a\u200db_c\u0301 Ⓐ!\u180e?"],
                        pre_tokenizer={"type": kind})
    for scheme in "always", "first", "never":
        for split in False, True:
            meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
            yield from case(f"Metaspace {scheme} {split}", "chars",
                            [TEXTS[0], TEXTS[1], "▁hello<s>hello <s> world", "<s>hello"] + EMPTY,
                            pre_tokenizer=meta, decoder=meta, added_tokens=[
                                added(n_vocab("chars"), "<s>", special=True)])
    yield from case("Metaspace old", "chars", TEXTS[:2], pre_tokenizer={
        "type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "str_rep": "▁"})
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
    for norm in ({"type": "Strip", "strip_left": True, "strip_right": True},
                 {"type": "Replace", "pattern": {"String": "he"}, "content": "a"},
                 {"type": "Replace", "pattern": {"String": "h"}, "content": "a"},
                 {"type": "StripAccents"}, {"type": "NFKC"}):
        yield from case(f"first after {norm['type']}", "chars", [" hello", "hello", "\u0301a", "ﬁa"],
                        normalizer=norm, pre_tokenizer=first)
    yield from case("first after Split", "chars", ["ab hello", "12 hello"], pre_tokenizer=seq(
        "pretokenizers", {"type": "Split", "pattern": {"String": "12"}, "behavior": "Removed",
                          "invert": False}, first))
    yield from case("pre-tokenizers", "bytes", TEXTS, pre_tokenizer=seq(
        "pretokenizers", {"type": "WhitespaceSplit"}, {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False}))
    yield from case("ByteLevel in the middle", "bytes", TEXTS, pre_tokenizer=seq(
        "pretokenizers", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        {"type": "Split", "pattern": {"Regex": "Ġ|l+"}, "behavior": "Isolated", "invert": False}))

    n = n_vocab("chars")
    flags = {"plain": {}, "lstrip": {"lstrip": True}, "rstrip": {"rstrip": True},
             "both": {"lstrip": True, "rstrip": True}, "word": {"single_word": True},
             "special": {"special": True}}
    for name, f in flags.items():
        yield from case(f"added {name}", "chars",
                        ["a  [X]  b[X]", "[X]\u3000[X] [XY]", "_[X]é [X]", "[X"], added_tokens=[
                            added(n, "[X]", **f), added(n + 1, "[XY]"), added(n + 2, "Y]")])
    yield from case("added normalized", "chars", ["HELLO Yes YES yes[B]", "yesyes [b] Yesx"],
                    normalizer={"type": "Lowercase"}, added_tokens=[
                        added(n, "Yes", normalized=True), added(n + 1, "[B]"),
                        added(n + 2, "YESX", normalized=True, special=True)])
    yield from case("added overlapping spaces", "chars", ["a[X]  b", "[X] [X]\n"], added_tokens=[
        added(n, "[X]", rstrip=True),
        added(MODELS["chars"]["vocab"][" "], " ", lstrip=True)])
    yield from case("added of the vocabulary", "chars", ["hello hell", "<unk>"], added_tokens=[
        added(MODELS["chars"]["vocab"]["hell"], "hell"), added(0, "<unk>", special=True)])

    def template(*pieces, **tokens):
        return {"type": "TemplateProcessing", "single": [
            {"Sequence": {"id": "A", "type_id": 0}} if p == "$A" else
            {"SpecialToken": {"id": p, "type_id": 0}} for p in pieces],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {k: {"id": k, "ids": v, "tokens": [k] * len(v)} for k, v in tokens.items()}}

    eos = [added(n, "<s>", special=True), added(n + 1, "</s>", special=True)]
    for name, post in {
            "Template": template("<s>", "$A", "</s>", **{"<s>": [n], "</s>": [n + 1]}),
            "Template of two ids": template("x", "$A", x=[n, n + 1]),
            "Template after ByteLevel": seq(
                "processors", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
                template("<s>", "$A", **{"<s>": [n]})),
            "post-processor ByteLevel": {"type": "ByteLevel"}}.items():
        yield from case(name, "chars", ["hello", "", "<s>hello</s>"], post_processor=post,
                        added_tokens=eos)

    fallback = seq("decoders", {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                   {"type": "ByteFallback"}, {"type": "Fuse"},
                   {"type": "Strip", "content": " ", "start": 1, "stop": 0})
    yield from case("decoder of Llama", "fallback", TEXTS + ["\u00e9\U0001f999 \u20ac"], decoder=fallback,
                    normalizer=seq("normalizers", {"type": "Prepend", "prepend": "▁"}, {
                        "type": "Replace", "pattern": {"String": " "}, "content": "▁"}))
    yield from case("decoder ByteFallback", "some_fallback", TEXTS[2:], decoder={"type": "ByteFallback"})
    yield from case("decoder ByteLevel", "bytes", TEXTS, decoder={"type": "ByteLevel"},
                    pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False})
    yield from case("decoder ByteLevel, other characters", "chars", TEXTS[1:], decoder={"type": "ByteLevel"})
    yield from case("decoder Replace", "chars", TEXTS[1:], decoder={
        "type": "Replace", "pattern": {"Regex": "[a-l]|\\s"}, "content": "<>"})
    yield from case("decoder Strip", "chars", ["abc  abc", "lla"], decoder={
        "type": "Strip", "content": "l", "start": 2, "stop": 0})
    yield from case("decoder Strip both", "chars", ["hello abc", "hell"], decoder=seq(
        "decoders", {"type": "Fuse"}, {"type": "Strip", "content": "l", "start": 1, "stop": 1}))
    yield from case("regexes", "chars", TEXTS[1:] + ["aaaa1234567ab", "Kk ſs\u180e ab"],
                    pre_tokenizer={"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {
                        "Regex": "(?i:'s|k)|[^(\\s|[.!b\\]]l)a-k ]{3}|\\p{Han}+|[\\u0061-c]{,2}|\\p{N}{1,3}+|(?<= )\\w(?!l)|\\s+$|[^\\s\\w]+"}})


def complete(part):
    """The library insists on fields that matter for offsets only."""
    if isinstance(part, list):
        return [complete(p) for p in part]
    if isinstance(part, dict):
        part = {k: complete(v) for k, v in part.items()}
        if part.get("type") == "ByteLevel":
            part = {"add_prefix_space": True, "trim_offsets": True, **part}
    return part


def main():
    out = []
    for name, model_, texts, parts in cases():
        parts = {k: complete(v) for k, v in parts.items() if v is not None}
        whole = dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
                     pre_tokenizer=None, post_processor=None, decoder=None, **{"model": MODELS[model_]})
        tok = Tokenizer.from_str(json.dumps({**whole, **parts}))
        made = []
        for t in texts:
            try:
                ids, plain = tok.encode(t).ids, tok.encode(t, add_special_tokens=False).ids
                made.append([t, ids, plain, tok.decode(ids, skip_special_tokens=False),
                             tok.decode(ids, skip_special_tokens=True)])
            except BaseException as e:  # a panic of the library, not an Exception
                if type(e).__name__ != "PanicException":
                    raise
                print(f"left out, the library panics: {name} {t!r}", file=sys.stderr)
        out.append({"name": name, "model": model_, "parts": parts, "texts": made})
    lines = ",\n".join(json.dumps(c, ensure_ascii=True, separators=(",", ":")) for c in out)
    models = ",\n".join(f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in MODELS.items())
    print(f'{{"models":{{\n{models}}},\n"cases":[\n{lines}]}}')


if __name__ == "__main__":
    main()
