/*
 * test_eval.c - what bench_eval reads and counts: the published forms of CounterFact, zsRE and KnowEdit, lists of
 * facts, shares of tokens, entropy of n-grams.
 */
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../bench/eval_score.h"
#include "kne_test.h"

#include <unistd.h>

static suite *
read_text(const char *content, const char *relations)
{
    char path[2][64];
    const char *text[2] = {content, relations};
    suite *s;

    for (int i = 0; i < 2; i++)
    {
        snprintf(path[i], sizeof path[i], "/tmp/kne_eval_%d_%d", (int) getpid(), i);
        FILE *f = fopen(path[i], "w");

        fputs(text[i] ? text[i] : "", f);
        fclose(f);
    }
    s = read_suite(path[0], relations ? path[1] : NULL);
    unlink(path[0]);
    unlink(path[1]);
    return s;
}

static bool
is(kne_text t, const char *s)
{
    return t.len == strlen(s) && !memcmp(t.p, s, t.len);
}

static void
test_cases(void)
{
    const suite *s = read_text(
        "[{\"case_id\": 0, \"requested_rewrite\": {\"prompt\": \"The mother tongue of {} is\", \"subject\": \"Danielle\","
        "  \"target_new\": {\"str\": \"English\", \"id\": \"Q1\"}, \"target_true\": {\"str\": \"French\"}},"
        "  \"paraphrase_prompts\": [\"Danielle speaks\", \"At home Danielle speaks\"],"
        "  \"neighborhood_prompts\": [\"Michel speaks\", \"Anne speaks\", \"Jean speaks\"]},"
        " {\"prompt\": \"The religion of Edwin is\", \"target_new\": \"Islam\", \"ground_truth\": \"Christianity\","
        "  \"rephrase_prompt\": \"Edwin believes in\", \"locality_prompt\": \"The religion of Paul is\","
        "  \"locality_ground_truth\": \"Christianity\"},"
        " {\"subject\": \"UniFirst\", \"src\": \"What does UniFirst make?\", \"rephrase\": \"UniFirst makes?\", \"alt\": \"aircraft\","
        "  \"answers\": [\"uniform\"], \"loc\": \"nq question: who sings\", \"loc_ans\": \"Walter\"},"
        " {\"subject\": \"Leo\", \"prompt\": \"Leo lives in\", \"target_new\": \"Rome\", \"ground_truth\": [\"Paris\"],"
        "  \"portability\": {\"Reasoning\": [{\"prompt\": \"The country of Leo is\", \"ground_truth\": [[\"Italy\", \"Italia\"]]},"
        "                                    {\"prompt\": \"no answer\", \"ground_truth\": []}],"
        "                    \"Aliases\": [{\"prompt\": \"The lion lives in\", \"ground_truth\": [\"Rome\"]}]},"
        "  \"locality\": {\"Relation_Specificity\": [{\"prompt\": \"Leo was born in\", \"ground_truth\": [\"Oslo\"]}]}},"
        " {\"prompt\": \"no new object\"}]", NULL);
    const kase *k = s->kase;

    check(!s->is_facts && s->n_cases == 4, "four cases, and one that is none left out");
    check(is(k[0].prompt[0], "The mother tongue of Danielle is") && is(k[0].object, "English") && is(k[0].old, "French") &&
              k[0].rephrase.n == 2 && is(k[0].rephrase.answer[1], "English") && k[0].neighbour.n == 3 && k[0].locality.n == 3 &&
              is(k[0].neighbour.prompt[2], "Jean speaks"),
          "CounterFact as ROME published it");
    check(is(k[1].old, "Christianity") && k[1].rephrase.n == 1 && k[1].locality.n == 1 && k[1].neighbour.n == 1,
          "as EasyEdit has it: its locality prompt is one of the neighbours");
    check(is(k[2].prompt[0], "What does UniFirst make?") && is(k[2].object, "aircraft") && is(k[2].old, "uniform") &&
              is(k[2].locality.prompt[0], "who sings") && is(k[2].locality.answer[0], "Walter") && k[2].neighbour.n == 0,
          "zsRE as MEND has it");
    check(k[3].portability.n == 2 && is(k[3].portability.answer[0], "Italy") && k[3].portability.group[1] == 1 &&
              k[3].locality.n == 1 && is(k[3].locality.answer[0], "Oslo"),
          "KnowEdit: groups of probes, the first alias, no probe without an answer");
}

static void
test_facts(void)
{
    const suite *s = read_text("Italy\tcapital\tRome\nRome\tcapital of\tItaly\n",
                               "capital\tThe capital of {} is\t{\"{}'s \\\\\"capital\\\\\" is\",\"no subject\"}\tcapital of\n"
                               "capital of\t{} is the capital of\t{}\t\\N\n");

    check(s->is_facts && s->n_facts == 2 && s->n_rels == 2 && s->rel[0].n == 2 && s->rel[0].inverse == 1 && s->rel[1].inverse == -1 &&
              is(fill(s->rel[0].template_[1], "Italy"), "Italy's \"capital\" is"),
          "facts and relations, tab-separated: paraphrases with a place for the subject, the inverse");
    s = read_text("{\"relations\": {\"r\": [\"{} is\", \"{} was\"]}, \"facts\": [[\"a\", \"r\", \"b\"], {\"subject\": \"c\", "
                  "\"relation\": \"r\", \"object\": \"d\"}]}", NULL);
    check(s->is_facts && s->n_facts == 2 && s->rel[0].n == 2 && !strcmp(s->fact[1].object, "d"), "the same as JSON");
}

static void
test_counting(void)
{
    int32_t target[4] = {1, 2, 3, 4}, best[4] = {1, 2, 3, 5}, was[4] = {1, 9, 3, 5};
    span    now = {4, target, best, 0}, before = {4, target, was, 0}, none = {0, NULL, NULL, 0};

    check(token_share(&now, NULL) == 0.75 && !is_exact(&now), "three of four tokens");
    check(token_share(&now, &before) == 0.75, "locality compares with what was said before, not with what is right");
    check(!is_exact(&none), "what cannot be tokenised is a miss");
    char *w = words_of("The dog's  tail, wagging.\nYes");
    check(!strcmp(w, "The dog's tail , wagging . Yes"), "words and punctuation: %s", w);
    check(gram_entropy("a b a b a", 2) == 1, "two bigrams, each twice: one bit");
    check(fabs(gram_entropy("a b c d e", 2) - 2) < 1e-12 && gram_entropy("a a a a", 2) == 0 && gram_entropy("a", 2) == 0,
          "four of four: two bits; one alone: none");
}

int
main(void)
{
    test_cases();
    test_facts();
    test_counting();
    return kne_test_done();
}
