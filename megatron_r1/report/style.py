"""The page's looks: system font, one readable column, light and dark."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #647084; --page: #fbfbfa; --card: #ffffff; --line: #e2e5ea;
  --good: #12805c; --bad: #b4372f; --code: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --dim: #97a1b1; --page: #14171c; --card: #1b1f26;
  --line: #2e343e; --good: #4cc79a; --bad: #f0847b; --code: #22272f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; } h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } p { max-width: 46rem; margin: .4rem 0 .8rem; }
.dim, figcaption, .missing { color: var(--dim); } .missing { font-style: italic; }
.lead { font-size: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--dim); font-weight: 600; }
td .dim { font-size: .85em; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .9rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure svg { width: 100%; height: auto; display: block; } figcaption { font-size: .88rem; margin-top: .5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .75rem; }
.answer { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.answer header { display: flex; justify-content: space-between; font-size: .88rem; gap: .75rem; }
.right { color: var(--good); } .wrong { color: var(--bad); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 0; font: .85rem/1.45 ui-monospace, monospace; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; margin: .5rem 0; }
details pre { background: var(--code); padding: .75rem; border-radius: 6px; max-height: 32rem; overflow: auto; }
summary { cursor: pointer; }
"""
