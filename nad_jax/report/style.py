# SPDX-License-Identifier: Apache-2.0
"""The style sheet of the page and its colours, for light, dark, phone and paper.

The colours of the attention maps are in `drawings`: they are part of a picture and the
same in every mode.
"""

STYLE = """
:root {
  --paper: #fdfdfb; --panel: #f3f3ee; --ink: #1c1e22; --soft: #595f69; --rule: #d8d8d1;
  --acc: #0072b2; --asr: #c14600; --time: #6b7280; --track: #e9e9e3;
  --efrap: #00795a; --reconstruction: #0072b2; --stochastic: #8a6300;
  --flipped: #a63f7d; --other: #5b6270;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria,
    "Source Serif 4", "Noto Serif", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --mono: ui-monospace, "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --panel: #1c1f25; --ink: #e6e7ea; --soft: #a2a8b3;
    --rule: #363b44; --acc: #56b4e9; --asr: #ff8f4a; --time: #8d95a3; --track: #262a31;
    --efrap: #35cfa0; --reconstruction: #56b4e9; --stochastic: #e3b23c;
    --flipped: #e78cc3; --other: #a2a8b3;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 70rem; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans);
  overflow-wrap: anywhere;
}
h1, h2 { font-family: var(--serif); line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.5rem); margin: .2rem 0 1rem; font-weight: 700; }
h2 { font-size: 1.35rem; margin: 0 0 1rem; font-weight: 700; }
p { margin: 0 0 1rem; max-width: 46rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .6rem; }
ul, ol { list-style: none; margin: 0; padding: 0; }
abbr { text-decoration: none; }
section { border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1.75rem; }
.brand { font: 600 .85rem var(--mono); margin: 0; }
.brand span, .note, .about, .facts, .comparison { color: var(--soft); }
.lead { font: 1.25rem/1.5 var(--serif); text-wrap: pretty; }
.note, .facts { font-size: .875rem; margin: 1rem 0 0; }
.about { display: block; font-size: .82rem; font-weight: 400; line-height: 1.35; }
.unit { color: var(--soft); font-weight: 400; }

.tiles { display: flex; flex-wrap: wrap; gap: 0; margin: 1.75rem 0;
  border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; }
.tile { flex: 1 1 12rem; display: grid; grid-template-columns: 1fr auto;
  padding: 1rem 1.25rem 1.1rem; border-left: 1px solid var(--rule);
  border-top: 1px solid var(--rule); margin: -1px 0 0 -1px; }
.tile-label { font-weight: 600; }
.tile-state, .tile-acc { justify-self: end; }
.tile-state { color: var(--soft); font-size: .9rem; }
.tile-number { grid-column: 1 / -1; font: 2.6rem/1.25 var(--serif); margin-top: .2rem;
  font-variant-numeric: lining-nums tabular-nums; }
.tile-unit, .tile-acc { font-size: .875rem; color: var(--soft); }
.tile.awake { background: color-mix(in srgb, var(--asr) 9%, var(--paper)); }
.tile.awake .tile-number, .tile.awake .tile-state { color: var(--asr); }
.tile.awake .tile-state { font-weight: 600; }

.claims { margin: 0 0 1rem; max-width: 46rem; }
.claims li { padding-left: 1.6rem; position: relative; margin: .3rem 0; }
.claims li > span { position: absolute; left: 0; font-weight: 700; }
.holds > span { color: var(--efrap); }
.fails > span { color: var(--asr); }

table { border-collapse: collapse; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding: .5rem 0; }
th { text-align: left; font-weight: 600; }
.results-table { width: 100%; font-variant-numeric: lining-nums tabular-nums; }
.results-table th, .results-table td { padding: .55rem .5rem; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
.results-table th:first-child { padding-left: 0; }
.results-table td:last-child, .results-table th:last-child { padding-right: 0; }
.results-table thead th { border-bottom: 2px solid var(--ink); white-space: nowrap;
  vertical-align: bottom; }
.results-table .about { max-width: 27rem; }
.results-table .group th { padding-top: 1.4rem; font-weight: 400; font-size: .875rem;
  color: var(--soft); }
.results-table tbody:first-of-type .group th { padding-top: .8rem; }
.num { text-align: right; }
.bits { white-space: nowrap; }
.value { font-size: 1.05rem; }
.std { color: var(--soft); font-size: .82rem; white-space: nowrap; }
.count { display: block; color: var(--soft); font-size: .75rem; white-space: nowrap; }
.defence th, .defence td { background: var(--panel); }
.defence .name, .defence .value { font-weight: 700; }
.defence th:first-child { padding-left: .7rem;
  box-shadow: -.6rem 0 0 var(--panel), inset 3px 0 0 var(--efrap); }
.defence td:last-child { box-shadow: .6rem 0 0 var(--panel); }

.panels { display: grid; gap: 2rem 3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .5em; }
.swatch.acc { background: var(--acc); }
.swatch.asr { background: var(--asr); }
svg { display: block; overflow: visible; }
svg text { font: .85rem var(--sans); fill: var(--ink); }
svg .value { font-size: .9rem; font-weight: 600; font-variant-numeric: tabular-nums; }
svg .heading, svg .tick { fill: var(--soft); }
svg .tick { font-size: .75rem; }
.track { fill: var(--track); }
.bar.acc { fill: var(--acc); }
.curve { stroke-width: 2; stroke-linecap: round; }
.curve.acc { stroke: var(--acc); }
.curve.asr { stroke: var(--asr); }
.bar.asr { fill: var(--asr); }
.bar.time { fill: var(--time); }
.seed { fill: var(--paper); stroke: var(--ink); stroke-width: 1.2; }
.time-bars { max-width: 34rem; }

.pictures { display: grid; gap: 1.5rem 3rem;
  grid-template-columns: auto minmax(0, 1fr); }
.pictures figcaption, .maps thead th { font-weight: 400; font-size: .875rem;
  color: var(--soft); margin: .6rem 0 0; }
.pictures figure:only-child { grid-column: 1 / -1; }
.pairs { display: flex; flex-wrap: wrap; gap: 1rem .75rem; }
.pairs li { width: min-content; }
.pairs img + img { margin-top: 4px; }
img { display: block; max-width: 100%; background: var(--track); border-radius: 2px; }
.pairs img, .maps img { max-width: none; }
.pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--acc); outline-offset: 3px; }
.maps th, .maps td { padding: .35rem 1rem .35rem 0; vertical-align: middle; }
.maps td { white-space: nowrap; }
.maps img { display: inline-block; }
.maps thead th { vertical-align: bottom; }
.maps tbody th { min-width: 6rem; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; margin-bottom: 1.25rem;
  font-size: .9rem; }
.legend li { display: flex; align-items: center; gap: .5rem; }
.colours { align-items: center; gap: .5rem; margin: .75rem 0 0; font-size: .8rem;
  color: var(--soft); }

.dots { display: grid; grid-template-columns: minmax(6rem, 11rem) minmax(0, 1fr);
  gap: 0 1.3rem; padding-right: 1.3rem; }
.layer-names { font-size: .8rem; min-width: 0; }
.layer-names li { height: 22px; line-height: 22px; overflow: hidden; direction: rtl;
  text-align: right; text-overflow: ellipsis; white-space: nowrap; }
.grid { stroke: var(--rule); }
.grid.one { stroke: var(--ink); }
.row { stroke: var(--rule); stroke-dasharray: 1 4; }
.mark { stroke: var(--paper); stroke-width: 1; paint-order: stroke; }
.series-efrap { fill: var(--efrap); }
.series-reconstruction { fill: var(--reconstruction); }
.series-stochastic { fill: var(--stochastic); }
.series-flipped { fill: var(--flipped); }
.series-other { fill: var(--other); }

details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; width: max-content; max-width: 100%; }
summary:focus-visible { outline: 2px solid var(--acc); outline-offset: 3px; }
.numbers { font-size: .82rem; font-variant-numeric: tabular-nums; margin-top: .5rem; }
.numbers th, .numbers td { padding: .25rem 1rem .25rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
.numbers thead th { vertical-align: bottom; }
.numbers thead tr + tr th { font-weight: 400; color: var(--soft); }
dl { display: grid; grid-template-columns: minmax(4.5rem, max-content) minmax(0, 46rem);
  gap: .5rem 1.25rem; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; }
pre { font: .82rem/1.5 var(--mono); background: var(--panel); border-radius: 6px;
  padding: .9rem 1rem; white-space: pre-wrap; margin: .75rem 0; }
.command { margin: 0 0 1.25rem; }
.notes { margin-top: 1.25rem; max-width: 46rem; }
.notes li { margin: .4rem 0; padding-left: 1.1rem; position: relative; }
.notes li::before { content: "–"; position: absolute; left: 0; color: var(--soft); }

@media (max-width: 44rem) {
  body { padding-top: 1.5rem; }
  .lead { font-size: 1.125rem; }
  .results-table, .results-table tbody, .results-table tr, .results-table th,
  .results-table td { display: block; }
  .results-table thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  .results-table tr { display: grid; grid-template-columns: repeat(3, 1fr);
    gap: .5rem .75rem; padding: .9rem 0; border-bottom: 1px solid var(--rule); }
  .results-table .group { display: block; padding: 1rem 0 .4rem; }
  .results-table tr > th, .results-table tr > td { border: 0; padding: 0;
    text-align: left; }
  .results-table tr > th { grid-column: 1 / -1; }
  .results-table td::before { content: attr(data-label); display: block;
    font-size: .75rem; color: var(--soft); }
  .results-table .group th, .results-table tbody:first-of-type .group th { padding: 0; }
  .results-table .defence { background: var(--panel); margin: 0 -.75rem;
    padding: .9rem .75rem; box-shadow: inset 3px 0 0 var(--efrap); }
  .results-table .defence > th, .results-table .defence > td { box-shadow: none;
    padding-left: 0; }
  .results-table .bits { order: 1; }
  .std { display: block; }
  .pictures { grid-template-columns: minmax(0, 1fr); }
  .tick.minor { display: none; }
  .maps th, .maps td { padding-right: .4rem; font-size: .8rem; }
  .maps tbody th { min-width: 4.2rem; }
  .maps img { width: 3.4rem; height: auto; }
  .dots { grid-template-columns: 42% minmax(0, 1fr); }
}
@media print {
  :root { --paper: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  section { break-inside: avoid-page; margin-top: 1.5rem; padding-top: 1rem; }
  .layer-by-layer, .how-to-repeat-it { break-inside: auto; }
  figure, tr, .tiles, li { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
