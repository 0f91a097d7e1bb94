/*
 * tokenizer_broken.h - tokenizer.json files that are wrong, each with the status
 * and a part of the message that test_tokenizer.c wants, and the macros that
 * make such files.
 */
#ifndef TOKENIZER_BROKEN_H
#define TOKENIZER_BROKEN_H

#include "kne_base.h"

#define MODEL(vocab, merges) \
    "{\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}}"
#define WITH(part) \
    "{" part ",\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2}," \
    "\"merges\":[\"a b\"]}}"
#define OPTION(option) \
    "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[]," option "}}"
#define PRE(part)  WITH("\"pre_tokenizer\":{" part "}")
#define NORM(part) WITH("\"normalizer\":{" part "}")
#define DEC(part)  WITH("\"decoder\":{" part "}")
#define POST(part) WITH("\"post_processor\":{" part "}")
#define SPLIT(re) \
    PRE("\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":\"" re "\"}")

static const struct
{
    const char *name, *json;
    kne_status  want;
    const char *says; /* part of the message */
} broken[] = {
    { "good", WITH("\"added_tokens\":[]"), KNE_OK, "" },
    { "empty", "", KNE_ERR_FORMAT, "UTF-8" },
    { "not JSON", "{\"model\":", KNE_ERR_FORMAT, "byte" },
    { "cut off", "{\"model\":{\"vocab\":{\"a", KNE_ERR_FORMAT, "byte" },
    { "something behind", MODEL("{}", "[]") "x", KNE_ERR_FORMAT, "byte" },
    { "an array", "[]", KNE_ERR_FORMAT, "object" },
    { "not UTF-8", "{\"model\":\"\xC3(\"}", KNE_ERR_FORMAT, "UTF-8" },
    { "surrogate alone", WITH("\"x\":\"\\ud800\""), KNE_ERR_FORMAT, "byte" },
    { "no model", "{}", KNE_ERR_FORMAT, "model" },
    { "model null", "{\"model\":null}", KNE_ERR_FORMAT, "model" },
    { "Unigram", "{\"model\":{\"type\":\"Unigram\"}}", KNE_ERR_UNSUPPORTED, "\"Unigram\"" },
    { "old model", "{\"model\":{\"vocab\":{},\"merges\":[]}}", KNE_OK, "" },
    { "version", WITH("\"version\":\"2.0\""), KNE_ERR_UNSUPPORTED, "version" },
    { "no vocab", "{\"model\":{\"type\":\"BPE\",\"merges\":[]}}", KNE_ERR_FORMAT, "vocab" },
    { "vocab array", MODEL("[\"a\"]", "[]"), KNE_ERR_FORMAT, "vocab" },
    { "merges object", MODEL("{}", "{}"), KNE_ERR_FORMAT, "merges" },
    { "negative id", MODEL("{\"a\":-1}", "[]"), KNE_ERR_FORMAT, "\"a\"" },
    { "huge id", MODEL("{\"a\":16777216}", "[]"), KNE_ERR_FORMAT, "\"a\"" },
    { "fractional id", MODEL("{\"a\":1.5}", "[]"), KNE_ERR_FORMAT, "\"a\"" },
    { "enormous id", MODEL("{\"a\":1e999}", "[]"), KNE_ERR_FORMAT, "\"a\"" },
    { "id a text", MODEL("{\"a\":\"1\"}", "[]"), KNE_ERR_FORMAT, "\"a\"" },
    { "key not a text", MODEL("{1:1}", "[]"), KNE_ERR_FORMAT, "byte" },
    { "id twice", MODEL("{\"a\":1,\"b\":1}", "[]"), KNE_ERR_FORMAT, "id 1" },
    { "token twice", MODEL("{\"a\":1,\"a\":2}", "[]"), KNE_ERR_FORMAT, "twice" },
    { "NUL before everything", "\\u0000{}", KNE_ERR_FORMAT, "not valid JSON" },
    { "NUL without an id", MODEL("{\"a\\u0000b\":-1}", "[]"), KNE_ERR_FORMAT, "token \"a\"" },
    { "NUL in a type", NORM("\"type\":\"NFC\\u0000\""), KNE_ERR_UNSUPPORTED, "\"NFC\"" },
    { "sparse ids", MODEL("{\"a\":7,\"b\":9000}", "[]"), KNE_OK, "" },
    { "merge without a space", MODEL("{\"a\":1}", "[\"a\"]"), KNE_ERR_FORMAT, "merge 1" },
    { "merge of three", MODEL("{\"a\":1}", "[\"a a a\"]"), KNE_ERR_FORMAT, "merge 1" },
    { "merge of one", MODEL("{\"a\":1}", "[[\"a\"]]"), KNE_ERR_FORMAT, "merge 1" },
    { "merge of numbers", MODEL("{\"a\":1}", "[[1,2]]"), KNE_ERR_FORMAT, "merge 1" },
    { "merge a number", MODEL("{\"a\":1}", "[3]"), KNE_ERR_FORMAT, "merge 1" },
    { "merge unknown left", MODEL("{\"a\":1}", "[\"b a\"]"), KNE_ERR_FORMAT, "lacks" },
    { "merge unknown right", MODEL("{\"a\":1,\"aa\":2}", "[\"a a\",\"aa b\"]"), KNE_ERR_FORMAT,
      "merge 2" },
    { "merge unknown result", MODEL("{\"a\":1}", "[\"a a\"]"), KNE_ERR_FORMAT, "lacks" },
    { "merges version", MODEL("{\"a\":1,\"aa\":0}", "[\"#version: 0.2\",\"a a\"]"), KNE_OK, "" },
    { "dropout", OPTION("\"dropout\":0.1"), KNE_ERR_UNSUPPORTED, "dropout" },
    { "prefix", OPTION("\"continuing_subword_prefix\":\"##\""), KNE_ERR_UNSUPPORTED, "prefix" },
    { "suffix", OPTION("\"end_of_word_suffix\":\"</w>\""), KNE_ERR_UNSUPPORTED, "suffix" },
    { "flag a number", OPTION("\"fuse_unk\":1"), KNE_ERR_FORMAT, "fuse_unk" },
    { "added not an array", WITH("\"added_tokens\":{}"), KNE_ERR_FORMAT, "added_tokens" },
    { "added not an object", WITH("\"added_tokens\":[1]"), KNE_ERR_FORMAT, "added" },
    { "added without id", WITH("\"added_tokens\":[{\"content\":\"x\"}]"), KNE_ERR_FORMAT, "id" },
    { "added without text", WITH("\"added_tokens\":[{\"id\":3}]"), KNE_ERR_FORMAT, "content" },
    { "added negative", WITH("\"added_tokens\":[{\"id\":-3,\"content\":\"x\"}]"), KNE_ERR_FORMAT,
      "id" },
    { "added takes an id", WITH("\"added_tokens\":[{\"id\":1,\"content\":\"x\"}]"),
      KNE_ERR_FORMAT, "id 1" },
    { "added contradicts", WITH("\"added_tokens\":[{\"id\":5,\"content\":\"a\"}]"), KNE_ERR_FORMAT,
      "id 5" },
    { "added twice",
      WITH("\"added_tokens\":[{\"id\":3,\"content\":\"x\"},{\"id\":4,\"content\":\"x\"}]"),
      KNE_ERR_FORMAT, "same text" },
    { "added id twice",
      WITH("\"added_tokens\":[{\"id\":1,\"content\":\"b\"},{\"id\":1,\"content\":\"b\"}]"),
      KNE_ERR_FORMAT, "id 1" },
    { "added empty", WITH("\"added_tokens\":[{\"id\":1,\"content\":\"\"}]"), KNE_OK, "" },
    { "added normalised away",
      WITH("\"normalizer\":{\"type\":\"Strip\"},\"added_tokens\":[{\"id\":3,\"content\":\" \"}]"),
      KNE_ERR_FORMAT, "nothing is left" },
    { "normalizer", NORM("\"type\":\"Precompiled\""), KNE_ERR_UNSUPPORTED, "\"Precompiled\"" },
    { "normalizer without type", NORM(""), KNE_ERR_FORMAT, "type" },
    { "normalizer a text", WITH("\"normalizer\":\"NFC\""), KNE_ERR_FORMAT, "type" },
    { "normalizers", NORM("\"type\":\"Sequence\",\"normalizers\":{}"), KNE_ERR_FORMAT, "Sequence" },
    { "Replace", NORM("\"type\":\"Replace\",\"content\":\"\""), KNE_ERR_FORMAT, "pattern" },
    { "Replace nothing",
      NORM("\"type\":\"Replace\",\"content\":\"x\",\"pattern\":{\"String\":\"\"}"),
      KNE_ERR_UNSUPPORTED, "empty" },
    { "pre-tokenizer", PRE("\"type\":\"UnicodeScripts\""), KNE_ERR_UNSUPPORTED, "UnicodeScripts" },
    { "Split without behavior", PRE("\"type\":\"Split\",\"pattern\":{\"String\":\"a\"}"),
      KNE_ERR_FORMAT, "behavior" },
    { "regex", SPLIT("a("), KNE_ERR_UNSUPPORTED, "regular" },
    { "regex )", SPLIT(")"), KNE_ERR_UNSUPPORTED, "parenthesis" },
    { "regex &&", SPLIT("[a&&b]"), KNE_ERR_UNSUPPORTED, "intersection" },
    { "regex class", SPLIT("[a[^b]]"), KNE_ERR_UNSUPPORTED, "class" },
    { "regex (?m)", SPLIT("(?m:a.b)"), KNE_ERR_UNSUPPORTED, "option" },
    { "regex verb", SPLIT("(*UTF)a"), KNE_ERR_UNSUPPORTED, "(*" },
    { "regex \\h", SPLIT("\\\\h"), KNE_ERR_UNSUPPORTED, "escape" },
    { "regex property", SPLIT("\\\\p{Nonsense}"), KNE_ERR_UNSUPPORTED, "compile" },
    { "regex end", SPLIT("a\\\\"), KNE_ERR_UNSUPPORTED, "backslash" },
    { "regex recursion", SPLIT("(?R)"), KNE_ERR_UNSUPPORTED, "group" },
    { "Metaspace", PRE("\"type\":\"Metaspace\",\"replacement\":\"ab\""), KNE_ERR_FORMAT,
      "one character" },
    { "Metaspace scheme",
      PRE("\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"x\""), KNE_ERR_FORMAT,
      "scheme" },
    { "Metaspace contradiction",
      PRE("\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"first\","
          "\"add_prefix_space\":false"),
      KNE_ERR_FORMAT, "contradicts" },
    { "decoder", DEC("\"type\":\"WordPiece\""), KNE_ERR_UNSUPPORTED, "\"WordPiece\"" },
    { "decoder Strip", DEC("\"type\":\"Strip\",\"content\":\"a\",\"start\":-1,\"stop\":0"),
      KNE_ERR_FORMAT, "start" },
    { "Roberta", POST("\"type\":\"RobertaProcessing\""), KNE_ERR_UNSUPPORTED, "RobertaProcessing" },
    { "Bert", POST("\"type\":\"BertProcessing\""), KNE_ERR_UNSUPPORTED, "BertProcessing" },
    { "template", POST("\"type\":\"TemplateProcessing\""), KNE_ERR_FORMAT, "malformed" },
    { "template B",
      POST("\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"B\"}}]"),
      KNE_ERR_FORMAT, "malformed" },
    { "template token",
      POST("\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"s\"}}],"
           "\"special_tokens\":{}"),
      KNE_ERR_FORMAT, "\"s\"" },
    { "template id",
      POST("\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"s\"}}],"
           "\"special_tokens\":{\"s\":{\"ids\":[3]}}"),
      KNE_ERR_FORMAT, "outside" },
};

#endif
