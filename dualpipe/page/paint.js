/* Draws one timeline on its canvas. */

const FONT = '"DejaVu Sans Mono", "Liberation Mono", ui-monospace, monospace';

const HATCH = 7; // pixels between the lines of a bubble

/* The colours, by the name of their custom property; `faded` is an opacity instead. */
function readColours({ ops, names }) {
  const style = getComputedStyle(document.documentElement);
  const lines = "ground line text muted bubble hatch f-line b-line w-line fault changed need faded".split(" ");
  const found = [...new Set([...lines, ...ops.flatMap(({ colour }) => [colour, `${colour}-ink`])])];
  return Object.fromEntries(found.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/* scene: schedule, view, width, colours, selected and hovered op, marked (ops of the counterexample shown, or null). */
function paint(context, scene) {
  const { schedule, width, colours } = scene;
  context.fillStyle = colours.ground;
  context.fillRect(0, 0, width, schedule.height);
  scene.x = (time) => GUTTER + ((time - scene.view.from) / (scene.view.to - scene.view.from)) * (width - GUTTER);
  scene.labels = [];
  context.save();
  context.beginPath();
  context.rect(GUTTER, 0, width - GUTTER, schedule.height);
  context.clip();
  paintAxis(context, scene);
  paintBubbles(context, scene);
  schedule.ranks.forEach((slots) => slots.forEach((slot) => paintSlot(context, scene, slot)));
  if (scene.marked) scene.marked.forEach((op) => outline(context, scene, [op], colours.fault, 2.5));
  if (schedule.stuck !== null) paintStuck(context, scene);
  paintNeeds(context, scene, scene.hovered || scene.selected);
  context.restore();
  paintGutter(context, scene);
}

/* A hatching wherever a rank waits. */
function paintBubbles(context, { schedule, width, colours, x }) {
  const height = schedule.sizes.compute;
  context.lineWidth = 1;
  context.strokeStyle = colours.hatch;
  context.fillStyle = colours.bubble;
  schedule.gaps.forEach((gaps, rank) => {
    const bottom = schedule.rowTop(rank) + height;
    for (const [start, end] of gaps) {
      const [left, right] = [Math.max(GUTTER, x(start)), Math.min(width, x(end) - 1)];
      if (right > left) context.fillRect(left, bottom - height, right - left, height);
      const first = x(0) + Math.floor((left - height - x(0)) / HATCH) * HATCH;
      for (let foot = first; foot < right; foot += HATCH) {
        const [x0, x1] = [Math.max(foot, left), Math.min(foot + height, right)];
        if (x1 > x0) line(context, x0, bottom - (x0 - foot), x1, bottom - (x1 - foot));
      }
    }
  });
}

function paintGutter(context, { schedule, colours }) {
  context.fillStyle = colours.muted;
  context.font = "12px system-ui, sans-serif";
  context.textAlign = "left";
  context.textBaseline = "middle";
  schedule.ranks.forEach((_, rank) => context.fillText(`rank ${rank}`, 10, schedule.rowTop(rank) + schedule.sizes.compute / 2));
}

function paintAxis(context, { schedule, view, width, colours, x }) {
  const least = ((view.to - view.from) / (width - GUTTER)) * 64;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= least);
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let time = Math.max(0, Math.ceil(view.from / step) * step); time <= Math.min(view.to, schedule.line) + 1e-9; time += step) {
    const at = Math.round(x(time)) + 0.5;
    context.strokeStyle = colours.line;
    context.lineWidth = 1;
    line(context, at, AXIS - 5, at, schedule.height);
    context.fillStyle = colours.muted;
    context.fillText(number(time), at, 10);
  }
}

function paintSlot(context, scene, slot) {
  const { schedule, view, colours, x } = scene;
  const tail = slot.ops[slot.ops.length - 1];
  if (slot.ops[0].x0 > view.to || Math.max(slot.end, tail.x1) < view.from) return;
  const top = schedule.rowTop(slot.rank);
  const compute = isCompute(slot.ops[0]);
  if (!compute && slot.end > slot.start) paintWaiting(context, scene, slot, top);
  for (const op of slot.ops) {
    if (compute) paintCompute(context, scene, op, top);
    else paintMessage(context, scene, op, top);
  }
  const wide = x(slot.end) - x(slot.start) > 36;
  if (slot.paired) frame(context, wide ? colours.muted : colours.line, 1, x(slot.start), top, x(slot.end) - x(slot.start) - 1, schedule.sizes.compute);
  if (slot.changed) paintChanged(context, scene, slot.ops);
}

function paintCompute(context, scene, op, top) {
  const { colours, x } = scene;
  const left = x(op.x0);
  const width = Math.max(1, x(op.x1) - left - 1);
  const height = op.y1 - op.y0 - (op.y0 === 0 && op.slot.paired ? 0.5 : 0);
  context.fillStyle = colours.ground;
  if (op.slot.reached) context.fillRect(left, top + op.y0, width, height);
  context.globalAlpha = opacity(scene, op);
  if (op.slot.reached) {
    context.fillStyle = colours[op.colour];
    context.fillRect(left, top + op.y0, width, height);
  } else {
    const colour = colours[op.slot.waits ? "fault" : `${op.kind.toLowerCase()}-line`];
    context.setLineDash([3, 2]);
    frame(context, colour, op.slot.waits ? 2 : 1.3, left, top + op.y0, width, height);
    context.setLineDash([]);
  }
  context.globalAlpha = 1;
  context.fillStyle = op.slot.reached ? inkOf(scene, op) : colours.muted;
  write(context, op, left, top + op.y0, width, height, Math.min(11.5, height < 13 ? height - 1.5 : height - 3));
}

/* Behind the counterexample the other ops fade, but their names do not. */
const opacity = (scene, op) => (scene.marked && !scene.marked.has(op) ? Number(scene.colours.faded) : 1);
const inkOf = (scene, op) => (opacity(scene, op) < 1 ? scene.colours.text : scene.colours[`${op.colour}-ink`]);

/* A send is filled, a receive outlined, in the hue of what the message feeds. */
function paintMessage(context, scene, op, top) {
  const { colours, x } = scene;
  const left = x(op.x0);
  const width = Math.max(1, x(op.x1) - left - 1);
  const height = op.y1 - op.y0;
  const wrong = isMismatched(op) || op.reason;
  const colour = wrong ? colours.fault : colours[op.colour];
  const ink = wrong ? colours.ground : inkOf(scene, op);
  context.globalAlpha = Math.min(opacity(scene, op), op.slot.reached || op.slot.waits ? 1 : 0.55);
  if (isSend(op)) {
    context.fillStyle = colour;
    context.fillRect(left, top + op.y0, width, height);
  } else {
    frame(context, colour, 1, left, top + op.y0, width, height);
  }
  context.globalAlpha = 1;
  context.fillStyle = isSend(op) ? ink : colours.text;
  if (width > 30) write(context, op, left, top + op.y0, width, height, Math.min(9.5, height - 1));
}

/* A bar below a slot that the other schedule does not have; around it too, where there is room. */
function paintChanged(context, scene, ops) {
  const box = boxOf(scene, ops);
  const width = box.right - box.left;
  context.fillStyle = scene.colours.changed;
  context.fillRect(box.left, box.bottom + 1, width, 3);
  if (width > 12 * ops.length) frame(context, scene.colours.changed, 1.5, box.left - 1, box.top - 1, width + 2, box.bottom - box.top + 3);
}

/* A message slot that blocks: a bar from when it was posted until all its messages have completed. */
function paintWaiting(context, { schedule, colours, x }, slot, top) {
  const y = top + schedule.sizes.compute + 2 + schedule.sizes.message / 2;
  context.strokeStyle = slot.reached ? colours.muted : colours.fault;
  context.lineWidth = slot.reached ? 1.5 : 2.5;
  context.setLineDash([1.5, 3]);
  line(context, x(slot.start), y, x(slot.end), y);
  context.setLineDash([]);
}

/* The op's whole name where it fits, else its microbatch, else nothing. */
function write(context, op, left, top, width, height, size) {
  if (width < 12 || size < 7.5) return;
  context.font = `${size}px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  const fits = (text) => text.length * size * 0.604 + 3 <= width;
  const text = [op.text, String(op.mb)].find(fits);
  if (text) context.fillText(text, left + width / 2, top + height / 2 + 0.5);
}

function paintStuck(context, { schedule, width, colours, x, view }) {
  const at = x(schedule.line);
  if (at > width) return;
  context.fillStyle = colours.fault;
  context.globalAlpha = 0.05;
  context.fillRect(at, AXIS - 6, width - at, schedule.height);
  context.globalAlpha = 1;
  context.strokeStyle = colours.fault;
  context.lineWidth = 1.5;
  context.setLineDash([5, 4]);
  line(context, at, 0, at, schedule.height);
  context.setLineDash([]);
  context.font = "600 11.5px system-ui, sans-serif";
  context.fillStyle = colours.fault;
  context.textAlign = "left";
  if (view.to > schedule.line + schedule.unit) context.fillText("stuck here · never reached:", Math.max(at + 6, GUTTER + 6), 10);
}

/* Lines from an op to the ops that it needs and to the other end of its message. */
function paintNeeds(context, scene, op) {
  if (!op) return;
  const { colours } = scene;
  for (const need of op.needs) {
    if (typeof need === "string") continue;
    outline(context, scene, [need], colours.need, 2.5);
    join(context, scene, need, op, colours.need);
  }
  if (op.partner && !op.needs.includes(op.partner)) {
    const colour = isMismatched(op) ? colours.fault : colours.need;
    outline(context, scene, [op.partner], colour, 2.5);
    join(context, scene, op, op.partner, colour);
  }
  outline(context, scene, [op], colours.text, 2.5);
}

function boxOf(scene, ops) {
  const { schedule, x } = scene;
  const top = schedule.rowTop(ops[0].slot.rank);
  const left = Math.min(...ops.map((op) => x(op.x0)));
  const right = Math.max(...ops.map((op) => Math.max(x(op.x1) - 1, x(op.x0) + 1)));
  const [y0, y1] = [Math.min(...ops.map((op) => op.y0)), Math.max(...ops.map((op) => op.y1))];
  return { left, right, top: top + y0, bottom: top + y1, middle: (left + right) / 2, centre: top + (y0 + y1) / 2 };
}

/* With a rim, like strokeOverCells. */
function outline(context, scene, ops, colour, thick) {
  const { left, right, top, bottom } = boxOf(scene, ops);
  frame(context, scene.colours.ground, 1.5, left - 1.5, top - 1.5, right - left + 3, bottom - top + 3);
  frame(context, colour, thick, left, top, right - left, bottom - top);
}

function join(context, scene, from, to, colour) {
  const [one, other] = [boxOf(scene, [from]), boxOf(scene, [to])];
  if (from.slot.rank === to.slot.rank && isCompute(from) && isCompute(to)) return arch(context, scene, one, other, colour);
  const [x0, x1] = [one.right, other.left];
  context.beginPath();
  context.moveTo(x0, one.centre);
  const bend = Math.max(14, Math.abs(x1 - x0) / 3);
  context.bezierCurveTo(x0 + bend, one.centre, x1 - bend, other.centre, x1, other.centre);
  strokeOverCells(context, scene, colour);
  return dot(context, x1, other.centre, colour);
}

/* Between two ops of one row: over the cells, not across their names. */
function arch(context, scene, one, other, colour) {
  const [y0, y1] = [one.top, other.top];
  const rise = Math.min(16, 6 + Math.abs(other.middle - one.middle) / 20);
  context.beginPath();
  context.moveTo(one.middle, y0);
  const top = Math.min(y0, y1) - rise;
  context.bezierCurveTo(one.middle + 6, top, other.middle - 6, top, other.middle, y1);
  strokeOverCells(context, scene, colour);
  dot(context, other.middle, y1, colour);
}

/* A line with a rim in the background's colour, since it crosses cells of every shade. */
function strokeOverCells(context, { colours }, colour) {
  for (const [style, thick] of [[colours.ground, 4.4], [colour, 1.8]]) {
    context.strokeStyle = style;
    context.lineWidth = thick;
    context.stroke();
  }
}

function dot(context, x, y, colour) {
  context.fillStyle = colour;
  context.beginPath();
  context.arc(x, y, 3, 0, 2 * Math.PI);
  context.fill();
}

function frame(context, colour, thick, left, top, width, height) {
  context.strokeStyle = colour;
  context.lineWidth = thick;
  const inset = thick / 2;
  context.strokeRect(left + inset, top + inset, Math.max(0.5, width - thick), Math.max(0.5, height - thick));
}

function line(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}
