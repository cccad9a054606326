/* One timeline: a canvas with the ops, the arrows over it, and what pointer and keys do. */

const DRAG = 4; // pixels after which a press is a drag

function makeTimeline(schedule, view, label) {
  const canvas = element("canvas", { tabindex: 0, role: "application", "aria-roledescription": "timeline", "aria-label": label });
  const svg = shape("svg", { class: "arrows", "aria-hidden": "true" });
  const node = element("div", { class: "canvas" }, canvas, svg);
  const context = canvas.getContext("2d");
  const scene = { schedule, view, width: 0, colours: readColours(schedule), selected: null, hovered: null, marked: null };
  const timeline = { node, canvas, scene, marks: [], focused: null };
  let asked = false;

  timeline.repaint = () => {
    if (!scene.width) return;
    paint(context, scene);
    drawArrows(svg, scene, timeline.marks, timeline.focused);
  };
  timeline.refresh = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      timeline.repaint();
    });
  };
  timeline.recolour = () => {
    scene.colours = readColours(schedule);
    timeline.repaint();
  };
  timeline.resize = (width = node.clientWidth, scale = Math.max(window.devicePixelRatio || 1, 1)) => {
    if (!width) return;
    scene.width = width;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(schedule.height * scale);
    canvas.style.height = `${schedule.height}px`;
    svg.setAttribute("viewBox", `0 0 ${width} ${schedule.height}`);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    timeline.repaint();
  };
  timeline.mark = (marks) => {
    timeline.marks = marks;
    scene.marked = marks.length ? new Set(marks.flatMap((mark) => [...mark.at, ...mark.to]).map((one) => schedule.ops[one])) : null;
    timeline.refresh();
  };
  timeline.time = (x) => view.from + ((x - GUTTER) / (scene.width - GUTTER)) * (view.to - view.from);
  timeline.opAt = (x, y) => opAt(timeline, x, y);
  timeline.boxOf = (op) => boxOf(scene, [op]);
  timeline.hover = (op) => {
    if (scene.hovered === op) return;
    scene.hovered = op;
    canvas.style.cursor = op ? "pointer" : "";
    if (op) timeline.tip(op);
    else tooltip.hide();
    timeline.refresh();
  };
  timeline.select = (op) => {
    scene.selected = op;
    scene.hovered = null;
    if (op) {
      view.reveal(op.x0, op.x1);
      timeline.repaint();
      timeline.tip(op);
      tooltip.announce(op);
    } else {
      tooltip.hide();
    }
    timeline.refresh();
  };
  timeline.tip = (op) => {
    const frame = canvas.getBoundingClientRect();
    const box = boxOf(scene, [op]);
    const [left, right] = [Math.max(box.left, GUTTER), Math.min(box.right, scene.width)];
    tooltip.show(op, { left: frame.left + left, right: frame.left + right, top: frame.top + box.top, bottom: frame.top + box.bottom });
  };
  view.onChange(timeline.refresh);
  new ResizeObserver(() => timeline.resize()).observe(node);
  listenToPointer(timeline);
  listenToKeys(timeline);
  return timeline;
}

/* The op drawn at a point, or the nearest within three pixels, since a message can be thinner than a pointer. */
function opAt({ scene }, x, y) {
  const { schedule } = scene;
  const rank = Math.floor((y - AXIS) / schedule.sizes.row);
  if (x < GUTTER || !schedule.ranks[rank]) return null;
  const inner = y - schedule.rowTop(rank);
  let [found, nearest] = [null, 3];
  for (const slot of schedule.ranks[rank]) {
    for (const op of slot.ops) {
      if (inner < op.y0 - 1 || inner > op.y1 + 1) continue;
      const away = Math.max(scene.x(op.x0) - x, x - scene.x(op.x1), 0);
      if (away < nearest || (away === 0 && inner >= op.y0 && inner < op.y1)) [found, nearest] = [op, away];
    }
  }
  return found;
}

function listenToPointer(timeline) {
  const { canvas, scene } = timeline;
  const { view } = scene;
  const fingers = new Map();
  let dragged = false;
  const at = (event) => {
    const frame = canvas.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    fingers.set(event.pointerId, at(event));
    dragged = fingers.size > 1;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    const before = fingers.get(event.pointerId);
    if (!before) return timeline.hover(timeline.opAt(x, y));
    if (!dragged && Math.abs(x - before[0]) < DRAG) return undefined;
    dragged = true;
    canvas.classList.add("dragged");
    timeline.hover(null);
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const [old, now] = [Math.abs(before[0] - other[0]), Math.abs(x - other[0])];
      if (old > 1 && now > 1) view.zoom(now / old, timeline.time((x + other[0]) / 2));
    } else {
      view.pan(timeline.time(before[0]) - timeline.time(x));
    }
    fingers.set(event.pointerId, [x, y]);
    return undefined;
  });
  const release = (event) => {
    if (!fingers.delete(event.pointerId)) return;
    canvas.classList.remove("dragged");
    if (!dragged && event.type === "pointerup") timeline.select(timeline.opAt(...at(event)));
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => timeline.hover(null));
  canvas.addEventListener("blur", () => timeline.select(null));
  canvas.addEventListener(
    "wheel",
    (event) => {
      const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
      const zooms = event.ctrlKey || event.metaKey || (!sideways && document.activeElement === canvas);
      if (!zooms && !sideways) return; // the page scrolls
      event.preventDefault();
      timeline.hover(null);
      if (zooms) return void view.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0025)), timeline.time(at(event)[0]));
      view.pan(((event.deltaX || event.deltaY) / (scene.width - GUTTER)) * (view.to - view.from));
    },
    { passive: false },
  );
}

function listenToKeys(timeline) {
  const { canvas, scene } = timeline;
  const { schedule, view } = scene;
  const width = () => view.to - view.from;
  const go = (op) => op && timeline.select(op);
  const keys = {
    ArrowRight: () => go(neighbour(timeline, 1)),
    ArrowLeft: () => go(neighbour(timeline, -1)),
    ArrowDown: () => go(across(timeline, 1)),
    ArrowUp: () => go(across(timeline, -1)),
    Home: () => go(neighbour(timeline, -Infinity)),
    End: () => go(neighbour(timeline, Infinity)),
    n: () => go(scene.selected?.needs.find((need) => typeof need !== "string")),
    m: () => go(scene.selected?.partner),
    Escape: () => timeline.select(null),
    "+": () => view.zoom(1.4),
    "=": () => view.zoom(1.4),
    "-": () => view.zoom(1 / 1.4),
    0: () => view.fit(),
    ",": () => view.pan(-0.2 * width()),
    ".": () => view.pan(0.2 * width()),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key] || !schedule.ops.length) return;
    event.preventDefault();
    keys[event.key]();
  });
}

/* The op `step` places further in the selected op's program; the first visible one if none is selected. */
function neighbour({ scene }, step) {
  const { selected, schedule, view } = scene;
  if (!selected) return schedule.ops.find((op) => op.x1 > view.from) ?? schedule.ops[0];
  const mine = schedule.ranks[selected.slot.rank].flatMap((slot) => slot.ops);
  return mine[Math.min(Math.max(mine.indexOf(selected) + step, 0), mine.length - 1)];
}

/* The op of the next rank that is nearest in time, of the same sort: compute or message. */
function across({ scene }, step) {
  const { selected, schedule } = scene;
  if (!selected) return neighbour({ scene }, 0);
  const slots = schedule.ranks[selected.slot.rank + step] ?? [];
  const others = slots.flatMap((slot) => slot.ops).filter((op) => isCompute(op) === isCompute(selected));
  const away = (op) => Math.abs(op.x0 - selected.x0);
  return others.reduce((best, op) => (!best || away(op) < away(best) ? op : best), null);
}
