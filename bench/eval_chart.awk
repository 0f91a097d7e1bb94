# eval_chart.awk - lines of bench_eval --tsv to an SVG: for each suite and mode a group of bars a variant, one bar each for
# success, other phrasings and untouched facts (or locality).
BEGIN {
    FS = "\t"
    split("success phrasings untouched locality", wanted, " ")
    colour["success"] = "#4c72b0"; colour["phrasings"] = "#dd8452"; colour["untouched"] = colour["locality"] = "#55a868"
    bar = 9; plot = 120; left = 40
}
NF == 7 && ($5 in colour) {
    table = $1 ", " $2
    if (!(table in seen)) { seen[table] = 1; tables[++n_tables] = table }
    if (!((table, $3) in row)) { row[table, $3] = 1; variant[table, ++n_rows[table]] = $3 }
    n[table, $3, $5]++; sum[table, $3, $5] += $6
    if (n_rows[table] > most) most = n_rows[table]
}
function escaped(s) { gsub(/&/, "\\&amp;", s); gsub(/</, "\\&lt;", s); return s }
END {
    slot = 3 * bar + 12
    width = left + most * slot + 20; if (width < 420) width = 420
    height = plot + 130
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"10\">\n", width, n_tables * height + 24
    print "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
    x = left
    for (m = 1; m <= 3; m++) {
        printf "<rect x=\"%d\" y=\"6\" width=\"9\" height=\"9\" fill=\"%s\"/><text x=\"%d\" y=\"15\">%s</text>\n", x, colour[wanted[m]], x + 13, (m == 3 ? "untouched or locality" : wanted[m])
        x += 90
    }
    for (i = 1; i <= n_tables; i++) {
        top = 24 + (i - 1) * height; base = top + 20 + plot
        printf "<text x=\"%d\" y=\"%d\" font-size=\"12\">%s</text>\n", left, top + 12, escaped(tables[i])
        for (g = 0; g <= 4; g++)
            printf "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#ddd\"/><text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%.2f</text>\n", left, left + n_rows[tables[i]] * slot, base - g * plot / 4, base - g * plot / 4, left - 4, base - g * plot / 4 + 3, g / 4
        for (r = 1; r <= n_rows[tables[i]]; r++) {
            v = variant[tables[i], r]; x = left + (r - 1) * slot + 6; k = 0
            for (m = 1; m <= 4; m++) {
                c = tables[i] SUBSEP v SUBSEP wanted[m]
                if (!n[c]) continue
                y = sum[c] / n[c] * plot
                printf "<rect x=\"%d\" y=\"%.1f\" width=\"%d\" height=\"%.1f\" fill=\"%s\"><title>%s: %s %.3f</title></rect>\n", x + bar * k++, base - y, bar - 1, y, colour[wanted[m]], escaped(v), wanted[m], sum[c] / n[c]
            }
            printf "<text transform=\"translate(%d,%d) rotate(40)\">%s</text>\n", x, base + 10, escaped(v)
        }
    }
    print "</svg>"
}
