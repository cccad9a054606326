/* Where every op is drawn: its time from x0 to x1, and within its rank's row from y0 to y1 in pixels.

     row   | F5>  | F6> top, B2< W2< below |      computes in time; an F&B pair is drawn as two halves
           ||||     |||                           messages below, side by side from when they are posted
*/

const GUTTER = 62;
const AXIS = 24;
const MESSAGE_SHARE = 0.3; // of the shortest compute

function rowSizes(ranks) {
  if (ranks <= 8) return { compute: 28, message: 12, row: 50 };
  if (ranks <= 20) return { compute: 20, message: 9, row: 35 };
  return { compute: 14, message: 6, row: 23 };
}

function layOut(schedule) {
  const sizes = rowSizes(schedule.ranks.length);
  const costs = Object.values(schedule.costs).filter((cost) => cost > 0);
  const unit = costs.length ? Math.min(...costs) : 1;
  for (const slots of schedule.ranks) {
    for (const slot of slots) if (isCompute(slot.ops[0])) layOutCompute(slot, schedule.costs, sizes);
    layOutMessages(slots.filter((slot) => !isCompute(slot.ops[0])), unit, sizes);
  }
  const ends = schedule.ops.map((op) => Math.max(op.x1, op.slot.end));
  schedule.end = ends.reduce((latest, end) => Math.max(latest, end), 0);
  schedule.gaps = schedule.ranks.map((slots) => gapsOf(slots, schedule.line));
  schedule.sizes = sizes;
  schedule.unit = unit;
  schedule.height = AXIS + sizes.row * schedule.ranks.length + 16;
  schedule.rowTop = (rank) => AXIS + sizes.row * rank + 4;
}

/* Where a rank does not compute: pairs of a start and an end. */
function gapsOf(slots, line) {
  const computes = slots.filter((slot) => slot.reached && isCompute(slot.ops[0]));
  const starts = [0, ...computes.map((slot) => slot.end)];
  return starts.map((start, index) => [start, computes[index]?.start ?? line]).filter(([start, end]) => end > start + 1e-9);
}

function layOutCompute(slot, costs, sizes) {
  const forwards = slot.ops.filter((op) => op.kind === "F");
  const backwards = slot.ops.filter((op) => op.kind !== "F");
  const half = sizes.compute / 2;
  slot.paired = forwards.length > 0 && backwards.length > 0;
  if (!slot.paired) return spread(slot.ops, slot, costs, 0, sizes.compute);
  spread(forwards, slot, costs, 0, half);
  spread(backwards, slot, costs, half, sizes.compute);
}

function spread(ops, slot, costs, y0, y1) {
  const whole = ops.reduce((sum, op) => sum + costs[op.kind], 0);
  let clock = slot.start;
  for (const op of ops) {
    const share = whole > 0 ? costs[op.kind] / whole : 1 / ops.length;
    const x1 = clock + share * (slot.end - slot.start);
    Object.assign(op, { x0: clock, x1, y0, y1 });
    clock = x1;
  }
}

function layOutMessages(slots, unit, sizes) {
  for (let first = 0; first < slots.length; ) {
    let next = first;
    while (next < slots.length && slots[next].start === slots[first].start) next++;
    const ops = slots.slice(first, next).flatMap((slot) => slot.ops);
    const room = next < slots.length ? slots[next].start - slots[first].start : unit;
    const width = Math.min(MESSAGE_SHARE * unit, room / ops.length);
    ops.forEach((op, index) => {
      const x0 = slots[first].start + index * width;
      Object.assign(op, { x0, x1: x0 + width, y0: sizes.compute + 2, y1: sizes.compute + 2 + sizes.message });
    });
    first = next;
  }
}
