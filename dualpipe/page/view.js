/* The visible stretch of time, which the timelines of one section share. */

function makeView(end, closest) {
  const margin = Math.max(end * 0.008, 0.05 * closest);
  const [first, last] = [-margin, end + margin];
  const listeners = [];
  const view = { from: first, to: last };

  view.onChange = (listener) => listeners.push(listener);
  view.show = (from, to) => {
    const width = Math.min(Math.max(to - from, Math.min(closest, last - first)), last - first);
    const start = Math.min(Math.max((from + to - width) / 2, first), last - width);
    view.from = start;
    view.to = start + width;
    listeners.forEach((listener) => listener());
  };
  view.fit = () => view.show(first, last);
  view.pan = (time) => {
    const width = view.to - view.from;
    const start = Math.min(Math.max(view.from + time, first), last - width);
    view.show(start, start + width);
  };
  /* Zoom in if the factor is above 1; the time `at` keeps its place on the screen. */
  view.zoom = (factor, at = (view.from + view.to) / 2) => {
    const width = Math.min(Math.max((view.to - view.from) / factor, Math.min(closest, last - first)), last - first);
    const share = (at - view.from) / (view.to - view.from);
    const start = Math.min(Math.max(at - share * width, first), last - width);
    view.show(start, start + width);
  };
  /* Move just far enough to show a stretch of time. */
  view.reveal = (from, to) => {
    const width = view.to - view.from;
    const room = 0.08 * width;
    if (from < view.from + room) view.pan(from - view.from - room);
    else if (to > view.to - room) view.pan(to - view.to + room);
  };
  return view;
}
