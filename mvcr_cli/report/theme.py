"""The style sheet of the report: two palettes, system fonts, nothing fetched."""

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #10192b; --soft: #5b6b80; --line: #e3e8ef;
  --blue: #08519c; --on: #ffffff; --pale: #9db2c9; --wash: #eef3f9; --warn: #9a5b00; --warned: #fdf4e3; }
@media (prefers-color-scheme: dark) { :root { --page: #0e131a; --card: #161d27; --ink: #e6ebf2; --soft: #93a1b3;
  --line: #2a3441; --blue: #79b8f7; --on: #0b1826; --pale: #6f89a7; --wash: #1d2836;
  --warn: #f0b765; --warned: #2b2415; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.55 Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 24px; }
h1, h2, h3, p { margin: 0; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -0.01em; }
h3 { font-size: 14px; margin-bottom: 6px; }
.over { color: var(--blue); font-size: 13px; font-weight: 600; letter-spacing: 0.02em; margin-bottom: 6px; }
.lead { color: var(--soft); font-size: 17px; margin-top: 10px; max-width: 52em; overflow-wrap: anywhere; }
.soft, .note { color: var(--soft); }
.note { font-size: 14px; margin-top: 4px; max-width: 62em; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px 28px;
  margin-top: 20px; }
section > * + * { margin-top: 18px; }
section > h2 + .note { margin-top: 4px; }
.hero > .note { margin-top: 18px; }
.hero > .note + .note { margin-top: 6px; }
.grid { display: grid; grid-template-columns: repeat(var(--columns, 4), minmax(0, 1fr)); gap: 22px 28px; }
@media (max-width: 700px) { .grid { grid-template-columns: 1fr 1fr; } section { padding: 20px 18px; } }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 26px 32px; }
.hero .big { font-size: 54px; line-height: 1.1; font-weight: 650; letter-spacing: -0.03em; }
.value { font-size: 24px; line-height: 1.25; font-weight: 600; letter-spacing: -0.015em; }
.name { font-size: 13.5px; font-weight: 500; }
.hint { font-size: 12.5px; line-height: 1.4; color: var(--soft); }
.value, .big, td, .chart text, .matrix text { font-variant-numeric: tabular-nums; }
.track { position: relative; height: 10px; border-radius: 5px; background: var(--wash); margin-top: 16px; }
.track i { position: absolute; display: block; }
.track .span { top: 0; height: 10px; min-width: 3px; border-radius: 5px; background: var(--blue); opacity: 0.35; }
.track .mark { top: -4px; width: 3px; height: 18px; margin-left: -1.5px; border-radius: 2px; background: var(--blue); }
.track .base { top: -2px; width: 2px; height: 14px; margin-left: -1px; background: var(--soft); }
.ends { display: flex; justify-content: space-between; font-size: 12.5px; color: var(--soft); margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; padding: 0 12px 8px 0;
  white-space: nowrap; }
td { border-top: 1px solid var(--line); padding: 7px 12px 7px 0; overflow-wrap: anywhere; vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; }
td.bar { width: 150px; padding-right: 0; vertical-align: middle; }
td.bar i { display: block; height: 8px; border-radius: 4px; background: var(--blue); opacity: 0.8; min-width: 2px; }
td.label { min-width: 140px; }
.warned td:first-child { white-space: nowrap; }
.pill { background: var(--warned); color: var(--warn); border-radius: 6px; padding: 2px 8px; font-size: 13px; }
pre { margin: 0; padding: 12px 14px; background: var(--wash); border-radius: 8px; overflow-x: auto;
  font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre + .note { margin-top: 6px; }
dl { display: grid; grid-template-columns: minmax(0, 9.5em) minmax(0, 1fr); gap: 4px 14px; margin: 0;
  font-size: 13.5px; }
dt { color: var(--soft); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
.columns { columns: 2 340px; column-gap: 40px; }
.columns > div { break-inside: avoid-column; margin-bottom: 22px; }
.columns .long { break-inside: auto; }
summary { cursor: pointer; color: var(--blue); font-size: 14px; margin-bottom: 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font-family: inherit; }
.chart text { fill: var(--soft); font-size: 11.5px; }
.chart path { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.rule { stroke: var(--line); stroke-width: 1; fill: none; }
.matrix .rule { stroke: var(--card); }
.chart .main { stroke: var(--blue); }
.chart .other { stroke: var(--pale); }
.chart .dot { stroke: var(--card); stroke-width: 2; fill: var(--blue); }
.chart .other.dot { fill: var(--pale); }
.hover { fill: transparent; }
.legend { float: right; font-size: 12.5px; font-weight: 400; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin: 0 6px 3px 14px;
  background: var(--blue); }
.legend .other { background: var(--pale); }
.matrix { margin-left: auto; margin-right: auto; }
.frame { fill: var(--wash); }
.cell { fill: var(--blue); }
.matrix .on { fill: var(--on); }
.matrix .count { pointer-events: none; }
.matrix .caption { fill: var(--soft); font-size: 13px; }
.picture { display: block; max-width: 100%; margin-left: auto; margin-right: auto; border-radius: 8px; }
footer { color: var(--soft); font-size: 13px; text-align: center; padding: 22px 0 12px; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
