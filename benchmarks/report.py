"Results as tables and pictures: every ratio stands beside the control's, and the machine beside both"
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

RESULTS = Path(__file__).resolve().parent/'results'

def results(folder=RESULTS):
    "All results in `folder`, by name"
    return [json.loads(p.read_text(encoding='utf-8')) for p in sorted(Path(folder).glob('*.json'))]

def tables(folder=RESULTS/'tables'): return results(folder)

# --- numbers as text ------------------------------------------------------------------------------------------------
def time_text(seconds):
    "A time in the unit that suits it"
    unit, scale = next(((u, s) for u, s in [('s', 1), ('ms', 1e-3), ('µs', 1e-6)] if abs(seconds) >= s), ('ns', 1e-9))
    return f'{seconds/scale:.3g} {unit}'

def interval_text(spread, fmt):
    "Median and its 95% interval; the range where there are too few rounds for an interval"
    low, high = (spread[k] for k in (('min', 'max') if spread['low'] is None else ('low', 'high')))
    return f'{fmt(spread["median"])} [{fmt(low)}, {fmt(high)}]'

def ratio_text(spread): return interval_text(spread, '{:.3f}'.format)

def beyond_noise(variant, control):
    "'slower' or 'faster' where the 95% interval of the median ratio lies clear of the control's, else 'no'"
    a, b = variant['ratio'], control['ratio']
    if a['low'] is None: return 'too few rounds'
    if a['low'] > b['high']: return 'slower'
    return 'faster' if a['high'] < b['low'] else 'no'

# --- tables ---------------------------------------------------------------------------------------------------------
def sides(case):
    "A case's baseline, control and the others; `ValueError` for a result that holds errors"
    errors = [o['error'] for o in (case, *case['variants']) if o['error']]
    if errors: raise ValueError(f'{case["name"]} failed: {errors}')
    return case['variants']

def label(case, cases):
    "A case's name and the parameters that are not the same in all cases"
    vary = [k for k in case['params'] if len({str(o['params'].get(k)) for o in cases}) > 1]
    return ', '.join([case['name'], *(f'{case["params"][k]} {k}' for k in vary)])

def frame(rows, name):
    "Rows as a table, named by their column `name`, under a single line of headings"
    return pd.DataFrame(rows).fillna('').set_index(name).rename_axis(None).rename_axis(name, axis=1)

def rows(result):
    "Each compared variant with its case's label, baseline and control"
    for case in result['cases']:
        baseline, control, *others = sides(case)
        for o in others: yield dict(case=label(case, result['cases']), variant=o['name']), baseline, control, o

def ratios(result):
    "Time of each variant over the baseline's, the control's ratio beside it"
    def row(control, o):
        return {'ratio': ratio_text(o['ratio']), 'A/A': ratio_text(control['ratio']),
                'differs': beyond_noise(o, control)}
    return frame([{**name, **row(control, o)} for name, _, control, o in rows(result)], 'case')

def times(result):
    "Time of the baseline, and what each variant adds to it"
    def text(spread): return interval_text(spread, time_text)
    def row(base, control, o):
        return {base['name']: text(base['seconds']), 'added': text(o['added']), 'added A/A': text(control['added'])}
    return frame([{**name, **row(*variants)} for name, *variants in rows(result)], 'case')

def extras(result):
    "What was measured besides time, of baseline and variants"
    def text(spread): return interval_text(spread, '{:.4g}'.format)
    def of(o): return {f'{k}, {o["name"]}': text(s) for k, s in o['extra'].items()}
    return frame([{**name, **of(base), **of(variant)} for name, base, _, variant in rows(result)], 'case')

def findings(result):
    "The numbers that follow from several cases, the control's beside them"
    def text(o): return interval_text(o, '{:.3f}'.format)
    def row(o): return {'finding': o['name'], 'value': text(o), 'A/A': text(o['control']), 'where': o['where']}
    return frame([row(o) for o in result['findings']], 'finding')

def provenance(results):
    "Machine, versions, seeds and date, a column per result"
    def flat(a):
        m = a['machine']
        return {'date': a['date'],
                'processor': f'{m["cpu"]}, {m["cores"]} cores, {m["simd"]}', 'memory': f'{m["memory_gib"]} GiB',
                'accelerator': m['accelerator'] or 'none', 'system': f'{m["system"]} {m["arch"]}',
                'threads used': a['threads'], 'clock': f'{a["clock"]} time',
                'load before': a['load_before'], 'seed': ', '.join(map(str, a['seeds'].values())),
                **a['versions'], 'command': a['command']}
    return pd.DataFrame({o['name']: flat(o['about']) for o in results})

def items_per_second(result):
    "Of each variant and of the control, and its gain over the baseline of the same round"
    def gain(r):
        if r is None: return ''
        low, high = (r[k] for k in (('min', 'max') if r['low'] is None else ('low', 'high')))
        return f'{1/r["median"]:.2f} [{1/high:.2f}, {1/low:.2f}]'
    def row(case, o):
        n, s = case['params']['items'], o['seconds']
        return {'case': case['name'], 'variant': o['name'], 'items a second': f'{n/s["median"]:,.0f}',
                'quartiles': f'{n/s["q3"]:,.0f} to {n/s["q1"]:,.0f}', 'gain': gain(o['ratio'])}
    return frame([row(case, o) for case in result['cases'] if 'items' in case['params'] for o in sides(case)], 'case')

def exchanged(result):
    "What a process gives away in an update, by kind: calls and MB, and how often all meet"
    def row(case, o):
        found = {k: s['median'] for k, s in o['extra'].items()}
        kinds = sorted({k.split(',')[0] for k in found} - {'meetings'})
        return {'case': case['name'], 'variant': o['name'], 'meetings': f'{found["meetings"]:.2g}',
                **{k: f'{found[f"{k}, calls"]:.2g} of {found[f"{k}, MB"]/found[f"{k}, calls"]:.3g} MB' for k in kinds}}
    return frame([row(case, o) for case in result['cases'] for o in sides(case) if o['extra']], 'case')

# --- pictures -------------------------------------------------------------------------------------------------------
def bar(ax, y, spread, color, name):
    "A dot at the median, a thick line over its 95% interval, a thin one from quartile to quartile"
    if spread['low'] is not None:
        ax.plot([spread['low'], spread['high']], [y, y], color=color, lw=4, alpha=.55, solid_capstyle='butt')
    ax.plot([spread['q1'], spread['q3']], [y, y], color=color, lw=1)
    ax.plot(spread['median'], y, 'o', color=color, ms=5, label=name)

def plot(result):
    "Ratio to the baseline of every variant and of the control, a band per case"
    cases, bands = result['cases'], [sides(o)[1:] for o in result['cases']]
    names = dict.fromkeys(o['name'] for band in bands for o in band if not o['control'])
    colors = {name: f'C{i}' for i, name in enumerate(names)}
    ticks, y = [], 0
    fig, ax = plt.subplots(figsize=(8, 1 + .2*sum(1 + len(band) for band in bands)), layout='constrained')
    for band in bands:
        ticks.append(y + (len(band)-1)/2)
        for i, o in enumerate(band):
            name = 'A/A: the baseline again' if o['control'] else o['name']
            bar(ax, y+i, o['ratio'], colors.get(o['name'], 'grey'), name)
        y += len(band) + 1
    ax.axvline(1, color='grey', lw=.8, ls=':')
    ax.set_yticks(ticks, [label(o, cases).replace(', ', '\n', 1) for o in cases])
    ax.invert_yaxis()
    baseline, clock = sides(cases[0])[0]['name'], result['about']['clock']
    ax.set(xlabel=f'{clock} time relative to {baseline!r} in the same round', title=result['title'])
    legend = dict(zip(*reversed(ax.get_legend_handles_labels())))
    ax.legend(legend.values(), legend.keys(), frameon=False)
    return fig

# --- tables of results that take no turns -----------------------------------------------------------------------------
def quality(result):
    "Each measure, mean and standard deviation over seeds, beside its target"
    def text(o): return f'{o["mean"]:.4g}' + (f' ± {o["sd"]:.2g}' if o['sd'] else '')
    def row(o):
        return {'model': o['name'], 'measure': o['measure'], 'mean ± sd': text(o), 'runs': len(o['values']),
                'target': f'{"at most" if o["at_most"] else "at least"} {o["target"]}',
                'met': 'yes' if o['met'] else 'missed', 'popularity': o.get('popularity')}
    return frame([row(o) for o in result['rows']], 'model')

def growth(result):
    "Seconds and memory for each number of ratings"
    def row(o):
        peak, before = o['peak_mb'], o['before_any_rating_mb']
        return {'ratings': f'{o["ratings"]:,}', 'users': f'{o["users"]:,}', 'items': f'{o["items"]:,}',
                'batch': o['bs'], 'load, s': o['load_seconds'], 'epoch, s': o['epoch_seconds'],
                'peak, MB': peak, 'before any rating, MB': before, 'for the ratings, MB': peak-before}
    return frame([row(o) for o in result['rows']], 'ratings')

def memory(result):
    "Peak memory of each number of chunks, and its share of the whole batch's, measured and predicted"
    def row(o):
        return {'chunks': f'{o["accum"]}{", whole head" if o["whole_head"] else ""}', 'items at a time': o['items'],
                'measured, MB': o['measured_mb'], 'predicted, MB': o['predicted_mb'],
                'share, measured': o['measured_ratio'], 'share, predicted': o['predicted_ratio'],
                'items per second': o['items_per_second']}
    return frame([row(o) for o in result['rows']], 'chunks')

# --- leaderboards ---------------------------------------------------------------------------------------------------
def leaderboards(folder=RESULTS/'leaderboard'):
    "Results beside other packages, by name"
    return {o['name']: o for o in results(folder)}

def where_text(result):
    "Where and when it was measured, in two lines"
    a, m = result['about'], result['about']['machine']
    return (f'{m["cpu"]}, {m["cores"]} cores, {m["memory_gib"]} GiB, torch {a["versions"]["torch"]}, {a["date"]}\n'
            f'{a["threads"]} thread, {a["clock"]} time; load before {a["load_before"]}')

def difference_text(beside):
    "Difference to the best peer, with its 95% interval"
    if beside is None: return 'best peer'
    return f'{beside["mean"]:+.4f} [{beside["low"]:+.4f}, {beside["high"]:+.4f}]'

def row_of(board, model): return next(o for o in board['rows'] if o['model'] == model)
def best_peer(board): return next(o['model'] for o in board['rows'] if o['beside'] is None)

def standing(beside):
    "'better', 'level' or 'worse': where zero lies beside the interval of a difference that is better when larger"
    return 'better' if beside['low'] > 0 else 'worse' if beside['high'] < 0 else 'level'

def board_table(board):
    "A row for each model, the best first"
    def row(o):
        measures = {name: f'{o[name]:.4f}' for name in ('ndcg@10', 'recall@10', 'mse') if name in o}
        return dict(model=o['model'], **measures, **{'beside the best peer': difference_text(o['beside'])},
                    seconds=f'{o["seconds"]:.2f}')
    return frame([row(o) for o in board['rows']], 'model')

def headed(name, table): return table.rename_axis(name, axis=1)

def plot_boards(boards, model):
    "Difference of our models to the best peer of each set, as a share of that peer's value, with 95% intervals"
    fig, ax = plt.subplots(figsize=(8, 1 + .45*len(boards)), layout='constrained')
    for y, (name, board) in enumerate(boards.items()):
        best, of = row_of(board, best_peer(board)), row_of(board, model)['beside']
        low, mean, high = (100*of[o]/best[board['measure']] for o in ('low', 'mean', 'high'))
        ax.plot([low, high], [y, y], color='C0', lw=2.5, solid_capstyle='butt')
        ax.plot(mean, y, 'o', color='C0', ms=6)
    ax.axvline(0, color='grey', lw=.8, ls=':')
    ax.set_yticks(range(len(boards)), [f'{name}\n{best_peer(board)}' for name, board in boards.items()])
    ax.set_ylim(len(boards) - .5, -.5)
    ax.set_xlabel(f'{model} beside the best peer, % of its value')
    return fig

def peer_settings(boards):
    "What each peer chose on the inner split of each set"
    rows = [(o['model'], name, ', '.join(f'{k}={v}' for k, v in o['setting'].items()), o['tried'])
            for name, board in boards.items() for o in board['rows'] if o['setting']]
    return pd.DataFrame(rows, columns=['peer', 'set', 'setting', 'of']).sort_values(['peer', 'set']).set_index('peer')

# --- on a GPU, which may not be at hand -----------------------------------------------------------------------------
def gpu(folder=RESULTS/'gpu'):
    "What was measured on a GPU by name: sections of benchmarks/gpu.py, and figures that were imported"
    return {o['name']: o for o in results(folder)}

def gpu_provenance(result):
    "The GPU and the versions, in a line"
    a, v = result['about'], result['about']['versions']
    commit = f', commit {a["commit"]}' if 'commit' in a else ''
    return f'{a["machine"]["accelerator"]}, torch {v["torch"]}, fastai {v["fastai"]}, timm {v["timm"]}{commit}'

def predicted_bytes(row):
    "Bytes that `predict_memory` said the device would allocate"
    said = row['predicted']
    return said['total'] + said.get('workspace', 0) if isinstance(said, dict) else said

def gpu_memory(rows):
    "Predicted and allocated gigabytes of each row, and what PyTorch reserved"
    def row(o):
        p, m, r = predicted_bytes(o), o['measured'], o.get('reserved')
        return {'model': o.get('arch', o.get('model')), 'options': o.get('options', ''), 'px': o['size'],
                'precision': o.get('precision', 'fp32'), 'items': o['bs'], 'accum': o['accum'],
                'predicted, GB': f'{p/1e9:.2f}', 'allocated, GB': f'{m/1e9:.2f}', 'off, MB': round((p-m)/1e6),
                'reserved over allocated': f'{r/m:.2f}' if r else ''}
    return frame([row(o) for o in rows if o.get('measured')], 'model')

def worst_predicted(rows, n=8):
    "The `n` rows whose prediction strays most from what was allocated, in bytes"
    def off(o): return abs(predicted_bytes(o)-o['measured'])
    return sorted([o for o in rows if o.get('measured')], key=off, reverse=True)[:n]

def predicted_now(result):
    "Rows that an earlier version measured, with the predictions of the version that `about` names"
    return [{**o, 'predicted': o['predicted_now']} for o in result['memory']]

def deviations(result):
    "How far the predictions of the version that measured, and of a later one, are from what was allocated"
    def row(versions, rows):
        off = sorted(abs(predicted_bytes(o)/o['measured']-1) for o in rows)
        return {'version': versions['paddy-multi'], 'torch': versions['torch'], 'rows': len(off),
                'median, %': round(100*off[len(off)//2], 1), 'worst, %': round(100*off[-1], 1)}
    about = result['about']
    return frame([row(about['versions'], result['memory']),
                  row(about['predicted_now']['versions'], predicted_now(result))], 'version')

def plot_gpu_memory(rows, n=8):
    "Predicted over allocated memory of every row; the models of the `n` that stray most are named"
    def at(o): return o['measured']/1e9, predicted_bytes(o)/o['measured']
    rows = [o for o in rows if o.get('measured')]
    fig, ax = plt.subplots(figsize=(8, 4), layout='constrained')
    for i, kind in enumerate(dict.fromkeys(o['precision'] for o in rows)):
        ax.scatter(*zip(*(at(o) for o in rows if o['precision'] == kind)), s=22, color=f'C{i}', label=kind)
    for o in worst_predicted(rows, n):
        ax.annotate(o['arch'].split('_patch')[0], at(o), xytext=(5, 4), textcoords='offset points', fontsize=7)
    ax.axhline(1, color='grey', lw=.8, ls=':')
    ax.margins(x=.12)
    ax.set(xlabel='GB allocated', ylabel='predicted over allocated', title='Memory of a training step')
    ax.legend(frameon=False)
    return fig

def gpu_speed(rows):
    "Seconds of each way through the same batches, with their range"
    def text(o): return f'{o["seconds"]:.3g} [{o["low"]:.3g}, {o["high"]:.3g}]' if o['seconds'] else 'fails'
    def task(o): return f'{o["arch"]}, {o["precision"]}, {o["batches"]} batches of {o["bs"]}' + (
        f' in {o["chunk"]}s' if 'chunk' in o else '')
    tasks = dict.fromkeys(map(task, rows))
    return frame([{'task': t, **{o['way']: text(o) for o in rows if task(o) == t}} for t in tasks], 'task')

def gpu_compiled(rows):
    "Seconds of a compiled model, whole and in chunks, with their range"
    def text(o): return 'fails' if o['error'] else f'{o["seconds"]:.3g} [{o["low"]:.3g}, {o["high"]:.3g}]'
    modes = dict.fromkeys(o['mode'] for o in rows)
    return frame([{'torch.compile': m, **{o['way']: text(o) for o in rows if o['mode'] == m}} for m in modes],
                 'torch.compile')

def gpu_targets(rows):
    "Milliseconds of losses and metrics by number of targets"
    counts = dict.fromkeys(o['targets'] for o in rows)
    def text(o): return f'{o["seconds"]*1e3:.3g}'
    return frame([{'targets': str(n), **{f'{o["what"]}, {o["way"]}, ms': text(o) for o in rows if o['targets'] == n}}
                  for n in counts], 'targets')

def gpu_precision(rows):
    "How far an epoch is from float64, as parts of the way that the weights went"
    names = dict(whole='whole batches', in_another_order='in another order', chunks_of_16='chunks of 16',
                 chunks_of_5='chunks of 5', fastai_16='GradientAccumulation')
    return frame([{'model': o['arch'], 'precision': o['precision'], **{v: f'{o[k]:.2e}' for k, v in names.items()}}
                  for o in rows if not o.get('error')], 'model')
