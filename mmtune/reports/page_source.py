"""Template and style of the report page."""

# ruff: noqa: E501

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d1c1a; --soft: #6a6761; --line: #e4e1da; --faint: #f1efea;
  --base: #9a958b; --tuned: #2456a6; --best-prompt: #c77f1a; --tuned-best-prompt: #b0509a; --better: #1f6f4a; --worse: #a8431f; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #161513; --card: #1e1d1a; --ink: #ebe8e1; --soft: #a09b91; --line: #34322d; --faint: #262420;
  --base: #8a857b; --tuned: #8ab4f8; --best-prompt: #e0a458; --tuned-best-prompt: #d98cc5; --better: #7cc7a0; --worse: #e8956f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 56px 24px 72px; }
h1 { font-size: 27px; line-height: 1.25; font-weight: 640; letter-spacing: -.012em; margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 640; margin: 52px 0 12px; letter-spacing: -.006em; }
h3 { font-size: 15px; font-weight: 640; margin: 30px 0 10px; }
p { margin: 0 0 12px; max-width: 74ch; }
.kicker { font-size: 13px; color: var(--soft); margin: 0 0 6px; }
.meta, .note { color: var(--soft); font-size: 14px; }
.meta span { white-space: nowrap; } .meta span + span::before { content: "\\00b7"; margin: 0 .5em 0 .2em; }
table.narrow { max-width: 440px; }
code { font: .92em ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.finding { margin: 26px 0 0; padding: 16px 20px; background: var(--card); border: 1px solid var(--line);
  border-left: 3px solid var(--base); border-radius: 6px; font-size: 18px; line-height: 1.5; }
.finding p { margin: 0; max-width: none; }
.finding.better { border-left-color: var(--better); } .finding.worse { border-left-color: var(--worse); }
/* Where a table is wider than the page, a shadow at the edge says that it goes on. */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 40px 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to right, var(--line), transparent) left / 14px 100% no-repeat scroll,
  linear-gradient(to left, var(--line), transparent) right / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px 8px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; color: var(--soft); font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td:last-child, th:last-child { padding-right: 0; }
td.left, th.left { text-align: left; }
td small { color: var(--soft); font-size: 13px; }
tr:last-child td { border-bottom: 0; }
table.turned td { border: 0; padding-top: 4px; padding-bottom: 4px; }
table.turned td.left { white-space: nowrap; } table.turned td small { display: block; } table.turned td[rowspan] { vertical-align: top; }
table.turned tr.entry ~ tr.entry td { border-top: 1px solid var(--line); }
table.turned tr.other-model td { border-top: 1px dotted var(--line); }
table.turned tr.together td { font-weight: 640; }
.better { color: var(--better); } .worse { color: var(--worse); } .finding.better, .finding.worse { color: var(--ink); }
td.better, td.worse { font-weight: 600; }
.key i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin: 0 6px 0 0; }
.key { max-width: none; } .key span { margin-right: 18px; white-space: nowrap; }
.base { --own: var(--base); } .tuned { --own: var(--tuned); } .best_prompt { --own: var(--best-prompt); }
.tuned_best_prompt { --own: var(--tuned-best-prompt); } .vote { --own: var(--ink); }
.key i { background: var(--own); border: 1.5px solid var(--own); } .key i.hollow { background: none; } .pale { opacity: .5; }
svg { display: block; } svg.dots { margin-left: auto; }
svg line, svg polyline { fill: none; stroke-width: 1.5; }
svg .axis, svg .grid { stroke: var(--line); stroke-width: 1; }
svg .own { stroke: var(--own); } circle.own { fill: var(--own); stroke-width: 1.5; } circle.own.hollow { fill: var(--paper); }
svg.plot { width: 100%; height: auto; max-width: 720px; } svg text { font-size: 12px; fill: var(--soft); }
svg .train { stroke: var(--base); } svg polyline.val { stroke: var(--tuned); } circle.val { fill: var(--tuned); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 14px 24px; margin: 0 0 20px; }
dt { font-size: 13px; color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }
.row { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 14px; min-width: 0;
  display: flex; flex-direction: column; gap: 10px; }
.pictures { display: flex; gap: 8px; flex-wrap: wrap; background: var(--faint); border-radius: 4px; padding: 8px; justify-content: center; }
.pictures img { height: 150px; max-width: 100%; object-fit: contain; border-radius: 2px; }
.pictures img.exact { image-rendering: pixelated; }
.pictures.several img { width: calc(50% - 4px); height: auto; max-height: 150px; }
.row audio { width: 100%; height: 36px; }
.question { font-weight: 560; margin: 0; overflow-wrap: anywhere; white-space: pre-line; }
.row .note { margin: 0; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: auto 1fr auto; gap: 4px 12px; margin: 0; font-size: 14.5px; }
.answers dt { font-size: 14px; } .answers dd { overflow-wrap: anywhere; white-space: pre-wrap; } .answers .score { color: var(--soft); text-align: right; }
.row .id { margin-top: auto; font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
details { margin-top: 26px; } summary { cursor: pointer; font-weight: 600; font-size: 15px; margin-bottom: 12px; }
footer { margin-top: 56px; padding-top: 18px; border-top: 1px solid var(--line); color: var(--soft); font-size: 13.5px; }
@media (max-width: 640px) { main { padding: 32px 16px 48px; } h1 { font-size: 23px; } .finding { font-size: 16px; }
  table.turned { font-size: 13px; } table.turned td, table.turned th { padding-right: 8px; } }
@media print { main { max-width: none; padding: 0; } .row { break-inside: avoid; } }
"""

PAGE = """\
{% macro head(what, entry) %}
{% if entry.models | list is turned %}
<tr>{% for cell in turned_head(what) %}<th{% if loop.index == 2 %} class="left"{% endif %}>{{ cell }}</th>{% endfor %}<th></th></tr>
{% else %}
<tr><th>{{ what }}</th>
{% for model in entry.models %}<th>{{ model }}</th>{% endfor %}
{% if entry.difference is defined %}<th>difference</th><th>95 % interval</th><th>p</th><th>won / lost</th>
{% else %}<th>{{ entry.models | list | interval_head }}</th>{% endif %}
<th>rows</th><th></th></tr>
{% endif %}
{% endmacro %}
{% macro lines(name, entry, entries, detail="") %}
{% if entry.models | list is turned %}
{% for one in entry | turned_parts %}
<tr class="{{ one.style }}">{% if loop.first %}<td rowspan="{{ loop.length }}">{{ name }}{% if detail %} <small>{{ detail }}</small>{% endif %}</td>{% endif %}
<td class="left">{{ one.cells[0] }}</td>{% for cell in one.cells[1:] %}<td>{{ cell }}</td>{% endfor %}<td>{{ dots(one.models, entries) }}</td></tr>
{% endfor %}
{% else %}
<tr><td>{{ name }}{% if detail %} <small>{{ detail }}</small>{% endif %}</td>
{% for found in entry.models.values() %}<td>{{ found.value | number }}</td>{% endfor %}
{% if entry.difference is defined %}
<td class="{{ entry | verdict }}">{{ entry.difference.value | signed }}</td><td>{{ entry.difference | span(sign=True) }}</td>
<td>{{ entry.difference.p | p }}</td><td>{{ entry.difference.wins }} / {{ entry.difference.losses }}</td>
{% else %}<td>{{ (entry.models.values() | list | last) | span }}</td>{% endif %}
<td>{{ "{:,}".format(entry.n) }}</td><td>{{ dots(entry.models, entries) }}</td></tr>
{% endif %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ run.title }} · mmtune report</title>
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<p class="kicker">mmtune report</p>
<h1>{{ run.title }}</h1>
<p class="meta"><span><code>{{ run.model | model }}</code></span> <span>{{ run.split }} split</span>
<span>{{ rows_said }}</span> <span>answers: {{ answers_said }}</span>
<span>seed {{ run.seed }}</span></p>
<div class="finding {{ outcome }}"><p>{{ headline }}</p></div>

{% if report.metrics %}
<h2>Scores</h2>
<div class="scroll"><table{% if leading.models | list is turned %} class="turned"{% endif %}>
<thead>{{ head("metric", leading) }}</thead>
<tbody>
{% for name, entry in report.metrics.items() %}{{ lines(name | label, entry, report.metrics.values() | list, entry.normaliser) }}{% endfor %}
</tbody></table></div>
<p class="note key">{% if leading.models | list is turned %}Scores on a common axis from 0, with 95 % intervals{% else %}
{% for model in leading.models %}<span><i class="{{ marks[model] }}"></i>{{ model }}</span> {% endfor %}
one above the other, on a common axis from 0, with 95 % intervals{% endif %}</p>
{% endif %}

{% for facet in facets %}
{% if loop.first %}<h3>By {{ facet.label }}</h3>{% else %}<details{{ " open" if facet.open }}><summary>By {{ facet.label }}</summary>{% endif %}
<div class="scroll"><table{% if facet.entries[0].models | list is turned %} class="turned"{% endif %}>
<thead>{{ head(facet.label, facet.entries[0]) }}</thead>
<tbody>
{% for row in facet.rows %}{{ lines(row.value, row.entry, facet.entries, (row.metric | label) if facet.several else "") }}{% endfor %}
</tbody></table></div>
{% if facet.more %}<p class="note">{{ facet.more }} in metrics.json.</p>{% endif %}
{% if not loop.first %}</details>{% endif %}
{% endfor %}

{% if report.perplexity %}
<h2>Perplexity of the reference answers</h2>
<div class="scroll"><table class="narrow">
<thead><tr><th>model</th><th>perplexity</th><th>95 % interval</th></tr></thead>
<tbody>{% for model, found in report.perplexity.models.items() %}
<tr><td>{{ model }}</td><td>{{ found.value | perplexity }}</td><td>{{ found | perplexity_span }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="note">Over {{ "{:,}".format(report.perplexity.tokens) }} answer tokens; lower is better.</p>
{% endif %}

{% for extra in extras %}
<h2>{{ extra.title }}</h2>
<div class="scroll"><table>
<thead><tr>{% for cell in extra.head %}<th{% if loop.index == 2 %} class="left"{% endif %}>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in extra.rows %}
<tr>{% for cell in row %}<td{% if loop.index == 2 %} class="left"{% endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
<p class="note">{{ extra.note }}</p>
{% endfor %}

{% if report.training %}
<h2>Training</h2>
{% if loss %}{{ loss }}<p class="note key"><span><i class="base"></i>training loss</span>{% if validated %}<span><i class="tuned"></i>validation loss</span>{% endif %}
per answer token, over optimizer steps</p>{% endif %}
<dl>{% for key, value in report.training.items() %}<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% endif %}

{% if kinds %}
<h2>Rows</h2>
<p class="note">Chosen by a hash of the row's id, one per picture where possible; not by how good they look.</p>
{% for title, rows in kinds.items() %}
<h3>{{ title }}</h3>
<div class="rows">
{% for row in rows %}
<article class="row">
{% if row.pictures %}<div class="pictures{{ " several" if row.pictures | length > 1 }}">{% for uri in row.pictures %}<img src="{{ uri }}" alt="" {% if uri.startswith("data:image/png") %}class="exact"{% endif %}>{% endfor %}</div>{% endif %}
<p class="question">{{ row.question }}</p>
{% if row.searched %}<p class="note">the searched prompt asks: {{ row.searched }}</p>{% endif %}
{% for uri in row.sounds %}<audio controls preload="metadata" src="{{ uri }}"></audio>{% endfor %}
{% for one in row.other_media %}<p class="note">{{ one }}</p>{% endfor %}
<dl class="answers">
{% for answer in row.answers %}<dt>{{ answer.model }}</dt><dd>{{ answer.text or "(empty)" }}</dd><dd class="score">{{ "%.0f" | format(answer.score) }}</dd>{% endfor %}
<dt>reference</dt><dd>{% for text, count in row.references %}{{ " · " if not loop.first }}{{ text }}{% if count > 1 %} ×{{ count }}{% endif %}{% endfor %}</dd><dd></dd>
</dl>
<div class="id"><code>{{ row.id }}</code> · {{ row.metric | label }}</div>
</article>
{% endfor %}
</div>
{% endfor %}
{% endif %}

<h2>Made from</h2>
<div class="scroll"><table>
<thead><tr><th>stage</th><th class="left">hash</th><th class="left">rows</th><th class="left">refused</th><th>seconds</th></tr></thead>
<tbody>{% for item in report.manifests %}
<tr><td>{{ item.stage }}</td><td class="left"><code>{{ item.hash | brief }}</code></td>
<td class="left">{{ item.rows | rows_or_trees(item.examples | default({})) }}</td>
<td class="left">{% for reason, count in item.drops.items() %}{{ ", " if not loop.first }}{{ reason }} {{ "{:,}".format(count) }}{% else %}none{% endfor %}</td>
<td>{{ "%.1f" | format(item.seconds) }}</td></tr>
{% endfor %}</tbody></table></div>
{% if report.rejected %}<p class="note">Not scored: {% for reason, count in report.rejected.items() %}{{ ", " if not loop.first }}{{ reason }} {{ "{:,}".format(count) }}{% endfor %}
of {{ "{:,}".format(report.read) }} rows; each is named in rejects.jsonl.</p>{% endif %}

<footer>
{% for note in report.notes %}<p>{{ note }}</p>{% endfor %}
<p>Intervals are percentile bootstrap intervals over {{ "{:,}".format(run.bootstrap) }} resamples; rows that show the same
media are resampled together. p is from a paired sign-flip test over the same units, two-sided, not corrected for the number of
tables. All models answered the same rows.</p>
</footer>
</main>
</body>
</html>
"""
