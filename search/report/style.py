"""The style sheet of the report: light and dark, one column on a phone."""

STYLE = """
:root {
  --page: #f7f7f5; --card: #ffffff; --text: #1d2126; --soft: #5d6671; --rule: #e1e3e6; --grid: #eceef0;
  --front: #1f5fd6; --random: #d9730d; --depth: #8a4fc7; --extreme: #4b5563; --softmax: #b8377f;
  --family0: #b8377f; --family1: #6b8e23; --family2: #5b9bd5; --family3: #0c8a7a; --family4: #a3760b;
  --family5: #7a6a5a;
  --good: #1a7f45; --bad: #c22f2f; --good-bar: #9ad5b2; --bad-bar: #efb0ab;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --text: #e6e8ea; --soft: #9aa4af; --rule: #30363c; --grid: #272c31;
    --front: #6ea8ff; --random: #f3a04b; --depth: #bd93f0; --extreme: #a7b0bb; --softmax: #ee7fb5;
    --family0: #ee7fb5; --family1: #a9c95f; --family2: #8cc4f5; --family3: #3fc9b5; --family4: #e0c04e;
    --family5: #b9a894;
    --good: #56c783; --bad: #f27b74; --good-bar: #2c6a47; --bad-bar: #7d3531;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; margin: 8px 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 6px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px;
  margin: 18px 0; }
.note { color: var(--soft); font-size: .9rem; margin: 0 0 12px; max-width: 80ch; }
.verdict { list-style: none; padding: 0; margin: 0 0 16px; }
.verdict li { margin: 4px 0; max-width: 95ch; }
.good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: flex; flex-wrap: wrap; gap: 10px; }
.cards div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 8px 14px;
  color: var(--soft); font-size: .85rem; flex: 1 1 110px; }
.cards b { display: block; font-size: 1.25rem; color: var(--text); font-variant-numeric: tabular-nums; }
figure { margin: 0; min-width: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px; }
.wide figure, .narrow { max-width: 700px; margin: 0 auto; }
.wide svg text { font-size: 10.5px; } .wide svg .label { font-size: 11.5px; }
.narrow { max-width: 620px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .label { fill: var(--text); font-size: 13px; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 1.8; } .error { stroke-width: 1.4; fill: none; }
.dot { stroke: var(--card); stroke-width: .8; } .ring { fill: none; stroke-width: 2.4; }
.front .dot { fill: var(--front); } .front .line { stroke: var(--front); }
.random .dot { fill: var(--random); } .random .line, .random .error, .random.error { stroke: var(--random); }
.depth .dot { fill: var(--depth); } .extreme .dot { fill: var(--extreme); }
.family0 { --own: var(--family0); } .family1 { --own: var(--family1); } .family2 { --own: var(--family2); }
.family3 { --own: var(--family3); } .family4 { --own: var(--family4); } .family5 { --own: var(--family5); }
[class*=family] .dot { fill: var(--own); } [class*=family] .line { stroke: var(--own); stroke-width: 1.1; }
.knee .ring { stroke: var(--text); }
.gap { stroke-width: 7; } .gap.good { stroke: var(--good-bar); } .gap.bad { stroke: var(--bad-bar); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0; margin: 8px 0 0;
  font-size: .85rem; color: var(--soft); }
.legend li { display: flex; align-items: center; gap: 6px; }
.key { width: 28px; flex: none; }
.policies { overflow-x: auto; }
.policy { display: grid; grid-template-columns: 66px minmax(90px, 460px) 58px 84px; gap: 10px; align-items: center;
  font-size: .85rem; font-variant-numeric: tabular-nums; padding: 2px 0; }
.policy > span { text-align: right; }
.policy.head { color: var(--soft); align-items: end; }
.bars { display: flex; gap: 3px; min-width: 0; }
.policy:not(.head) .bars { height: 26px; }
.bars span { flex: 1 1 0; min-width: 4px; display: flex; align-items: flex-end; gap: 1px; background: var(--grid);
  border-radius: 3px; overflow: hidden; }
.bars i { flex: 1; background: var(--front); }
.bars .softmax i { background: var(--softmax); }
.bars .delta { background: none; border: 1px solid var(--rule); }
.ops i { width: 12px; height: 12px; border-radius: 3px; background: var(--front); }
.ops .softmax { background: var(--softmax); } .ops .delta { background: none; border: 1px solid var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; } td.names { white-space: normal; min-width: 9em; }
td small, th small { display: block; color: var(--soft); font-weight: 400; }
.controls + .controls { margin-top: 18px; } .controls tbody th { white-space: normal; min-width: 9.5em; }
.sweeps tbody th { white-space: normal; } .sweeps td { padding-right: 6px; }
tr:target { background: var(--grid); }
code { font: .82rem/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; white-space: nowrap; }
.command { user-select: all; }
pre { overflow-x: auto; background: var(--page); border-radius: 8px; padding: 12px;
  font: .82rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
summary { cursor: pointer; color: var(--soft); margin: 6px 0; } td summary { margin: 0; }
@media (max-width: 560px) {
  main { padding: 12px 10px 40px; }
  section { padding: 14px 12px; border-radius: 8px; }
  h1 { font-size: 1.35rem; }
  svg text, .wide svg text { font-size: 15px; } svg .label, .wide svg .label { font-size: 15.5px; }
  .policy { grid-template-columns: 62px minmax(80px, 1fr) 52px 62px; gap: 8px; }
  .cards div { flex-basis: 88px; padding: 6px 10px; }
}
@media print { body { background: none; } section { break-inside: avoid; } }
"""
