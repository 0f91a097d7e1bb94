# eval_table.awk - lines of bench_eval --tsv (suite, mode, variant, seed, metric, value, probes) to Markdown: a table for each
# suite and mode, a row a variant, mean over the seeds and half the width of the 95 % interval (Student's t over the seeds;
# none for one seed). Variants and metrics in the order in which they come.
BEGIN {
    FS = "\t"
    split("12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262", t95, " ")
}
NF == 7 {
    table = $1 SUBSEP $2
    if (!(table in seen)) { seen[table] = 1; tables[++n_tables] = table }
    if (!((table, $3) in row)) { row[table, $3] = 1; variant[table, ++n_rows[table]] = $3 }
    if (!((table, $5) in col)) { col[table, $5] = 1; metric[table, ++n_cols[table]] = $5 }
    cell = table SUBSEP $3 SUBSEP $5
    n[cell]++; sum[cell] += $6; square[cell] += $6 * $6
    if ($5 == "success") edits[table, $3] += $7
    if ($5 == "success" && !((table, $4) in seeds)) { seeds[table, $4] = 1; n_seeds[table]++ }
}
function show(cell, what,    mean, var, text) {
    if (!n[cell]) return ""
    mean = sum[cell] / n[cell]
    text = mean <= 1.5 && what !~ /^(steps|CPU s|neurons|KiB|fluency.*)$/ ? sprintf("%.3f", mean) : sprintf("%.3g", mean)
    if (n[cell] > 1) {
        var = (square[cell] - n[cell] * mean * mean) / (n[cell] - 1)
        text = text sprintf(" ± %.2g", t95[n[cell] - 1 < 9 ? n[cell] - 1 : 9] * sqrt((var > 0 ? var : 0) / n[cell]))
    }
    return text
}
END {
    for (i = 1; i <= n_tables; i++) {
        split(tables[i], name, SUBSEP)
        printf "\n### %s, %s\n\n| | edits |", name[1], name[2]
        for (c = 1; c <= n_cols[tables[i]]; c++) printf " %s |", metric[tables[i], c]
        printf "\n|---|---|"
        for (c = 1; c <= n_cols[tables[i]]; c++) printf "---|"
        print ""
        for (r = 1; r <= n_rows[tables[i]]; r++) {
            v = variant[tables[i], r]
            printf "| %s | %d |", v, edits[tables[i], v]
            for (c = 1; c <= n_cols[tables[i]]; c++) printf " %s |", show(tables[i] SUBSEP v SUBSEP metric[tables[i], c], metric[tables[i], c])
            print ""
        }
    }
}
